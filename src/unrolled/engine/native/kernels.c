/* What every emitted loop begins with: the type of numbers, their functions, and what a loop is called with.

   The functions are free of branches, so that the compiler turns loops over them into vector instructions. They
   propagate NaN, and are good to about two units in the last place. Coefficients: Cephes (S. Moshier). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if REAL_IS_FLOAT
typedef float real;
typedef int32_t bits;
#define FN(name) name##f
#define ABS fabsf
#define SQRT sqrtf
#define EXPM1 expm1f
#define RINT rintf
#define POW powf
#else
typedef double real;
typedef int64_t bits;
#define FN(name) name
#define ABS fabs
#define SQRT sqrt
#define EXPM1 expm1
#define RINT rint
#define POW pow
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

INLINE real from_bits(bits b) { real r; memcpy(&r, &b, sizeof r); return r; }
INLINE bits to_bits(real r) { bits b; memcpy(&b, &r, sizeof b); return b; }

#if REAL_IS_FLOAT
INLINE real power_of_two(bits n) { return from_bits((bits)((uint32_t)(n + 127) << 23)); }

INLINE real ur_exp(real x) {
  real c = x < -104.0f ? -104.0f : x;
  c = c > 89.0f ? 89.0f : c;
  real shifted = c * 1.44269504088896341f + 12582912.0f;
  bits n = (bits)((uint32_t)to_bits(shifted) - (uint32_t)to_bits(12582912.0f));
  real k = shifted - 12582912.0f;
  real r = c - k * 0.693359375f - k * -2.12194440e-4f;
  real p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  bits half = n >> 1;
  return p * power_of_two(half) * power_of_two(n - half);
}

INLINE real ur_tanh(real x) {
  real z = x * x;
  real p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  real near = p * z * x + x;
  real a = ABS(x);
  real far = 1.0f - 2.0f / (ur_exp(2.0f * a) + 1.0f);
  far = x < 0.0f ? -far : far;
  return a < 0.625f ? near : far;
}

INLINE real ur_log(real x) {
  real scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;
  bits b = to_bits(scaled);
  bits e = ((b >> 23) & 255) - 126;
  real m = from_bits((b & 0x807fffff) | 0x3f000000);
  e = x < 1.17549435e-38f ? e - 23 : e;
  bits low = m < 0.707106781186547524f;
  e -= low;
  m = low ? m + m - 1.0f : m - 1.0f;
  real z = m * m, k = (real)e;
  real p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  real y = p * m * z - 2.12194440e-4f * k - 0.5f * z;
  real result = m + y + 0.693359375f * k;
  result = x == INFINITY ? x : result;
  result = x == 0.0f ? -INFINITY : result;
  return x < 0.0f || x != x ? NAN : result;
}
#else
INLINE real power_of_two(bits n) { return from_bits((bits)((uint64_t)(n + 1023) << 52)); }

INLINE real ur_exp(real x) {
  real c = x < -746.0 ? -746.0 : x;
  c = c > 710.0 ? 710.0 : c;
  real shifted = c * 1.4426950408889634073599 + 6755399441055744.0;
  bits n = (bits)((uint64_t)to_bits(shifted) - (uint64_t)to_bits(6755399441055744.0));
  real k = shifted - 6755399441055744.0;
  real r = c - k * 6.93145751953125e-1 - k * 1.42860682030941723212e-6;
  real z = r * r;
  real p = ((1.26177193074810590878e-4 * z + 3.02994407707441961300e-2) * z + 9.99999999999999999910e-1) * r;
  real q = ((3.00198505138664455042e-6 * z + 2.52448340349684104192e-3) * z + 2.27265548208155028766e-1) * z + 2.0;
  real e = 1.0 + 2.0 * (p / (q - p));
  bits half = n >> 1;
  return e * power_of_two(half) * power_of_two(n - half);
}

INLINE real ur_tanh(real x) {
  real z = x * x;
  real p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  real q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  real near = x + x * z * (p / q);
  real a = ABS(x);
  real far = 1.0 - 2.0 / (ur_exp(2.0 * a) + 1.0);
  far = x < 0.0 ? -far : far;
  return a < 0.625 ? near : far;
}

INLINE real ur_log(real x) { return log(x); }
#endif

INLINE real ur_sigmoid(real x) { return 1 / (1 + ur_exp(-x)); }

INLINE real ur_log1p(real x) {
#if REAL_IS_FLOAT
  /* W. Kahan: log(1 + x) times the factor that undoes the rounding of 1 + x. */
  real u = 1 + x, d = u - 1;
  real l = ur_log(u) * (x / (d == 0 ? 1 : d));
  l = d == 0 ? x : l;
  return u == INFINITY ? u : l;
#else
  return log1p(x);
#endif
}

INLINE real ur_pow(real x, real e) {
  return e == 2 ? x * x : e == 3 ? x * x * x : e == 1 ? x : e == (real)0.5 ? SQRT(x) : e == -1 ? 1 / x : POW(x, e);
}

/* As in Python: the sign of the divisor. */
INLINE real ur_remainder(real a, real b) {
  real r = FN(fmod)(a, b);
  return (r != 0) & ((b < 0) != (r < 0)) ? r + b : r;
}

INLINE real ur_floor_divide(real a, real b) {
  real r = FN(fmod)(a, b), q = (a - r) / b;
  q = (r != 0) & ((b < 0) != (r < 0)) ? q - 1 : q;
  real f = FN(floor)(q);
  f = q - f > (real)0.5 ? f + 1 : f;
  f = q == 0 ? FN(copysign)(0, a / b) : f;
  return b == 0 ? a / b : f;
}

INLINE real ur_clamp(real x, real low, real high) {
  x = x < low ? low : x; /* a bound that is not there is NaN, and compares false */
  return x > high ? high : x;
}

#ifndef LANES
#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#endif
#define PANEL (2 * LANES)
typedef real lanes __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

/* Reductions along a run of entries. */

typedef real short_lanes __attribute__((vector_size(16), aligned(sizeof(real)), may_alias));

/* The sum of a vector's lanes, halves first: one after the other they would wait for each other. */
INLINE real sum_of_lanes(lanes v) {
  union {
    lanes all;
    short_lanes parts[VECTOR_BYTES / 16];
  } of = {v};
  for (int half = VECTOR_BYTES / 32; half; half /= 2)
    for (int l = 0; l < half; ++l) of.parts[l] += of.parts[l + half];
#if REAL_IS_FLOAT
  return (of.parts[0][0] + of.parts[0][2]) + (of.parts[0][1] + of.parts[0][3]);
#else
  return of.parts[0][0] + of.parts[0][1];
#endif
}

INLINE real sum_of(const real *x, int64_t n) {
  lanes s[4] = {{0}, {0}, {0}, {0}};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) s[j] += *(const lanes *)(x + i + j * LANES);
  for (; i + LANES <= n; i += LANES) s[0] += *(const lanes *)(x + i);
  real total = sum_of_lanes((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < n; ++i) total += x[i];
  return total;
}

INLINE real dot(const real *x, const real *y, int64_t n) {
  lanes s[2] = {{0}, {0}};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    _Pragma("GCC unroll 2") for (int j = 0; j < 2; ++j)
      s[j] += *(const lanes *)(x + i + j * LANES) * *(const lanes *)(y + i + j * LANES);
  for (; i + LANES <= n; i += LANES) s[0] += *(const lanes *)(x + i) * *(const lanes *)(y + i);
  real total = sum_of_lanes(s[0] + s[1]);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

/* A matrix [N, K] times another [K, M], each anywhere in memory: too small to be packed. */
static NOINLINE void small_product(real *restrict out, const real *x, int64_t x_by_n, int64_t x_by_k, const real *y,
                                   int64_t y_by_k, int64_t y_by_m, int64_t N, int64_t K, int64_t M) {
  for (int64_t n = 0; n < N; ++n, x += x_by_n, out += M) {
    int64_t m = 0;
    if (y_by_m == 1) {
      for (; m + PANEL <= M; m += PANEL) {
        lanes s[2] = {{0}, {0}};
        for (int64_t k = 0; k < K; ++k)
          _Pragma("GCC unroll 2") for (int j = 0; j < 2; ++j)
            s[j] += x[k * x_by_k] * *(const lanes *)(y + k * y_by_k + m + j * LANES);
        memcpy(out + m, s, sizeof s);
      }
      for (int64_t j = m; j < M; ++j) out[j] = 0;
      for (int64_t k = 0; k < K; ++k)
        _Pragma("GCC ivdep") for (int64_t j = m; j < M; ++j) out[j] += x[k * x_by_k] * y[k * y_by_k + j];
    } else if (x_by_k == 1 && y_by_k == 1) {
      for (; m < M; ++m) out[m] = dot(x, y + m * y_by_m, K);
    } else {
      for (; m < M; ++m) {
        real total = 0;
        for (int64_t k = 0; k < K; ++k) total += x[k * x_by_k] * y[k * y_by_k + m * y_by_m];
        out[m] = total;
      }
    }
  }
}

/* NaN wins, as in torch. */
INLINE real larger(real a, real b) { return (b > a) | (b != b) ? b : a; }
INLINE real smaller(real a, real b) { return (b < a) | (b != b) ? b : a; }

typedef void (*convolution)(real *out, int64_t out_by_column, const real *x, int64_t x_by_row, const int64_t *starts,
                            int64_t runs, const real *packed, int64_t rows, int64_t K, int64_t N);

/* What one thread does: the rows from `begin` to `end`, the steps from `first` to `last`. */
typedef struct {
  void *const *inputs;
  const int64_t *by_step, *by_row;
  void *const *buffers;   /* for what is emitted at every step, and for the states */
  real *const *totals;
  const real *const *packed;
  char *scratch;
  const int64_t *offsets; /* how many rows the steps before each have, if rows end at different times */
  void *queue;            /* if the first thread owns all rows */
  int64_t steps, batch, reverse, first, last, begin, end;
  int64_t *declined;      /* set where a row has numbers that the loop has no answer for */
  /* A product, which others that serve the queue help with, a sum over rows, and what windows see times a matrix:
     compiled once, not with every loop. */
  void (*product)(void *queue, real *out, int64_t out_by_row, const real *x, int64_t x_by_row, const real *packed,
                  int64_t rows, int64_t K, int64_t N);
  void (*add_rows)(real *total, const real *x, int64_t by_row, int64_t rows, int64_t N);
  convolution convolve;
} loop_task;
