
/* What runs a walk through time: a team, each of whose parts owns some rows of the batch for all steps. With one or two
   rows and large matrices one part walks, and the others help it with its products. */

#include <sched.h>

#define COLUMNS (4 * PANEL)  /* of a product that are taken at once */

typedef struct {
  int64_t posted;  /* products so far; negative when there will be no more */
  uint64_t next;   /* of the current product: how many pieces it has, and the next one */
  int64_t done;    /* pieces of it */
  real *out;
  const real *x, *packed;
  int64_t out_by_row, x_by_row, rows, K, N;
} helped;

/* Takes pieces of the current product until none is left. While a piece is not done the product stays the current one,
   so that its operands may be read; who comes late finds none left, or pieces of the next product, whose operands were
   written before. */
static void take_pieces(helped *h) {
  for (;;) {
    uint64_t taken = __atomic_fetch_add(&h->next, 1, __ATOMIC_ACQ_REL);
    int64_t piece = (int64_t)(taken & 0xffff), pieces = (int64_t)(taken >> 16 & 0xffff), n = piece * COLUMNS;
    if (piece >= pieces) return;
    int64_t columns = h->N - n < COLUMNS ? h->N - n : COLUMNS;
    product(h->out + n, h->out_by_row, h->x, h->x_by_row, h->packed + n * h->K, h->rows, h->K, columns);
    __atomic_fetch_add(&h->done, 1, __ATOMIC_RELEASE);
  }
}

static void wait_a_little(int64_t *waited) {
  if (++*waited > 4096) sched_yield();
}

static void help(helped *h) {
  int64_t seen = 0, posted, waited = 0;
  while ((posted = __atomic_load_n(&h->posted, __ATOMIC_ACQUIRE)) >= 0) {
    if (posted == seen) {
      wait_a_little(&waited);
      continue;
    }
    seen = posted, waited = 0;
    take_pieces(h);
  }
}

static void product_with(helped *h, real *out, int64_t out_by_row, const real *x, int64_t x_by_row, const real *packed,
                         int64_t rows, int64_t K, int64_t N) {
  int64_t pieces = (N + COLUMNS - 1) / COLUMNS, waited = 0;
  if (!h || pieces < 2 || pieces > 0x7fff) {
    product(out, out_by_row, x, x_by_row, packed, rows, K, N);
    return;
  }
  h->out = out, h->x = x, h->packed = packed;
  h->out_by_row = out_by_row, h->x_by_row = x_by_row, h->rows = rows, h->K = K, h->N = N;
  __atomic_store_n(&h->done, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&h->next, (uint64_t)pieces << 16, __ATOMIC_RELEASE);
  __atomic_store_n(&h->posted, h->posted + 1, __ATOMIC_RELEASE);
  take_pieces(h);
  while (__atomic_load_n(&h->done, __ATOMIC_ACQUIRE) < pieces) wait_a_little(&waited);
}

typedef struct {
  void *const *leaves;
  const int64_t *by_step, *by_row;
  void *const *emitted;
  real *const *totals;
  const real *const *packed;
  char *scratch;
  const int64_t *offsets; /* how many rows the steps before each have, if rows end at different times */
  helped *helped;         /* where the others help the first part, none of which owns a row */
  int64_t steps, batch, reverse, first, last, begin, end;
} task;

typedef struct {
  void (*walk)(const task *, int64_t);
  const task *tasks;
} walks;

static void walk_or_help(void *argument, int64_t number) {
  const walks *const all = argument;
  const task *const w = all->tasks + number;
  if (w->helped && number) {
    help(w->helped);
    return;
  }
  all->walk(w, number);
  if (w->helped) __atomic_store_n(&w->helped->posted, -1, __ATOMIC_RELEASE);
}

int ur_loop(void (*walk)(const task *, int64_t), void *const *leaves, const int64_t *by_step, const int64_t *by_row,
            void *const *emitted, real *const *totals, const real *const *packed, char *scratch,
            const int64_t *offsets, const int64_t *bounds, int64_t scratch_per_row, int64_t steps, int64_t batch,
            int64_t reverse, int64_t first, int64_t last, int64_t helpers, int64_t threads, team run) {
  task tasks[MOST_PARTS];
  helped help = {0};
  for (int64_t n = 0; n < threads; ++n)
    tasks[n] = (task){leaves, by_step, by_row, emitted, totals, packed, scratch + bounds[n] * scratch_per_row,
                      offsets, helpers ? &help : 0, steps, batch, reverse, first, last, bounds[n], bounds[n + 1]};
  share(run, walk_or_help, &(walks){walk, tasks}, threads);
  return 0;
}
