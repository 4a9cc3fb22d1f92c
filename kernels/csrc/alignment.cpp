// The margin losses of the alignment. Cosine: one pass over the tokens. Distance matrix: both similarity matrices of an image, tile by tile.
//
// The normalised tokens of an image are packed in panels of PANEL tokens, channels first, so that one copy serves as either factor of a
// product. A tile of the differences cos(z_i, z_j) - cos(f_i, f_j) exists only for i <= j and only until its cost is added; for the gradient
// its signs S stay until the row of tiles is done, and both sum_j S_ij z_j and sum_i S_ij z_i are added then. So forward and gradient together
// are two N x N x C products where plain PyTorch does four, and memory holds N x PANEL of a matrix. Each sum has one owner and one order:
// nothing depends on the number of threads.
#include "alignment.h"
#include "common.h"

#if !defined(__GNUC__)
#include <math.h>
#endif

namespace LIGHTNINGDIT_LEVEL {

// One row of a tile of ROWS x PANEL is two vectors; the tile, a row of the second factor and a broadcast fit into the registers.
#if defined(__AVX512F__)
static const int LANES = 16, ROWS = 8;
#elif defined(__AVX2__)
static const int LANES = 8, ROWS = 4;
#else
static const int LANES = 4, ROWS = 4;
#endif
static const int PANEL = 2 * LANES, CHUNK = LIGHTNINGDIT_ALIGNMENT_CHUNK;
static_assert(PANEL <= LIGHTNINGDIT_ALIGNMENT_PANEL && LIGHTNINGDIT_ALIGNMENT_ROWS % ROWS == 0, "native.py's scratch is too small");

#if defined(__GNUC__)
typedef float vec __attribute__((vector_size(4 * LANES)));
#define UNROLL _Pragma("GCC unroll 16")
#else
struct vec {
  float lane[LANES];
};
static inline vec operator*(float a, vec b) {
  for (int l = 0; l < LANES; ++l) b.lane[l] *= a;
  return b;
}
static inline vec& operator+=(vec& a, const vec& b) {
  for (int l = 0; l < LANES; ++l) a.lane[l] += b.lane[l];
  return a;
}
#define UNROLL
#endif

static inline vec load_vec(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline float square_root(float x) {
#if defined(__GNUC__)
  return __builtin_sqrtf(x);
#else
  return sqrtf(x);
#endif
}

// x.x, y.y and x.y over width. The order of the sums is the same whatever the element types and the instruction set.
struct Sums {
  float xx, yy, xy;
};

template <typename X, typename Y>
static inline Sums sums_of(const X* x, const Y* y, int64_t width) {
  enum { COUNT = 32 };
  float xx[COUNT] = {}, yy[COUNT] = {}, xy[COUNT] = {};
  int64_t c = 0;
  for (; c + COUNT <= width; c += COUNT)
#pragma omp simd
    for (int l = 0; l < COUNT; ++l) {
      const float a = load(x + c + l), b = load(y + c + l);
      xx[l] += a * a;
      yy[l] += b * b;
      xy[l] += a * b;
    }
  for (int l = 0; c < width; ++c, ++l) {
    const float a = load(x + c), b = load(y + c);
    xx[l] += a * a;
    yy[l] += b * b;
    xy[l] += a * b;
  }
  for (int half = COUNT / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) xx[l] += xx[l + half], yy[l] += yy[l + half], xy[l] += xy[l + half];
  return {xx[0], yy[0], xy[0]};
}

static inline float inverse_norm(float squares, float eps) {
  const float norm = square_root(squares);
  return 1.0f / (norm < eps ? eps : norm);  // a NaN comes through
}

// tile (ROWS, PANEL) += a b over depth: a's element (r, k) is a[r * row + k * step], b's row k is b + k * PANEL.
static inline void multiply_add(float* tile, const float* a, int64_t row, int64_t step, const float* b, int64_t depth) {
  vec sum[ROWS][2];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = load_vec(tile + r * PANEL);
    sum[r][1] = load_vec(tile + r * PANEL + LANES);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const vec low = load_vec(b + k * PANEL), high = load_vec(b + k * PANEL + LANES);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const float x = a[r * row + k * step];
      sum[r][0] += x * low;
      sum[r][1] += x * high;
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    memcpy(tile + r * PANEL, &sum[r][0], sizeof(vec));
    memcpy(tile + r * PANEL + LANES, &sum[r][1], sizeof(vec));
  }
}

// Panel `panel` of x (tokens, width): inverse norms, and x_hat (padded width, PANEL), zero beyond the tokens and the width.
template <typename X>
static void pack(const X* x, float* inverse, float* packed, int64_t panel, int64_t tokens, int64_t width, int64_t padded, float eps) {
  const int64_t first = panel * PANEL, count = tokens - first < PANEL ? tokens - first : PANEL;
  float* to = packed + first * padded;
  float scale[PANEL];
  for (int64_t i = 0; i < count; ++i) {
    const X* token = x + (first + i) * width;
    scale[i] = inverse[first + i] = inverse_norm(sums_of(token, token, width).xx, eps);
  }
  if (count < PANEL || padded > width) memset(to, 0, sizeof(float) * padded * PANEL);
  for (int64_t start = 0; start < width; start += 32) {  // what is written stays in the first-level cache
    const int64_t end = start + 32 < width ? start + 32 : width;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = start; c < end; ++c) to[c * PANEL + i] = load(x + (first + i) * width + c) * scale[i];
  }
}

// One tile of differences. Returns its cost; where signs is not null writes the signs (i, j), and transposed (j, i) beside it.
// The signs of a difference that is not a number are not numbers.
static double tile_of(const float* z_i, const float* z_j, const float* f_i, const float* f_j, int64_t width, int64_t feature_width,
                      int64_t count_i, int64_t count_j, float margin, float* signs, float* transposed, bool* any) {
  double cost = 0.0;
  bool found = false;
  for (int64_t start = 0; start < PANEL; start += ROWS) {
    float z_cosine[ROWS * PANEL] = {}, f_cosine[ROWS * PANEL] = {};
    if (start < count_i) {
      multiply_add(z_cosine, z_i + start, 1, PANEL, z_j, width);
      multiply_add(f_cosine, f_i + start, 1, PANEL, f_j, feature_width);
    }
    for (int64_t r = 0; r < ROWS; ++r) {
      float row = 0.0f;
      float sign[PANEL] = {};
      const int64_t count = start + r < count_i ? count_j : 0;
      int nonzero = 0;
#pragma omp simd reduction(+ : row) reduction(| : nonzero)
      for (int64_t j = 0; j < count; ++j) {
        const float difference = z_cosine[r * PANEL + j] - f_cosine[r * PANEL + j];
        const float above = difference - margin, below = -difference - margin, larger = difference < 0.0f ? below : above;
        row += larger <= 0.0f ? 0.0f : larger;
        const float outside = difference < 0.0f ? -1.0f : difference > 0.0f ? 1.0f : difference;
        sign[j] = larger <= 0.0f ? 0.0f : outside;
        nonzero |= !(larger <= 0.0f);
      }
      cost += row;
      found |= nonzero != 0;
      if (signs) memcpy(signs + (start + r) * PANEL, sign, sizeof sign);
    }
  }
  if (signs && found)
    for (int64_t i = 0; i < PANEL; ++i)
      for (int64_t j = 0; j < PANEL; ++j) transposed[j * PANEL + i] = signs[i * PANEL + j];
  if (any) *any = found;
  return cost;
}

struct Image {
  float *z_hat, *f_hat, *sums, *signs, *transposed;  // panels of z_hat, f_hat and sum_j S_ij z_hat_j; the signs of one row of tiles
  bool* any;                                         // whether a tile of that row has a sign at all
};

// dz_i = scale * (g_i - z_hat_i (z_hat_i . g_i)) / |z_i| of one panel.
static void write_gradient(const float* z_hat, const float* sums, const float* inverse, float* grad_z, int64_t count, int64_t width,
                           float scale, float eps) {
  float along[PANEL] = {}, factor[PANEL] = {};
  for (int64_t c = 0; c < width; ++c)
#pragma omp simd
    for (int i = 0; i < PANEL; ++i) along[i] += z_hat[c * PANEL + i] * sums[c * PANEL + i];
  for (int64_t i = 0; i < count; ++i) {
    factor[i] = scale * inverse[i];
    if (inverse[i] * eps >= 0.999f) along[i] = 0.0f;  // below the clamp the norm is a constant
  }
  for (int64_t start = 0; start < width; start += 32) {
    const int64_t end = start + 32 < width ? start + 32 : width;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = start; c < end; ++c)
        grad_z[i * width + c] = (sums[c * PANEL + i] - along[i] * z_hat[c * PANEL + i]) * factor[i];
  }
}

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One image with `threads` threads: packed, then row of tiles by row of tiles.
static int one_image(const void* z, const void* f, float* z_inverse, float* f_inverse, float* grad_z, double* partial, const Image& image,
                     int64_t tokens, int64_t width, int64_t feature_width, float margin, float scale, float eps, int z_dtype, int f_dtype,
                     int threads) {
  const int64_t panels = (tokens + PANEL - 1) / PANEL;
  const int64_t z_rows = round_up(width, ROWS), f_rows = round_up(feature_width, ROWS);
  const int64_t z_panel = z_rows * PANEL, f_panel = f_rows * PANEL, tile = PANEL * PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < panels; ++p) {
    with_type(z_dtype, [&](auto x) {
      pack((const decltype(x)*)z, z_inverse, image.z_hat, p, tokens, width, z_rows, eps);
      return int(LIGHTNINGDIT_OK);
    });
    with_type(f_dtype, [&](auto x) {
      pack((const decltype(x)*)f, f_inverse, image.f_hat, p, tokens, feature_width, f_rows, eps);
      return int(LIGHTNINGDIT_OK);
    });
    partial[p] = 0.0;
    if (grad_z) memset(image.sums + p * z_panel, 0, sizeof(float) * z_panel);
  }
  for (int64_t p = 0; p < panels; ++p) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t q = p; q < panels; ++q) {
      const int64_t count_i = tokens - p * PANEL < PANEL ? tokens - p * PANEL : PANEL;
      const int64_t count_j = tokens - q * PANEL < PANEL ? tokens - q * PANEL : PANEL;
      const double cost = tile_of(image.z_hat + p * z_panel, image.z_hat + q * z_panel, image.f_hat + p * f_panel, image.f_hat + q * f_panel,
                                  width, feature_width, count_i, count_j, margin, grad_z ? image.signs + q * tile : nullptr,
                                  grad_z ? image.transposed + q * tile : nullptr, grad_z ? image.any + q : nullptr);
      partial[q] += p == q ? cost : 2.0 * cost;
    }
    if (!grad_z) continue;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < z_rows; c += ROWS) {
      float* own = image.sums + p * z_panel + c * PANEL;
      for (int64_t q = p; q < panels; ++q) {
        if (!image.any[q]) continue;
        multiply_add(own, image.z_hat + q * z_panel + c * PANEL, PANEL, 1, image.transposed + q * tile, PANEL);
        if (q == p) continue;
        float* other = image.sums + q * z_panel + c * PANEL;
        multiply_add(other, image.z_hat + p * z_panel + c * PANEL, PANEL, 1, image.signs + q * tile, PANEL);
      }
    }
  }
  if (!grad_z) return LIGHTNINGDIT_OK;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * PANEL, count = tokens - first < PANEL ? tokens - first : PANEL;
    write_gradient(image.z_hat + p * z_panel, image.sums + p * z_panel, z_inverse + first, grad_z + first * width, count, width, scale, eps);
  }
  return LIGHTNINGDIT_OK;
}

LIGHTNINGDIT_DISTANCE(distance) {
  if (z_dtype > LIGHTNINGDIT_F16 || f_dtype > LIGHTNINGDIT_F16) return LIGHTNINGDIT_UNSUPPORTED_DTYPE;
  const int64_t panels = (tokens + PANEL - 1) / PANEL, padded = panels * PANEL;
  const int64_t z_size = padded * round_up(width, ROWS), f_size = padded * round_up(feature_width, ROWS), strip = PANEL * padded;
  const int64_t size = z_size + f_size + (grad_z ? z_size + 2 * strip + padded : 0);
  const float scale = float(2.0 / (double(batch) * double(tokens) * double(tokens)));
  // With fewer images than threads the threads share each image, otherwise every thread has images of its own.
  const int teams = batch < threads ? 1 : threads, inside = batch < threads ? threads : 1;
#pragma omp parallel for schedule(static) num_threads(teams)
  for (int team = 0; team < teams; ++team) {
    float* memory = scratch + team * size;
    float* signs = memory + z_size + f_size + z_size;
    const Image image = {memory, memory + z_size, memory + z_size + f_size, signs, signs + strip, (bool*)(signs + 2 * strip)};
    for (int64_t b = team; b < batch; b += teams) {
      const char* own_z = (const char*)z + b * tokens * width * (z_dtype == LIGHTNINGDIT_F32 ? 4 : 2);
      const char* own_f = (const char*)f + b * tokens * feature_width * (f_dtype == LIGHTNINGDIT_F32 ? 4 : 2);
      one_image(own_z, own_f, z_inverse + b * tokens, f_inverse + b * tokens, grad_z ? grad_z + b * tokens * width : nullptr,
                partial + b * panels, image, tokens, width, feature_width, margin, scale, eps, z_dtype, f_dtype, inside);
    }
  }
  double total = 0.0;
  for (int64_t p = 0; p < batch * panels; ++p) total += partial[p];
  *loss = float(total / (double(batch) * double(tokens) * double(tokens)));
  return LIGHTNINGDIT_OK;
}

LIGHTNINGDIT_COSINE_FORWARD(cosine_forward) {
  return with_types(z_dtype, f_dtype, [=](auto z_type, auto f_type) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      double cost = 0.0;
      const int64_t end = (chunk + 1) * CHUNK < rows ? (chunk + 1) * CHUNK : rows;
      for (int64_t row = chunk * CHUNK; row < end; ++row) {
        const Sums sums = sums_of((const decltype(z_type)*)z + row * width, (const decltype(f_type)*)f + row * width, width);
        const float excess = target - sums.xy * inverse_norm(sums.xx, eps) * inverse_norm(sums.yy, eps);
        cost += excess <= 0.0f ? 0.0f : excess;
      }
      partial[chunk] = cost;
    }
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk];
    *loss = float(total / double(rows));
    return int(LIGHTNINGDIT_OK);
  });
}

LIGHTNINGDIT_COSINE_BACKWARD(cosine_backward) {
  return with_types(z_dtype, f_dtype, [=](auto z_type, auto f_type) {
    const float share = -*grad / float(rows);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t row = 0; row < rows; ++row) {
      const auto* own_z = (const decltype(z_type)*)z + row * width;
      const auto* own_f = (const decltype(f_type)*)f + row * width;
      auto* out = (decltype(z_type)*)grad_z + row * width;
      const Sums sums = sums_of(own_z, own_f, width);
      const float z_inverse = inverse_norm(sums.xx, eps), f_inverse = inverse_norm(sums.yy, eps);
      const float cosine = sums.xy * z_inverse * f_inverse;
      const float factor = target - cosine <= 0.0f ? 0.0f : share * z_inverse, on_f = factor * f_inverse;
      const float on_z = square_root(sums.xx) <= eps ? 0.0f : -factor * cosine * z_inverse;  // below the clamp the norm is a constant
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) store(out + c, on_f * load(own_f + c) + on_z * load(own_z + c));
    }
    return int(LIGHTNINGDIT_OK);
  });
}

}  // namespace LIGHTNINGDIT_LEVEL
