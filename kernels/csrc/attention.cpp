// Attention of packed qkv, forward and backward. A work item is one head of one sample: its q, k and v are read once, get bias, QK-norm and
// rotation, and are packed for the products; blocks of queries then see all keys at once, so that a softmax needs no rescaling; gradients
// leave through the same steps backwards. Nothing is shared between items: results do not depend on the number of threads.
#include "attention.h"

#include <math.h>

#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace LIGHTNINGDIT_LEVEL {

// A tile of a product lies in registers as ROWS x 2 vectors: 16 of the 32 that AVX-512 has, 8 of 16 elsewhere.
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 };
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum { PANEL = 2 * LANES, DEPTH = 256, QUERIES = 64, SCORES = 32768, AHEAD = 4 };

#if defined(__GNUC__)
typedef float vec __attribute__((vector_size(LANES * 4)));
static inline vec multiply_add(float x, vec y, vec total) { return total + x * y; }
static inline vec product_add(vec x, vec y, vec total) { return total + x * y; }
static inline vec larger(vec x, vec y) { return x > y ? x : y; }
#else
struct vec {
  float lane[LANES];
};
static inline vec multiply_add(float x, vec y, vec total) {
  for (int i = 0; i < LANES; ++i) total.lane[i] += x * y.lane[i];
  return total;
}
static inline vec product_add(vec x, vec y, vec total) {
  for (int i = 0; i < LANES; ++i) total.lane[i] += x.lane[i] * y.lane[i];
  return total;
}
static inline vec larger(vec x, vec y) {
  for (int i = 0; i < LANES; ++i) x.lane[i] = x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i];
  return x;
}
#endif

static inline vec load_vec(const float* p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Over the lanes, as a tree: what a compiler makes of a reduction clause adds them one after another, which takes as long as a row of 256.
static inline float sum_of(vec x) {
  float lane[LANES];
  memcpy(lane, &x, sizeof lane);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

static inline float highest_of(vec x) {
  float lane[LANES];
  memcpy(lane, &x, sizeof lane);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// What comes next, in rows too far apart for the processor to see where that goes.
static inline void prefetch(const void* p, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
#else
  (void)p, (void)bytes;
#endif
}

static inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The right operand of a product lies in panels of PANEL columns (the last may have LANES), each (depth, columns): a tile reads it in order.
struct Panels {
  float* data;
  int64_t depth, columns;  // columns: a multiple of LANES

  int64_t width(int64_t column) const { return columns - column / PANEL * PANEL < PANEL ? int64_t(LANES) : int64_t(PANEL); }
  float* at(int64_t row, int64_t column) const {
    return data + column / PANEL * PANEL * depth + row * width(column) + column % PANEL;
  }
};

template <int VECS, bool TRANSPOSED>
static inline void tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_row, bool add) {
  const int64_t a_row = TRANSPOSED ? 1 : a_stride, a_step = TRANSPOSED ? a_stride : 1;
  vec total[ROWS][VECS];
  const vec zero = {};
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) total[i][j] = add ? load_vec(c + i * c_row + j * LANES) : zero;
  for (int64_t k = 0; k < depth; ++k) {
    vec right[VECS];
    for (int j = 0; j < VECS; ++j) right[j] = load_vec(b + k * VECS * LANES + j * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECS; ++j) total[i][j] = multiply_add(a[i * a_row + k * a_step], right[j], total[i][j]);
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) memcpy(c + i * c_row + j * LANES, &total[i][j], sizeof(vec));
}

// c (rows, columns) = or += a b, a(i, k) = a[i * a_stride + k], or transposed a[i + k * a_stride], b the rows start to start + depth of the
// panels. rows is rounded up to a multiple of ROWS, of a and of c too.
template <bool TRANSPOSED>
static void multiply(const float* a, int64_t a_stride, const Panels& b, int64_t start, int64_t depth, int64_t rows, float* c, int64_t c_row,
                     bool add) {
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t count = depth - k < DEPTH ? depth - k : int64_t(DEPTH);
    for (int64_t column = 0; column < b.columns; column += PANEL) {
      const float* panel = b.at(start + k, column);
      for (int64_t row = 0; row < rows; row += ROWS) {
        const float* left = a + (TRANSPOSED ? row + k * a_stride : row * a_stride + k);
        float* result = c + row * c_row + column;
        if (b.width(column) == PANEL) tile<2, TRANSPOSED>(left, a_stride, panel, count, result, c_row, add || k > 0);
        else tile<1, TRANSPOSED>(left, a_stride, panel, count, result, c_row, add || k > 0);
      }
    }
  }
}

struct Shape {
  int64_t tokens, head_dim, padded, width, queries;  // tokens and head_dim as multiples of LANES, and the queries of a block
  int64_t stride;  // between rows of scores: lines a power of two apart would share few sets of the first-level cache, and evict each other

  Shape(int64_t n, int64_t d) : tokens(n), head_dim(d), padded(round_up(n, LANES)), width(round_up(d, LANES)) {
    stride = padded < 8 * LANES ? padded : padded + LANES;
    queries = SCORES / padded / ROWS * ROWS;
    queries = queries < ROWS ? int64_t(ROWS) : queries > QUERIES ? int64_t(QUERIES) : queries;
  }
};

// Rows of scores to their exponentials; short rows, which have nothing between them, in one loop: an exponential has to be waited for.
static void exp_rows(float* scores, int64_t rows, const Shape& shape) {
  const int64_t loops = shape.stride == shape.padded ? 1 : rows, length = loops == rows ? shape.padded : rows * shape.padded;
  for (int64_t i = 0; i < loops; ++i) {
    float* row = scores + i * shape.stride;
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) row[j] = exp_f32(row[j]);
  }
}

struct Arena {
  float* base;
  int64_t used;

  float* take(int64_t count) {
    float* result = base ? base + used : nullptr;
    used += round_up(count, 16);
    return result;
  }
};

struct ForwardScratch {
  float *q, *scores, *result, *line, *inverse;
  Panels keys, values;

  ForwardScratch(const Shape& s, Arena& arena) {
    q = arena.take(s.padded * s.head_dim);
    scores = arena.take(s.queries * s.stride);
    result = arena.take(s.queries * s.width);
    line = arena.take(s.head_dim);
    inverse = arena.take(s.queries);
    keys = {arena.take(s.padded * s.head_dim), s.head_dim, s.padded};
    values = {arena.take(s.padded * s.width), s.padded, s.width};
  }
};

struct BackwardScratch {
  float *q, *grad, *weights, *slopes, *line, *raw, *dq, *dk, *dv;
  double* sums;
  Panels q_rows, k_rows, grad_rows, k_columns, v_columns;

  BackwardScratch(const Shape& s, Arena& arena) {
    q = arena.take(s.padded * s.head_dim);
    grad = arena.take(s.padded * s.head_dim);
    weights = arena.take(s.queries * s.stride);
    slopes = arena.take(s.queries * s.stride);
    line = arena.take(s.head_dim);
    raw = arena.take(s.head_dim);
    dq = arena.take(s.padded * s.width);
    dk = arena.take(s.padded * s.width);
    dv = arena.take(s.padded * s.width);
    sums = (double*)arena.take(14 * s.head_dim);
    q_rows = {arena.take(s.padded * s.width), s.padded, s.width};
    k_rows = {arena.take(s.padded * s.width), s.padded, s.width};
    grad_rows = {arena.take(s.padded * s.width), s.padded, s.width};
    k_columns = {arena.take(s.padded * s.head_dim), s.head_dim, s.padded};
    v_columns = {arena.take(s.padded * s.head_dim), s.head_dim, s.padded};
  }
};

// Writes token `row` of an operand: as a row of `rows` and as a column of `columns`, where those are given. line null: zeros.
static void pack(const float* line, int64_t row, int64_t head_dim, const Panels* rows, const Panels* columns) {
  if (rows)
    for (int64_t column = 0; column < rows->columns; column += PANEL) {
      float* target = rows->at(row, column);
      for (int64_t i = 0; i < rows->width(column); ++i) target[i] = line && column + i < head_dim ? line[column + i] : 0.0f;
    }
  if (columns) {
    float* target = columns->at(0, row);
    const int64_t step = columns->width(row);
    for (int64_t i = 0; i < head_dim; ++i) target[i * step] = line ? line[i] : 0.0f;
  }
}

struct Norm {
  const float *weight, *bias;
  float eps;
  int center;
};

// x, standardised in place; returns 1 / its root mean square.
static float standardise(float* x, int64_t count, const Norm& norm) {
  if (norm.center) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    const float mean = sum / float(count);
    for (int64_t i = 0; i < count; ++i) x[i] -= mean;
  }
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
  const float rstd = 1.0f / sqrtf(squares / float(count) + norm.eps);
  for (int64_t i = 0; i < count; ++i) x[i] *= rstd;
  return rstd;
}

// Turns the pairs of x by sign times the angles of a token.
static void rotate(float* x, const float* angles, int64_t count, float sign) {
  for (int64_t i = 0; i < count; i += 2) {
    const float cosine = angles[i], sine = sign * angles[i + 1], even = x[i], odd = x[i + 1];
    x[i] = even * cosine - odd * sine;
    x[i + 1] = odd * cosine + even * sine;
  }
}

template <typename T>
static void read(const T* from, const float* bias, int64_t count, float* to) {
  if (bias)
    for (int64_t i = 0; i < count; ++i) to[i] = load(from + i) + bias[i];
  else
    for (int64_t i = 0; i < count; ++i) to[i] = load(from + i);
}

// q' or k' of a token from raw q or k.
template <typename T>
static void prepare(const T* from, const float* bias, const float* angles, const Norm& norm, int64_t count, float* to) {
  read(from, bias, count, to);
  if (norm.weight) {
    standardise(to, count, norm);
    for (int64_t i = 0; i < count; ++i) to[i] = to[i] * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
  }
  if (angles) rotate(to, angles, count, 1.0f);
}

// The other way: grad, the gradient of q' or k', becomes that of raw q or k. sums: of the gradients of the norm's weight and bias.
template <typename T>
static void restore(float* grad, const T* from, const float* bias, const float* angles, const Norm& norm, int64_t count, float* raw,
                    double* sums) {
  if (angles) rotate(grad, angles, count, -1.0f);
  if (!norm.weight) return;
  read(from, bias, count, raw);
  const float rstd = standardise(raw, count, norm);
  float slope = 0, mean = 0;
#pragma omp simd reduction(+ : slope, mean)
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += grad[i] * raw[i];
    sums[count + i] += grad[i];
    grad[i] *= norm.weight[i];
    slope += grad[i] * raw[i];
    mean += grad[i];
  }
  slope /= float(count);
  mean = norm.center ? mean / float(count) : 0.0f;
  for (int64_t i = 0; i < count; ++i) grad[i] = (grad[i] - raw[i] * slope - mean) * rstd;
}

template <typename T>
static void write(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) store(to + i, from[i]);
}

static int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <typename In, typename Out>
static int forward(const In* qkv, const float* table, const float* bias, const Norm& q_norm, const Norm& k_norm, Out* out, float* lse,
                   float* scratch, int64_t batch, int64_t heads, const Shape& shape, int threads) {
  const int64_t tokens = shape.tokens, dim = shape.head_dim, all = heads * dim;
  const float scale = 1.0f / sqrtf(float(dim));
  Arena sizes = {nullptr, 0};
  ForwardScratch(shape, sizes);
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * heads * tokens * tokens, threads))
  for (int64_t item = 0; item < batch * heads; ++item) {
    Arena arena = {scratch + thread() * sizes.used, 0};
    ForwardScratch s(shape, arena);
    const int64_t sample = item / heads, head = item % heads;
    const In* raw = qkv + sample * tokens * 3 * all + head * dim;
    const float* biases[3] = {bias ? bias + head * dim : nullptr, bias ? bias + all + head * dim : nullptr,
                              bias ? bias + 2 * all + head * dim : nullptr};
    for (int64_t n = 0; n < tokens; ++n) {
      const In* token = raw + n * 3 * all;
      const float* angles = table ? table + n * dim : nullptr;
      for (int which = 0; which < 3; ++which) prefetch(token + AHEAD * 3 * all + which * all, dim * int64_t(sizeof(In)));
      prepare(token, biases[0], angles, q_norm, dim, s.q + n * dim);
      prepare(token + all, biases[1], angles, k_norm, dim, s.line);
      pack(s.line, n, dim, nullptr, &s.keys);
      read(token + 2 * all, biases[2], dim, s.line);
      pack(s.line, n, dim, &s.values, nullptr);
    }
    for (int64_t n = tokens; n < shape.padded; ++n) {
      memset(s.q + n * dim, 0, size_t(dim) * sizeof(float));
      pack(nullptr, n, dim, nullptr, &s.keys);
      pack(nullptr, n, dim, &s.values, nullptr);
    }
    for (int64_t first = 0; first < tokens; first += shape.queries) {
      const int64_t count = tokens - first < shape.queries ? tokens - first : shape.queries;
      multiply<false>(s.q + first * dim, dim, s.keys, 0, dim, count, s.scores, shape.stride, false);
      for (int64_t i = 0; i < count; ++i) {
        float* row = s.scores + i * shape.stride;
        for (int64_t j = tokens; j < shape.padded; ++j) row[j] = -INFINITY;  // whose exp is 0
        vec largest = load_vec(row);
        for (int64_t j = LANES; j < shape.padded; j += LANES) largest = larger(load_vec(row + j), largest);
        const float highest = s.inverse[i] = highest_of(largest);
#pragma omp simd
        for (int64_t j = 0; j < shape.padded; ++j) row[j] = (row[j] - highest) * scale;
      }
      exp_rows(s.scores, count, shape);
      for (int64_t i = 0; i < count; ++i) {
        const float* row = s.scores + i * shape.stride;
        vec sums = {};
        for (int64_t j = 0; j < shape.padded; j += LANES) sums = multiply_add(1.0f, load_vec(row + j), sums);
        const float sum = sum_of(sums);
        lse[item * tokens + first + i] = s.inverse[i] * scale + logf(sum);
        s.inverse[i] = 1.0f / sum;
      }
      multiply<false>(s.scores, shape.stride, s.values, 0, shape.padded, count, s.result, shape.width, false);
      for (int64_t i = 0; i < count; ++i) {
        const float* row = s.result + i * shape.width;
        Out* to = out + (sample * tokens + first + i) * all + head * dim;
        for (int64_t j = 0; j < dim; ++j) store(to + j, row[j] * s.inverse[i]);
      }
    }
  }
  return LIGHTNINGDIT_OK;
}

template <typename In, typename Out>
static int backward(const Out* grad, const In* qkv, const float* lse, const float* table, const float* bias,
                    const Norm& q_norm, const Norm& k_norm, In* grad_qkv, float* sums, float* scratch, int64_t batch, int64_t heads,
                    const Shape& shape, int threads) {
  const int64_t tokens = shape.tokens, dim = shape.head_dim, all = heads * dim;
  const float scale = 1.0f / sqrtf(float(dim));
  Arena sizes = {nullptr, 0};
  BackwardScratch(shape, sizes);
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * heads * tokens * tokens, threads))
  for (int64_t item = 0; item < batch * heads; ++item) {
    Arena arena = {scratch + thread() * sizes.used, 0};
    BackwardScratch s(shape, arena);
    const int64_t sample = item / heads, head = item % heads;
    const In* raw = qkv + sample * tokens * 3 * all + head * dim;
    const float* biases[3] = {bias ? bias + head * dim : nullptr, bias ? bias + all + head * dim : nullptr,
                              bias ? bias + 2 * all + head * dim : nullptr};
    for (int64_t n = 0; n < tokens; ++n) {
      const In* token = raw + n * 3 * all;
      const float* angles = table ? table + n * dim : nullptr;
      const int64_t offset = (sample * tokens + n) * all + head * dim;
      for (int which = 0; which < 3; ++which) prefetch(token + AHEAD * 3 * all + which * all, dim * int64_t(sizeof(In)));
      prefetch(grad + offset + AHEAD * all, dim * int64_t(sizeof(Out)));
      prepare(token, biases[0], angles, q_norm, dim, s.q + n * dim);
      pack(s.q + n * dim, n, dim, &s.q_rows, nullptr);
      prepare(token + all, biases[1], angles, k_norm, dim, s.line);
      pack(s.line, n, dim, &s.k_rows, &s.k_columns);
      read(token + 2 * all, biases[2], dim, s.line);
      pack(s.line, n, dim, nullptr, &s.v_columns);
      read(grad + offset, (const float*)nullptr, dim, s.grad + n * dim);
      pack(s.grad + n * dim, n, dim, &s.grad_rows, nullptr);
    }
    for (int64_t n = tokens; n < shape.padded; ++n) {
      memset(s.q + n * dim, 0, size_t(dim) * sizeof(float));
      memset(s.grad + n * dim, 0, size_t(dim) * sizeof(float));
      pack(nullptr, n, dim, &s.k_rows, &s.k_columns);
      pack(nullptr, n, dim, nullptr, &s.v_columns);
    }
    for (int64_t first = 0; first < tokens; first += shape.queries) {
      const int64_t count = tokens - first < shape.queries ? tokens - first : shape.queries;
      multiply<false>(s.q + first * dim, dim, s.k_columns, 0, dim, count, s.weights, shape.stride, false);
      multiply<false>(s.grad + first * dim, dim, s.v_columns, 0, dim, count, s.slopes, shape.stride, false);
      for (int64_t i = 0; i < count; ++i) {
        float* weights = s.weights + i * shape.stride;
        const float log_sum = lse[item * tokens + first + i];
        for (int64_t j = tokens; j < shape.padded; ++j) weights[j] = -INFINITY;  // whose exp is 0
#pragma omp simd
        for (int64_t j = 0; j < shape.padded; ++j) weights[j] = weights[j] * scale - log_sum;
      }
      exp_rows(s.weights, count, shape);
      for (int64_t i = 0; i < count; ++i) {
        float *weights = s.weights + i * shape.stride, *slopes = s.slopes + i * shape.stride;
        // The whole row is at hand: its sum makes good the rounding of log_sum, and delta comes from the weights themselves, not
        // from out, so that the slopes of a row add up to nothing: what rounding leaves of that is what sums over all tokens gather.
        vec sums = {}, products = {};
        for (int64_t j = 0; j < shape.padded; j += LANES) {
          const vec weight = load_vec(weights + j);
          sums = multiply_add(1.0f, weight, sums);
          products = product_add(weight, load_vec(slopes + j), products);
        }
        const float unit = 1.0f / sum_of(sums), delta = sum_of(products) * unit;
#pragma omp simd
        for (int64_t j = 0; j < shape.padded; ++j) {
          weights[j] *= unit;
          slopes[j] = weights[j] * (slopes[j] - delta) * scale;
        }
      }
      multiply<true>(s.weights, shape.stride, s.grad_rows, first, count, tokens, s.dv, shape.width, first > 0);
      multiply<true>(s.slopes, shape.stride, s.q_rows, first, count, tokens, s.dk, shape.width, first > 0);
      multiply<false>(s.slopes, shape.stride, s.k_rows, 0, shape.padded, count, s.dq + first * shape.width, shape.width, false);
    }
    memset(s.sums, 0, size_t(7 * dim) * sizeof(double));
    In* result = grad_qkv + sample * tokens * 3 * all + head * dim;
    for (int64_t n = 0; n < tokens; ++n) {
      const In* token = raw + n * 3 * all;
      const float* angles = table ? table + n * dim : nullptr;
      float* lines[3] = {s.dq + n * shape.width, s.dk + n * shape.width, s.dv + n * shape.width};
      restore(lines[0], token, biases[0], angles, q_norm, dim, s.raw, s.sums);
      restore(lines[1], token + all, biases[1], angles, k_norm, dim, s.raw, s.sums + 2 * dim);
      for (int which = 0; which < 3; ++which) write(lines[which], dim, result + n * 3 * all + which * all);
    }
    const float* lines[3] = {s.dq, s.dk, s.dv};
    for (int which = 0; bias && which < 3; ++which) {
      double* total = s.sums + (4 + which) * dim;
      int64_t n = 0;
      for (; n + 4 <= tokens; n += 4) {  // four tokens a time: the sums are then read and written once for all of them
        const float *a = lines[which] + n * shape.width, *b = a + shape.width, *c = b + shape.width, *d = c + shape.width;
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) total[i] += (double(a[i]) + double(b[i])) + (double(c[i]) + double(d[i]));
      }
      for (; n < tokens; ++n)
        for (int64_t i = 0; i < dim; ++i) total[i] += lines[which][n * shape.width + i];
    }
    for (int64_t i = 0; i < 7 * dim; ++i) sums[item * 7 * dim + i] = float(s.sums[i]);
  }
  return LIGHTNINGDIT_OK;
}

LIGHTNINGDIT_ATTENTION_SCRATCH(attention_scratch) {
  Arena arena = {nullptr, 0};
  const Shape shape(tokens, head_dim);
  if (backward) BackwardScratch(shape, arena);
  else ForwardScratch(shape, arena);
  return arena.used;
}

LIGHTNINGDIT_ATTENTION_FORWARD(attention_forward) {
  const Norm q_norm = {q_weight, q_bias, eps, center}, k_norm = {k_weight, k_bias, eps, center};
  return with_types(qkv_dtype, out_dtype, [&](auto in, auto result) {
    return forward((const decltype(in)*)qkv, table, bias, q_norm, k_norm, (decltype(result)*)out, lse, scratch, batch, heads,
                   Shape(tokens, head_dim), threads);
  });
}

LIGHTNINGDIT_ATTENTION_BACKWARD(attention_backward) {
  const Norm q_norm = {q_weight, q_bias, eps, center}, k_norm = {k_weight, k_bias, eps, center};
  return with_types(qkv_dtype, out_dtype, [&](auto in, auto result) {
    using In = decltype(in);
    using Out = decltype(result);
    return backward((const Out*)grad, (const In*)qkv, lse, table, bias, q_norm, k_norm, (In*)grad_qkv, sums, scratch, batch, heads,
                    Shape(tokens, head_dim), threads);
  });
}

}  // namespace LIGHTNINGDIT_LEVEL
