/* Places of entries x[0], x[by], ..., of which there are n. NaN is the largest, and which of two equal ones comes first
   is said by their places. Those called `apart` stand for an order in which torch leaves that to its algorithm: they
   decline numbers that are tied.

   This file is read twice: for floating-point numbers, and for integers. */

#ifndef ENTRY
#define ENTRY real
#define NAMED(name) name##_of_reals
#else
#undef ENTRY
#undef NAMED
#define ENTRY int64_t
#define NAMED(name) name##_of_integers
#endif
#define PLACES(name) \
  static inline void NAMED(name)(int64_t *y, const ENTRY *x, int64_t by, int64_t n, int64_t m, int64_t *declined)

INLINE int NAMED(above)(ENTRY a, ENTRY b) { return a > b || (a != a && b == b); }

PLACES(argmax) {
  int64_t at = 0;
  for (int64_t i = 1; i < n; ++i)
    if (NAMED(above)(x[i * by], x[at * by])) at = i;
  (void)m, (void)declined, *y = at;
}

PLACES(argmin) {
  int64_t at = 0;
  for (int64_t i = 1; i < n; ++i)
    if (x[i * by] < x[at * by] || (x[i * by] != x[i * by] && x[at * by] == x[at * by])) at = i;
  (void)m, (void)declined, *y = at;
}

/* Of equal ones the last. */
PLACES(cummax) {
  for (int64_t i = 0, at = 0; i < n; y[i++] = at) {
    ENTRY a = x[at * by], b = x[i * by];
    if (!(a > b) && (a == a || b != b)) at = i;
  }
  (void)m, (void)declined;
}

PLACES(cummin) {
  for (int64_t i = 0, at = 0; i < n; y[i++] = at) {
    ENTRY a = x[at * by], b = x[i * by];
    if (!(a < b) && (a == a || b != b)) at = i;
  }
  (void)m, (void)declined;
}

/* Whether entry i comes before entry j. */
INLINE int NAMED(before)(const ENTRY *x, int64_t by, int64_t i, int64_t j, int down) {
  ENTRY a = down ? x[j * by] : x[i * by], b = down ? x[i * by] : x[j * by];
  return NAMED(above)(b, a) || (!NAMED(above)(a, b) && i < j);
}

/* Puts the root of a heap in its place; above all others in it is what comes last. */
static inline void NAMED(sift)(int64_t *y, int64_t root, int64_t size, const ENTRY *x, int64_t by, int down) {
  for (int64_t child; (child = 2 * root + 1) < size; root = child) {
    child += child + 1 < size && NAMED(before)(x, by, y[child], y[child + 1], down);
    if (!NAMED(before)(x, by, y[root], y[child], down)) return;
    int64_t moved = y[root];
    y[root] = y[child], y[child] = moved;
  }
}

/* The m that come first, in order (a heap sort). Returns the one that comes next, -1 if there is none. */
static inline int64_t NAMED(first)(int64_t *y, const ENTRY *x, int64_t by, int64_t n, int64_t m, int down) {
  int64_t next = -1;
  for (int64_t i = 0; i < m; ++i) y[i] = i;
  for (int64_t i = m / 2; i-- > 0;) NAMED(sift)(y, i, m, x, by, down);
  for (int64_t i = m; i < n && m; ++i) {
    int64_t out = i;
    if (NAMED(before)(x, by, i, y[0], down)) out = y[0], y[0] = i, NAMED(sift)(y, 0, m, x, by, down);
    if (next < 0 || NAMED(before)(x, by, out, next, down)) next = out;
  }
  for (int64_t i = m - 1; i > 0; --i) {
    int64_t last = y[0];
    y[0] = y[i], y[i] = last, NAMED(sift)(y, 0, i, x, by, down);
  }
  return next;
}

INLINE void NAMED(decline_ties)(const ENTRY *x, int64_t by, int64_t i, int64_t j, int64_t *declined) {
  if (!NAMED(above)(x[i * by], x[j * by]) && !NAMED(above)(x[j * by], x[i * by])) decline(declined);
}

INLINE void NAMED(apart)(int64_t *y, const ENTRY *x, int64_t by, int64_t n, int64_t m, int down, int64_t *declined) {
  int64_t next = NAMED(first)(y, x, by, n, m, down);
  for (int64_t i = 1; i < m; ++i) NAMED(decline_ties)(x, by, y[i - 1], y[i], declined);
  if (next >= 0) NAMED(decline_ties)(x, by, y[m - 1], next, declined);
}

PLACES(sorted_up) { (void)declined, NAMED(first)(y, x, by, n, m, 0); }
PLACES(sorted_down) { (void)declined, NAMED(first)(y, x, by, n, m, 1); }
PLACES(sorted_up_apart) { NAMED(apart)(y, x, by, n, m, 0, declined); }
PLACES(sorted_down_apart) { NAMED(apart)(y, x, by, n, m, 1, declined); }

/* Of two in the middle the lower one; NaN if there is one. */
PLACES(median) {
  int64_t middle = (n - 1) / 2;
  (void)m, *y = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i * by] == x[i * by]) continue;
    *y = i;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t below = 0, alike = 0;
    for (int64_t j = 0; j < n; ++j) below += x[j * by] < x[i * by], alike += x[j * by] == x[i * by];
    if (below > middle || below + alike <= middle) continue;
    if (alike > 1) decline(declined);
    *y = i;
    return;
  }
}

/* How many sorted entries come before a number: the search is torch's, for what is not sorted too. */
INLINE int64_t NAMED(lower_bound)(const ENTRY *x, int64_t by, int64_t n, ENTRY wanted) {
  int64_t start = 0, end = n;
  while (start < end) {
    int64_t middle = start + ((end - start) >> 1);
    if (x[middle * by] >= wanted) end = middle; else start = middle + 1;
  }
  return start;
}

INLINE int64_t NAMED(upper_bound)(const ENTRY *x, int64_t by, int64_t n, ENTRY wanted) {
  int64_t start = 0, end = n;
  while (start < end) {
    int64_t middle = start + ((end - start) >> 1);
    if (x[middle * by] > wanted) end = middle; else start = middle + 1;
  }
  return start;
}

#undef PLACES
