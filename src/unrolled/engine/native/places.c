/* Integers, and places that are computed. A loop may be asked what it has no answer for: a division by zero, an index
   out of range. It then declines the numbers. It goes on without touching memory that is not its own, its results are
   thrown away, and torch does all of the call. */

INLINE void decline(int64_t *declined) { __atomic_store_n(declined, 1, __ATOMIC_RELAXED); }

/* Zero, if x is a probability. */
INLINE real probable(real x, int64_t *declined) {
  if (!(x >= 0 && x <= 1)) decline(declined);
  return 0;
}

/* Where index k of n lies. */
INLINE int64_t place_of(int64_t k, int64_t n, int from_end, int64_t *declined) {
  k = from_end && k < 0 ? k + n : k;
  if (k >= 0 && k < n) return k;
  decline(declined);
  return 0;
}

/* A floating-point number cut off, as a cast has it: what an integer cannot hold, and NaN, is the least one, as the
   instruction that torch uses has it. C itself leaves that open. Fewer bits than these are then cut off. */
INLINE int32_t int32_of(real x) { return x > (real)INT32_MIN - 1 && x < -(real)INT32_MIN ? (int32_t)x : INT32_MIN; }
INLINE int64_t int64_of(real x) { return x >= (real)INT64_MIN && x < -(real)INT64_MIN ? (int64_t)x : INT64_MIN; }

/* Integers wrap around. */

INLINE int64_t int_add(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
INLINE int64_t int_sub(int64_t a, int64_t b) { return (int64_t)((uint64_t)a - (uint64_t)b); }
INLINE int64_t int_mul(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }

INLINE int64_t int_trunc_divide(int64_t a, int64_t b, int64_t *declined) {
  if (b == 0) decline(declined);
  return b == 0 ? 0 : b == -1 ? int_sub(0, a) : a / b;
}

INLINE int64_t int_fmod(int64_t a, int64_t b, int64_t *declined) {
  if (b == 0) decline(declined);
  return b == 0 || b == -1 ? 0 : a % b;
}

/* As in Python: the sign of the divisor. */
INLINE int64_t int_remainder(int64_t a, int64_t b, int64_t *declined) {
  int64_t r = int_fmod(a, b, declined);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

INLINE int64_t int_floor_divide(int64_t a, int64_t b, int64_t *declined) {
  int64_t q = int_trunc_divide(a, b, declined);
  return b != 0 && b != -1 && a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

INLINE int64_t int_shift_left(int64_t a, int64_t by, int64_t size) {
  return by < 0 || by >= size ? 0 : (int64_t)((uint64_t)a << by);
}

INLINE int64_t int_shift_right(int64_t a, int64_t by, int64_t size) {
  return a >> (by < 0 || by >= size ? 63 : by);
}

INLINE int64_t int_power(int64_t a, int64_t e) {
  int64_t result = 1;
  if (e < 0) return a == 1 ? 1 : a == -1 ? (e % 2 ? -1 : 1) : 0;
  for (; e; e >>= 1, a = int_mul(a, a))
    if (e & 1) result = int_mul(result, a);
  return result;
}

INLINE double log_of_sum(double a, double b) {
  double low = b < a ? b : a, high = b < a ? a : b;
  if (a != a || b != b) return a + b;
  return low == high && isinf(low) ? a : log1p(exp(low - high)) + high;
}
