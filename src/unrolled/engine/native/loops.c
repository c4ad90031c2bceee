
/* What runs a walk through time: a team, each of whose parts owns some rows of the batch for all steps. */

typedef struct {
  void *const *leaves;
  const int64_t *by_step, *by_row;
  void *const *emitted;
  real *const *totals;
  const real *const *packed;
  char *scratch;
  const int64_t *offsets; /* how many rows the steps before each have, if rows end at different times */
  int64_t steps, batch, reverse, first, last, begin, end;
} task;

int ur_loop(void (*walk)(void *, int64_t), void *const *leaves, const int64_t *by_step, const int64_t *by_row,
            void *const *emitted, real *const *totals, const real *const *packed, char *scratch,
            const int64_t *offsets, const int64_t *bounds, int64_t scratch_per_row, int64_t steps, int64_t batch,
            int64_t reverse, int64_t first, int64_t last, int64_t threads, team run) {
  task tasks[MOST_PARTS];
  for (int64_t n = 0; n < threads; ++n)
    tasks[n] = (task){leaves, by_step, by_row, emitted, totals, packed, scratch + bounds[n] * scratch_per_row,
                      offsets, steps, batch, reverse, first, last, bounds[n], bounds[n + 1]};
  share(run, walk, tasks, threads);
  return 0;
}
