/* Special functions that C has not, in double precision. */

#define SPECIAL static inline NOINLINE

/* Recurrence up to 10, from there on the asymptotic series; reflection below zero. */
SPECIAL double digamma(double x) {
  static const double series[] = {1.0 / 12, -1.0 / 120, 1.0 / 252, -1.0 / 240, 1.0 / 132, -691.0 / 32760, 1.0 / 12};
  double shift = 0, sum = 0;
  if (x == 0) return copysign(INFINITY, -x);
  if (x < 0 && x == trunc(x)) return NAN;
  if (x < 0) {
    shift = -M_PI / tan(M_PI * (x - trunc(x)));
    x = 1 - x;
  }
  for (; x < 10; x += 1) shift -= 1 / x;
  double z = 1 / (x * x);
  for (int k = 6; k >= 0; k--) sum = (sum + series[k]) * z;
  return shift + log(x) - 0.5 / x - sum;
}

/* The derivative of digamma, with as many terms as torch takes. */
SPECIAL double trigamma(double x) {
  double sign = 1, sum = 0;
  if (x < 0.5) {
    double s = sin(M_PI * x);
    sign = -1, sum = -(M_PI * M_PI) / (s * s), x = 1 - x;
  }
  for (int k = 0; k < 6; k++, x += 1) sum += 1 / (x * x);
  double z = 1 / (x * x);
  return sign * (sum + (1 + 1 / (2 * x) + z * (1.0 / 6 - z * (1.0 / 30 - z * (1.0 / 42)))) / x);
}

/* exp(-|x|) times the modified Bessel function of order 0 or 1: the power series, far out the asymptotic one. */
SPECIAL double scaled_bessel(int order, double x) {
  double a = fabs(x), term = 1, sum = 1;
  if (a <= 30) {
    for (int k = 1; term > 1e-17 * sum; k++) sum += term *= a * a / 4 / (k * (double)(k + order));
    sum *= exp(-a) * (order ? a / 2 : 1);
  } else {
    for (int k = 1; k < 60 && fabs(term) > 1e-17; k++)
      sum += term *= ((2 * k - 1.0) * (2 * k - 1.0) - 4 * order) / (8 * k * a);
    sum /= sqrt(2 * M_PI * a);
  }
  return order && x < 0 ? -sum : sum;
}

/* Rational functions, and two steps of Newton's method. Source: G. Pavlis, after Matlab's erfinv. */
SPECIAL double erf_inverse(double y) {
  double a = fabs(y), x;
  if (!(a <= 1)) return NAN;
  if (a == 1) return copysign(INFINITY, y);
  if (a <= 0.7) {
    double z = y * y;
    x = y * (((-0.140543331 * z + 0.914624893) * z - 1.645349621) * z + 0.886226899) /
        ((((0.012229801 * z - 0.329097515) * z + 1.442710462) * z - 2.118377725) * z + 1);
  } else {
    double z = sqrt(-log((1 - a) / 2));
    x = copysign(((1.641345311 * z + 3.429567803) * z - 1.624906493) * z - 1.970840454, y) /
        ((1.637067800 * z + 3.543889200) * z + 1);
  }
  for (int step = 0; step < 2; step++) x -= (erf(x) - y) / (M_2_SQRTPI * exp(-x * x));
  return x;
}

SPECIAL double log2_of_sum(double a, double b) {
  return isinf(a) && a == b ? a : fmax(a, b) + log1p(exp2(-fabs(a - b))) * M_LOG2E;
}
