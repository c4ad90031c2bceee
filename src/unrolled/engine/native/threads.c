
/* Threads. Work in parts is shared by a team: torch's own (GOMP_parallel), whose threads wait for work on the cores that
   we want, or threads of ours where there is none. Each takes the next part that nobody has taken. */

#include <pthread.h>

typedef void (*team)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
  void (*work)(void *, int64_t);
  void *argument;
  int64_t parts, next;
} shared_work;

static void take_parts(void *argument) {
  shared_work *shared = argument;
  int64_t part;
  while ((part = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED)) < shared->parts)
    shared->work(shared->argument, part);
}

static void *take_parts_in_thread(void *argument) {
  take_parts(argument);
  return 0;
}

#define MOST_PARTS 64

static void share(team run, void (*work)(void *, int64_t), void *argument, int64_t parts) {
  shared_work shared = {work, argument, parts, 0};
  pthread_t started[MOST_PARTS];
  int alive = 0;
  if (run && parts > 1) {
    run(take_parts, &shared, (unsigned)parts, 0);
    return;
  }
  for (int64_t n = 1; n < parts; ++n)
    if (pthread_create(&started[alive], 0, take_parts_in_thread, &shared) == 0) ++alive;
  take_parts(&shared);
  for (int n = 0; n < alive; ++n) pthread_join(started[n], 0);
}
