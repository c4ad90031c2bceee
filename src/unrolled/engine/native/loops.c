
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

/* What the first step receives of a state, and where it reads it. */
typedef struct {
  void *to;
  const void *from;
  int64_t bytes;
} start_of_state;

/* Returns whether the numbers were declined. bounds: threads + 1 numbers, the rows of thread n are those from bounds[n]
   up to bounds[n + 1]. */
int ur_loop(loop_function loop, void *const *inputs, const int64_t *by_step, const int64_t *by_row,
            void *const *buffers, real *const *totals, const real *const *packed, char *scratch,
            const int64_t *offsets, const int64_t *bounds, const start_of_state *starts, int64_t states,
            int64_t scratch_per_row, int64_t steps, int64_t batch, int64_t reverse, int64_t first, int64_t last,
            int64_t queued, int64_t threads, team run) {
  loop_task tasks[MOST_PARTS];
  work_queue queue = {0};
  int64_t declined = 0;
  for (int64_t n = 0; n < states && first == 0; ++n) memcpy(starts[n].to, starts[n].from, (size_t)starts[n].bytes);
  for (int64_t n = 0; n < threads; ++n)
    tasks[n] = (loop_task){inputs, by_step, by_row, buffers, totals, packed, scratch + bounds[n] * scratch_per_row,
                           offsets, queued ? &queue : 0, steps, batch, reverse, first, last, bounds[n], bounds[n + 1],
                           &declined, queued_product, add_rows, convolve};
  share(run, run_or_serve, &(loop_run){loop, tasks}, threads);
  return (int)declined;
}
