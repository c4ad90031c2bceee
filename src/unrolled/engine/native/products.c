
/* Products of large matrices, for what is hoisted out of a loop: out[M, N] = x[M, K] y[K, N] (+ bias[N]).

   K is cut into pieces, so that a panel of y stays in the first cache and some rows of x in the second. The parts of a
   team have rows of out each; or, if there are few of them and K is long, a piece of K, whose results are added up in
   order. */

typedef bits int_lanes __attribute__((vector_size(VECTOR_BYTES)));

/* Columns of a matrix, side by side: LANES entries of LANES columns at a time are transposed in registers. At each
   stage pairs of vectors exchange the entries whose index differs in one bit. */
INLINE void transpose(lanes *v) {
  for (int bit = 1; bit < LANES; bit *= 2) {
    int_lanes low, high;
    for (int l = 0; l < LANES; ++l) low[l] = l & bit ? LANES + l - bit : l, high[l] = l & bit ? LANES + l : l + bit;
    for (int i = 0; i < LANES; ++i)
      if (!(i & bit)) {
        lanes a = v[i], b = v[i + bit];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + bit] = __builtin_shuffle(a, b, high);
      }
  }
}

static void pack_columns(real *packed, const real *from, int64_t K, int64_t by_column) {
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES)
    for (int half = 0; half < 2; ++half) {
      lanes v[LANES];
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i)
        v[i] = *(const lanes *)(from + (half * LANES + i) * by_column + k);
      transpose(v);
      _Pragma("GCC unroll 16") for (int i = 0; i < LANES; ++i) *(lanes *)(packed + (k + i) * PANEL + half * LANES) = v[i];
    }
  for (; k < K; ++k)
    for (int64_t n = 0; n < PANEL; ++n) packed[k * PANEL + n] = from[n * by_column + k];
}

static void pack(real *packed, const real *matrix, int64_t K, int64_t N, int64_t by_row, int64_t by_column) {
  for (int64_t n0 = 0; n0 < N; n0 += PANEL, packed += K * PANEL) {
    int64_t columns = N - n0 < PANEL ? N - n0 : PANEL;
    const real *from = matrix + n0 * by_column;
    if (columns == PANEL && by_column == 1) {
      for (int64_t k = 0; k < K; ++k) memcpy(packed + k * PANEL, from + k * by_row, PANEL * sizeof(real));
    } else if (columns == PANEL && by_row == 1) {
      pack_columns(packed, from, K, by_column);
    } else {
      memset(packed, 0, (size_t)(K * PANEL) * sizeof(real));
      for (int64_t n = 0; n < columns; ++n)
        for (int64_t k = 0; k < K; ++k) packed[k * PANEL + n] = from[k * by_row + n * by_column];
    }
  }
}

void ur_pack(real *packed, const real *matrix, int64_t K, int64_t N, int64_t by_row, int64_t by_column) {
  pack(packed, matrix, K, N, by_row, by_column);
}

int64_t ur_panel(void) { return PANEL; }

#define DEPTH 256
#define ROWS_AT_ONCE (8 * ROW_BLOCK)

typedef struct {
  real *out;
  const real *x, *y, *bias;
  int64_t begin, end, K, N, x_by_row, x_by_k, y_by_k, y_by_column;
  real *scratch;
} part;

/* x as it lies in memory if its rows do (by_k is 1), else as copied by `side_by_side`. */
#define ROWS_OF_MATRIX(R)                                                                                         \
  static void rows_##R(real *out, int64_t N, const real *x, int64_t by_row, int64_t by_k, const real *packed,     \
                       int64_t K, int64_t columns, const real *start, int64_t start_by_row) {                     \
    if (by_k == 1) block(R, out, N, x, by_row, 1, packed, K, columns, start, start_by_row);                       \
    else block(R, out, N, x, 1, ROW_BLOCK, packed, K, columns, start, start_by_row);                              \
  }
FOR_EACH_BLOCK(ROWS_OF_MATRIX)

typedef void (*rows_function)(real *, int64_t, const real *, int64_t, int64_t, const real *, int64_t, int64_t,
                              const real *, int64_t);
#define NAME_OF_ROWS(R) rows_##R,
static const rows_function rows_of[] = {0, FOR_EACH_BLOCK(NAME_OF_ROWS)};

/* Up to ROW_BLOCK rows of x, entry k of all of them side by side. */
static void side_by_side(real *to, const real *x, int64_t many, int64_t depth, int64_t by_row, int64_t by_k) {
  if (by_row == 1 && many == ROW_BLOCK) {
    for (int64_t k = 0; k < depth; ++k) memcpy(to + k * ROW_BLOCK, x + k * by_k, ROW_BLOCK * sizeof(real));
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < many; ++r) to[k * ROW_BLOCK + r] = x[r * by_row + k * by_k];
}

static void some_rows(const part *p, int64_t m0, int64_t until, int64_t k0, int64_t depth, real *copied) {
  const int64_t pieces = (until - m0 + ROW_BLOCK - 1) / ROW_BLOCK;
  int64_t from[8], many[8];
  for (int64_t piece = 0, m = m0; piece < pieces; m += many[piece++]) {
    from[piece] = m;
    many[piece] = (until - m + pieces - piece - 1) / (pieces - piece);
    const real *x = p->x + m * p->x_by_row + k0 * p->x_by_k;
    if (p->x_by_k != 1) side_by_side(copied + piece * ROW_BLOCK * DEPTH, x, many[piece], depth, p->x_by_row, p->x_by_k);
  }
  for (int64_t n = 0; n < p->N; n += PANEL)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      real *out = p->out + from[piece] * p->N + n;
      const real *x = p->x_by_k == 1 ? p->x + from[piece] * p->x_by_row + k0 : copied + piece * ROW_BLOCK * DEPTH;
      const real *start = k0 ? out : p->bias ? p->bias + n : 0;
      rows_of[many[piece]](out, p->N, x, p->x_by_row, p->x_by_k, p->scratch + n * depth, depth,
                           p->N - n < PANEL ? p->N - n : PANEL, start, k0 ? p->N : 0);
    }
}

static void multiply_part(void *parts, int64_t number) {
  const part *p = (const part *)parts + number;
  real *copied = p->scratch + DEPTH * ((p->N + PANEL - 1) / PANEL * PANEL);
  for (int64_t k0 = 0; k0 < p->K; k0 += DEPTH) {
    int64_t depth = p->K - k0 < DEPTH ? p->K - k0 : DEPTH;
    pack(p->scratch, p->y + k0 * p->y_by_k, depth, p->N, p->y_by_k, p->y_by_column);
    for (int64_t m = p->begin; m < p->end; m += ROWS_AT_ONCE)
      some_rows(p, m, m + ROWS_AT_ONCE < p->end ? m + ROWS_AT_ONCE : p->end, k0, depth, copied);
  }
}

/* How many numbers of scratch memory each part needs. */
int64_t ur_scratch(int64_t N) { return DEPTH * ((N + PANEL - 1) / PANEL * PANEL + ROWS_AT_ONCE); }

/* scratch: for each part what ur_scratch says. bias: N numbers, or null. */
void ur_multiply(real *out, const real *x, const real *y, const real *bias, real *scratch, int64_t M, int64_t K,
                 int64_t N, int64_t x_by_row, int64_t x_by_k, int64_t y_by_k, int64_t y_by_column, int64_t threads,
                 team run) {
  part parts[MOST_PARTS];
  int64_t blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK, begin = 0;
  if (threads > MOST_PARTS) threads = MOST_PARTS;
  if (threads > blocks) threads = blocks;
  for (int64_t i = 0; i < threads; ++i) {
    int64_t end = i + 1 == threads ? M : (blocks * (i + 1) / threads) * ROW_BLOCK;
    parts[i] = (part){out, x, y, bias, begin, end, K, N, x_by_row, x_by_k, y_by_k, y_by_column,
                      scratch + i * ur_scratch(N)};
    begin = end;
  }
  share(run, multiply_part, parts, threads);
}

typedef struct {
  real *out;
  const real *partial;
  int64_t pieces, size;
} addition;

static void add_part(void *additions, int64_t number) {
  const addition *a = (const addition *)additions + number;
  for (int64_t piece = 0; piece < a->pieces; ++piece) {
    const real *from = a->partial + piece * a->size;
    for (int64_t i = 0; i < a->size; ++i) a->out[i] += from[i];
  }
}

/* The same without a bias, the parts of the team having pieces of K; partial: threads - 1 times M x N numbers. */
void ur_contract(real *out, const real *x, const real *y, real *partial, real *scratch, int64_t M, int64_t K, int64_t N,
                 int64_t x_by_row, int64_t x_by_k, int64_t y_by_k, int64_t y_by_column, int64_t threads, team run) {
  part parts[MOST_PARTS];
  if (threads > MOST_PARTS) threads = MOST_PARTS;
  for (int64_t i = 0, k = 0; i < threads; ++i) {
    int64_t until = i + 1 == threads ? K : K * (i + 1) / threads;
    parts[i] = (part){i ? partial + (i - 1) * M * N : out, x + k * x_by_k, y + k * y_by_k, 0, 0, M, until - k, N,
                      x_by_row, x_by_k, y_by_k, y_by_column, scratch + i * ur_scratch(N)};
    k = until;
  }
  share(run, multiply_part, parts, threads);
  addition all = {out, partial, threads - 1, M * N};
  add_part(&all, 0);
}
