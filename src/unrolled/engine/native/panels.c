
/* Products. A matrix [K, N] is packed once a call into panels of PANEL columns, so that a panel is read from one end to
   the other. A block of rows is multiplied with a panel in registers. */

/* ROWS rows of x times a panel. It starts from what `start` points at, or from zero; compiled for constant strides. */
INLINE void block(const int ROWS, real *out, int64_t out_by_row, const real *x, int64_t x_by_row, int64_t x_by_k,
                  const real *packed, int64_t K, int64_t columns, const real *start, int64_t start_by_row) {
  lanes sum[ROW_BLOCK][2];
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = sum[r][1] = (lanes){0};
    if (start && columns == PANEL) {
      sum[r][0] = *(const lanes *)(start + r * start_by_row);
      sum[r][1] = *(const lanes *)(start + r * start_by_row + LANES);
    } else if (start) {
      memcpy(sum[r], start + r * start_by_row, (size_t)columns * sizeof(real));
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    lanes a = *(const lanes *)(packed + k * PANEL), b = *(const lanes *)(packed + k * PANEL + LANES);
    _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) {
      real f = x[r * x_by_row + k * x_by_k];
      sum[r][0] += f * a;
      sum[r][1] += f * b;
    }
  }
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) {
    if (columns == PANEL) {
      *(lanes *)(out + r * out_by_row) = sum[r][0];
      *(lanes *)(out + r * out_by_row + LANES) = sum[r][1];
    } else {
      memcpy(out + r * out_by_row, sum[r], (size_t)columns * sizeof(real));
    }
  }
}

#if ROW_BLOCK == 12
#define FOR_EACH_BLOCK(B) B(1) B(2) B(3) B(4) B(5) B(6) B(7) B(8) B(9) B(10) B(11) B(12)
#elif ROW_BLOCK == 6
#define FOR_EACH_BLOCK(B) B(1) B(2) B(3) B(4) B(5) B(6)
#else
#define FOR_EACH_BLOCK(B) B(1) B(2) B(3) B(4)
#endif

#define ROWS_OF_STATE(R)                                                                                     \
  static void block_##R(real *out, int64_t out_by_row, const real *x, int64_t x_by_row, const real *packed,  \
                        int64_t K, int64_t columns) {                                                        \
    block(R, out, out_by_row, x, x_by_row, 1, packed, K, columns, 0, 0);                                     \
  }
FOR_EACH_BLOCK(ROWS_OF_STATE)

typedef void (*block_function)(real *, int64_t, const real *, int64_t, const real *, int64_t, int64_t);
#define NAME_OF_BLOCK(R) block_##R,
static const block_function blocks[] = {0, FOR_EACH_BLOCK(NAME_OF_BLOCK)};

/* Rows of a convolution: each has several runs of K entries, whose first ones lie at `starts`. The sums stay in registers
   from run to run, and are written column by column. */
INLINE void block_of_runs(const int ROWS, real *out, int64_t out_by_column, const real *x, int64_t x_by_row,
                          const int64_t *starts, int64_t runs, const real *packed, int64_t K, int64_t columns) {
  lanes sum[ROW_BLOCK][2];
  _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = (lanes){0};
  for (int64_t run = 0; run < runs; ++run) {
    const real *const from = x + starts[run];
    for (int64_t k = 0; k < K; ++k, packed += PANEL) {
      lanes a = *(const lanes *)packed, b = *(const lanes *)(packed + LANES);
      _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; ++r) {
        real f = from[r * x_by_row + k];
        sum[r][0] += f * a;
        sum[r][1] += f * b;
      }
    }
  }
  for (int64_t n = 0; n < columns; ++n)
    for (int r = 0; r < ROWS; ++r) out[n * out_by_column + r] = sum[r][n / LANES][n % LANES];
}

#define ROWS_OF_WINDOWS(R)                                                                                       \
  static void windows_##R(real *out, int64_t out_by_column, const real *x, int64_t x_by_row, const int64_t *starts, \
                          int64_t runs, const real *packed, int64_t K, int64_t columns) {                        \
    block_of_runs(R, out, out_by_column, x, x_by_row, starts, runs, packed, K, columns);                            \
  }
FOR_EACH_BLOCK(ROWS_OF_WINDOWS)

typedef void (*windows_function)(real *, int64_t, const real *, int64_t, const int64_t *, int64_t, const real *,
                                 int64_t, int64_t);
#define NAME_OF_WINDOWS(R) windows_##R,
static const windows_function windows[] = {0, FOR_EACH_BLOCK(NAME_OF_WINDOWS)};

static void convolve(real *out, int64_t out_by_column, const real *x, int64_t x_by_row, const int64_t *starts,
                     int64_t runs, const real *packed, int64_t rows, int64_t K, int64_t N) {
  int64_t pieces = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  for (int64_t n = 0; n < N; n += PANEL, packed += runs * K * PANEL)
    for (int64_t piece = 0, r = 0; piece < pieces; ++piece) {
      int64_t many = (rows - r + pieces - piece - 1) / (pieces - piece);
      windows[many](out + n * out_by_column + r, out_by_column, x + r * x_by_row, x_by_row, starts, runs, packed, K,
                    N - n < PANEL ? N - n : PANEL);
      r += many;
    }
}

/* One or two rows with several panels at once: enough sums in flight to hide the latency of an addition. */
INLINE void panels(const int ROWS, const int PANELS, real *out, int64_t out_by_row, const real *x, int64_t x_by_row,
                   const real *packed, int64_t K) {
  lanes sum[2][4][2];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) sum[r][p][0] = sum[r][p][1] = (lanes){0};
  for (int64_t k = 0; k < K; ++k)
    _Pragma("GCC unroll 4") for (int p = 0; p < PANELS; ++p) {
      const real *at = packed + (p * K + k) * PANEL;
      lanes a = *(const lanes *)at, b = *(const lanes *)(at + LANES);
      _Pragma("GCC unroll 2") for (int r = 0; r < ROWS; ++r) {
        sum[r][p][0] += x[r * x_by_row + k] * a;
        sum[r][p][1] += x[r * x_by_row + k] * b;
      }
    }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) {
      *(lanes *)(out + r * out_by_row + p * PANEL) = sum[r][p][0];
      *(lanes *)(out + r * out_by_row + p * PANEL + LANES) = sum[r][p][1];
    }
}

static void one_or_two(real *out, int64_t out_by_row, const real *x, int64_t x_by_row, const real *packed, int64_t rows,
                       int64_t K, int64_t N) {
  int64_t n = 0;
  if (rows == 1)
    for (; n + 4 * PANEL <= N; n += 4 * PANEL) panels(1, 4, out + n, 0, x, 0, packed + n * K, K);
  else
    for (; n + 2 * PANEL <= N; n += 2 * PANEL) panels(2, 2, out + n, out_by_row, x, x_by_row, packed + n * K, K);
  for (; n < N; n += PANEL)
    blocks[rows](out + n, out_by_row, x, x_by_row, packed + n * K, K, N - n < PANEL ? N - n : PANEL);
}

static void product(real *out, int64_t out_by_row, const real *x, int64_t x_by_row, const real *packed, int64_t rows,
                    int64_t K, int64_t N) {
  if (rows <= 2) {
    one_or_two(out, out_by_row, x, x_by_row, packed, rows, K, N);
    return;
  }
  for (int64_t n = 0; n < N; n += PANEL, packed += K * PANEL) {
    int64_t columns = N - n < PANEL ? N - n : PANEL;
    int64_t pieces = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    for (int64_t piece = 0, r = 0; piece < pieces; ++piece) {
      int64_t many = (rows - r + pieces - piece - 1) / (pieces - piece);
      blocks[many](out + r * out_by_row + n, out_by_row, x + r * x_by_row, x_by_row, packed, K, columns);
      r += many;
    }
  }
}

/* Adds N columns of some rows to a total: first the rows, then their sum, so that less is lost to rounding. */
static void add_rows(real *total, const real *x, int64_t by_row, int64_t rows, int64_t N) {
  int64_t n = 0;
  for (; n + 2 * LANES <= N; n += 2 * LANES) {
    lanes s[2] = {{0}, {0}};
    for (int64_t b = 0; b < rows; ++b) {
      s[0] += *(const lanes *)(x + b * by_row + n);
      s[1] += *(const lanes *)(x + b * by_row + n + LANES);
    }
    *(lanes *)(total + n) += s[0];
    *(lanes *)(total + n + LANES) += s[1];
  }
  for (; n < N; ++n) {
    real s = 0;
    for (int64_t b = 0; b < rows; ++b) s += x[b * by_row + n];
    total[n] += s;
  }
}
