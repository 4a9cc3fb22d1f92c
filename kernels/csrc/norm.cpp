// x' = x + gate * (y + bias), h = (x' - mean) * rstd * factor + shift, and its gradient. Memory-bound: a row is read from memory once
// and stays in the first-level cache for the second pass over it. Sums over tokens are taken chunk by chunk, whatever the number of threads.
#include "common.h"
#include "norm.h"

namespace LIGHTNINGDIT_LEVEL {

template <typename X, typename Y, typename H, bool BRANCH>
static int forward(const X* x, const Y* y, const float* bias, const float* gates, const float* factors, const float* shifts, X* residual,
                   H* h, float* means, float* rstds, int64_t batch, int64_t tokens, int64_t width, float eps, int threads) {
  const float inverse = 1.0f / float(width);
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * tokens * width, threads))
  for (int64_t row = 0; row < batch * tokens; ++row) {
    const int64_t sample = row / tokens * width;
    const float *gate = gates + sample, *factor = factors + sample, *shift = shifts + sample;
    const X* stored = x + row * width;
    float total = 0.0f, square = 0.0f;
    if (BRANCH) {
      X* out = residual + row * width;
      const Y* branch = y + row * width;
#pragma omp simd reduction(+ : total, square) simdlen(64)
      for (int64_t j = 0; j < width; ++j) {
        store(out + j, load(stored + j) + gate[j] * (load(branch + j) + bias[j]));
        const float value = load(out + j);  // the norm sees x' as it is stored
        total += value;
        square += value * value;
      }
      stored = out;
    } else {
#pragma omp simd reduction(+ : total, square) simdlen(64)
      for (int64_t j = 0; j < width; ++j) {
        const float value = load(stored + j);
        total += value;
        square += value * value;
      }
    }
    float mean = 0.0f;
    if (means) {
      mean = means[row] = total * inverse;
      square = 0.0f;
#pragma omp simd reduction(+ : square)
      for (int64_t j = 0; j < width; ++j) {
        const float value = load(stored + j) - mean;
        square += value * value;
      }
    }
    const float rstd = rstds[row] = 1.0f / __builtin_sqrtf(square * inverse + eps);
    H* result = h + row * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) store(result + j, (load(stored + j) - mean) * rstd * factor[j] + shift[j]);
  }
  return LIGHTNINGDIT_OK;
}

// What the backward computes beside dx: nothing; dy and the sum of dx; these and the sum of dx * y.
enum { ALONE, BRANCH, BRANCH_AND_GATE };

template <bool RESIDUAL, int OUTPUTS, typename X, typename Y, typename H>
static int backward_rows(const X* grad_residual, const H* grad_h, const X* residual, const Y* y, const float* gates, const float* factors,
                    const float* means, const float* rstds, X* dx, Y* dy, float* sums, int64_t batch, int64_t tokens, int64_t width,
                    int threads) {
  const float inverse = 1.0f / float(width);
  const int64_t chunks = (tokens + LIGHTNINGDIT_NORM_CHUNK - 1) / LIGHTNINGDIT_NORM_CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * tokens * width, threads))
  for (int64_t item = 0; item < batch * chunks; ++item) {
    const int64_t sample = item / chunks, first = item % chunks * LIGHTNINGDIT_NORM_CHUNK;
    const int64_t end = first + LIGHTNINGDIT_NORM_CHUNK < tokens ? first + LIGHTNINGDIT_NORM_CHUNK : tokens;
    const float *gate = gates + sample * width, *factor = factors + sample * width;
    float *sum_scale = sums + item * 4 * width, *sum_shift = sum_scale + width;
    float *sum_branch = sum_shift + width, *sum_gate = sum_branch + width;
    for (int64_t j = 0; j < 4 * width; ++j) sum_scale[j] = 0.0f;
    for (int64_t row = sample * tokens + first; row < sample * tokens + end; ++row) {
      const X* value = residual + row * width;
      const H* grad = grad_h + row * width;
      const float mean = means ? means[row] : 0.0f, rstd = rstds[row];
      float total = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : total, dot)
      for (int64_t j = 0; j < width; ++j) {
        const float x_hat = (load(value + j) - mean) * rstd, d = load(grad + j), a = d * factor[j];
        total += a;
        dot += a * x_hat;
        sum_scale[j] += d * x_hat;
        sum_shift[j] += d;
      }
      total = means ? total * inverse : 0.0f;
      dot *= inverse;
      const X* incoming = grad_residual + (RESIDUAL ? row * width : 0);
      const Y* branch = y + (OUTPUTS == BRANCH_AND_GATE ? row * width : 0);
      X* out = dx + row * width;
      Y* out_branch = dy + (OUTPUTS == ALONE ? 0 : row * width);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const float x_hat = (load(value + j) - mean) * rstd, a = load(grad + j) * factor[j];
        float d = rstd * (a - total - x_hat * dot);
        if (RESIDUAL) d += load(incoming + j);
        store(out + j, d);
        if (OUTPUTS != ALONE) {
          store(out_branch + j, gate[j] * d);
          sum_branch[j] += d;
        }
        if (OUTPUTS == BRANCH_AND_GATE) sum_gate[j] += d * load(branch + j);
      }
    }
  }
  return LIGHTNINGDIT_OK;
}

LIGHTNINGDIT_NORM_FORWARD(norm_forward) {
  return with_types(x_dtype, h_dtype, [=](auto a, auto b) {
    typedef decltype(a) X;
    typedef decltype(b) H;
    const X* in = (const X*)x;
    X* sum = (X*)residual;
    H* out = (H*)h;
    if (!y) {
      const X* none = nullptr;
      return forward<X, X, H, false>(in, none, bias, gate, factor, shift, sum, out, mean, rstd, batch, tokens, width, eps, threads);
    }
    return with_type(y_dtype, [=](auto c) {
      typedef decltype(c) Y;
      const Y* branch = (const Y*)y;
      if constexpr (meet<X, Y> && meet<H, Y>)
        return forward<X, Y, H, true>(in, branch, bias, gate, factor, shift, sum, out, mean, rstd, batch, tokens, width, eps, threads);
      else return int(LIGHTNINGDIT_UNSUPPORTED_DTYPE);
    });
  });
}

template <int OUTPUTS, typename X, typename Y, typename H>
static int backward(const X* grad_residual, const H* grad_h, const X* residual, const Y* y, const float* gates, const float* factors,
                    const float* means, const float* rstds, X* dx, Y* dy, float* sums, int64_t batch, int64_t tokens, int64_t width,
                    int threads) {
  const auto run = grad_residual ? backward_rows<true, OUTPUTS, X, Y, H> : backward_rows<false, OUTPUTS, X, Y, H>;
  return run(grad_residual, grad_h, residual, y, gates, factors, means, rstds, dx, dy, sums, batch, tokens, width, threads);
}

LIGHTNINGDIT_NORM_BACKWARD(norm_backward) {
  return with_types(x_dtype, h_dtype, [=](auto a, auto b) {
    typedef decltype(a) X;
    typedef decltype(b) H;
    const X *incoming = (const X*)grad_residual, *at = (const X*)residual;
    const H* grad = (const H*)grad_h;
    X* out = (X*)dx;
    if (!dy) {
      X* none = nullptr;
      return backward<ALONE, X, X, H>(incoming, grad, at, none, gate, factor, mean, rstd, out, none, sums, batch, tokens, width, threads);
    }
    return with_type(y_dtype, [=](auto c) {
      typedef decltype(c) Y;
      if constexpr (meet<X, Y> && meet<H, Y>) {
        const auto run = y ? backward<BRANCH_AND_GATE, X, Y, H> : backward<BRANCH, X, Y, H>;
        return run(incoming, grad, at, (const Y*)y, gate, factor, mean, rstd, out, (Y*)dy, sums, batch, tokens, width, threads);
      } else return int(LIGHTNINGDIT_UNSUPPORTED_DTYPE);
    });
  });
}

}  // namespace LIGHTNINGDIT_LEVEL
