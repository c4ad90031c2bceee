
/* Runs a loop through time. Each thread owns some rows of the batch, for all steps. Or, where there are few rows and
   large matrices, the first one owns all of them, and the others take pieces of its products from a work queue. */

#include <sched.h>

#define COLUMNS (4 * PANEL)  /* of a product that are taken at once */

typedef struct {
  int64_t posted;  /* products so far; negative when there will be no more */
  uint64_t next;   /* of the current product: how many pieces it has, and the next one */
  int64_t done;    /* pieces of it */
  real *out;
  const real *x, *packed;
  int64_t out_by_row, x_by_row, rows, K, N;
} work_queue;

/* Takes pieces of the current product until none is left. While a piece is not done the product stays the current one,
   so that its operands may be read; who comes late finds none left, or pieces of the next product, whose operands were
   written before. */
static void take_pieces(work_queue *queue) {
  for (;;) {
    uint64_t taken = __atomic_fetch_add(&queue->next, 1, __ATOMIC_ACQ_REL);
    int64_t piece = (int64_t)(taken & 0xffff), pieces = (int64_t)(taken >> 16 & 0xffff), n = piece * COLUMNS;
    if (piece >= pieces) return;
    int64_t columns = queue->N - n < COLUMNS ? queue->N - n : COLUMNS;
    product(queue->out + n, queue->out_by_row, queue->x, queue->x_by_row, queue->packed + n * queue->K, queue->rows,
            queue->K, columns);
    __atomic_fetch_add(&queue->done, 1, __ATOMIC_RELEASE);
  }
}

static void wait_a_little(int64_t *waited) {
  if (++*waited > 4096) sched_yield();
}

/* What a thread without rows does: pieces of every product, until there will be no more. */
static void serve(work_queue *queue) {
  int64_t seen = 0, posted, waited = 0;
  while ((posted = __atomic_load_n(&queue->posted, __ATOMIC_ACQUIRE)) >= 0) {
    if (posted == seen) {
      wait_a_little(&waited);
      continue;
    }
    seen = posted, waited = 0;
    take_pieces(queue);
  }
}

/* A product by all threads that serve the queue, and this one; by this one alone if there is no queue. */
static void queued_product(void *shared, real *out, int64_t out_by_row, const real *x, int64_t x_by_row,
                           const real *packed, int64_t rows, int64_t K, int64_t N) {
  work_queue *const queue = shared;
  int64_t pieces = (N + COLUMNS - 1) / COLUMNS, waited = 0;
  if (!queue || pieces < 2 || pieces > 0x7fff) {
    product(out, out_by_row, x, x_by_row, packed, rows, K, N);
    return;
  }
  queue->out = out, queue->x = x, queue->packed = packed;
  queue->out_by_row = out_by_row, queue->x_by_row = x_by_row, queue->rows = rows, queue->K = K, queue->N = N;
  __atomic_store_n(&queue->done, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&queue->next, (uint64_t)pieces << 16, __ATOMIC_RELEASE);
  __atomic_store_n(&queue->posted, queue->posted + 1, __ATOMIC_RELEASE);
  take_pieces(queue);
  while (__atomic_load_n(&queue->done, __ATOMIC_ACQUIRE) < pieces) wait_a_little(&waited);
}

typedef void (*loop_function)(const loop_task *, int64_t);

typedef struct {
  loop_function loop;
  const loop_task *tasks;
} loop_run;

static void run_or_serve(void *argument, int64_t number) {
  const loop_run *const run = argument;
  const loop_task *const task = run->tasks + number;
  if (task->queue && number) {
    serve(task->queue);
    return;
  }
  run->loop(task, number);
  if (task->queue) __atomic_store_n(&((work_queue *)task->queue)->posted, -1, __ATOMIC_RELEASE);
}

/* What a run needs to know besides pointers; `run_layout` in bound.py writes it. */
typedef struct {
  int64_t inputs, buffers, totals, matrices, states, scratch_per_row, steps, batch, reverse, queued, threads;
} run_sizes;

/* Of a state its buffer, and where in it is what the first step receives and what the last one passes on, in bytes. One
   of no bytes is put there, and taken from there, by the caller. */
typedef struct {
  int64_t buffer, start, last, bytes;
} state_place;

/* Of a matrix to be packed the input, the first entry in it, and how its entries lie. */
typedef struct {
  int64_t input, first, K, N, by_row, by_column;
} matrix_place;

/* Before the first step: what it receives of the states, and matrices packed. */
static void begin(const run_sizes *sizes, const state_place *places, const matrix_place *matrices, void *const *inputs,
                  void *const *buffers, void *const *packed, int64_t pack_matrices) {
  void *const *states = inputs + sizes->inputs - sizes->states;
  for (int64_t n = 0; n < sizes->states; ++n)
    if (places[n].bytes) memcpy((char *)buffers[places[n].buffer] + places[n].start, states[n], (size_t)places[n].bytes);
  for (int64_t n = 0; n < sizes->matrices && pack_matrices; ++n) {
    const matrix_place *m = matrices + n;
    pack(packed[n], (const real *)inputs[m->input] + m->first, m->K, m->N, m->by_row, m->by_column);
  }
}

/* Returns whether the numbers were declined.
   layout: `run_sizes`; for each input how far apart its steps are, then its rows; a `state_place` for each state, a
     `matrix_place` for each matrix.
   pointers: of inputs, buffers, totals, packed matrices; for each state where the last one is wanted, or null; scratch.
   bounds: threads + 1 numbers, the rows of thread n are those from bounds[n] up to bounds[n + 1]. */
int ur_loop(loop_function loop, const int64_t *layout, void *const *pointers, const int64_t *offsets,
            const int64_t *bounds, int64_t pack_matrices, int64_t first, int64_t last, team run) {
  const run_sizes *const sizes = (const run_sizes *)layout;
  const int64_t *const by_step = (const int64_t *)(sizes + 1), *const by_row = by_step + sizes->inputs;
  const state_place *const places = (const state_place *)(by_row + sizes->inputs);
  const matrix_place *const matrices = (const matrix_place *)(places + sizes->states);
  void *const *const buffers = pointers + sizes->inputs, *const *const totals = buffers + sizes->buffers;
  void *const *const packed = totals + sizes->totals, *const *const lasts = packed + sizes->matrices;
  char *const scratch = lasts[sizes->states];
  loop_task tasks[MOST_PARTS];
  work_queue queue = {0};
  int64_t declined = 0;
  if (first == 0) begin(sizes, places, matrices, pointers, buffers, packed, pack_matrices);
  for (int64_t n = 0; n < sizes->threads; ++n)
    tasks[n] = (loop_task){pointers, by_step, by_row, buffers, (real *const *)totals, (const real *const *)packed,
                           scratch + bounds[n] * sizes->scratch_per_row, offsets, sizes->queued ? &queue : 0,
                           sizes->steps, sizes->batch, sizes->reverse, first, last, bounds[n], bounds[n + 1], &declined,
                           queued_product, add_rows, convolve};
  share(run, run_or_serve, &(loop_run){loop, tasks}, sizes->threads);
  for (int64_t n = 0; n < sizes->states && last == sizes->steps; ++n)
    if (lasts[n]) memcpy(lasts[n], (char *)buffers[places[n].buffer] + places[n].last, (size_t)places[n].bytes);
  return (int)declined;
}
