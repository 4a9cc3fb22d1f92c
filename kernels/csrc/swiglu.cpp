// SwiGLU: out = silu(gate) * up with [gate | up] = packed + bias, and its gradient. Memory-bound: one pass, the activation recomputed in
// the backward. The gradient to the bias, a sum over rows, is taken chunk by chunk in the same pass, whatever the number of threads.
#include "common.h"
#include "swiglu.h"

namespace LIGHTNINGDIT_LEVEL {

// Columns that one work item covers: long enough for SIMD, short enough that a single wide row still splits over threads, and that the
// sums of a chunk stay in the first-level cache.
static const int64_t COLUMNS = 1024;
static const int64_t CHUNK = LIGHTNINGDIT_SWIGLU_CHUNK;

template <typename Packed, typename Out>
static int forward(const Packed* packed, const float* bias, Out* out, int64_t rows, int64_t hidden, int threads) {
  const int64_t blocks = (hidden + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
  for (int64_t item = 0; item < rows * blocks; ++item) {
    const int64_t row = item / blocks, start = item % blocks * COLUMNS;
    const int64_t count = hidden - start < COLUMNS ? hidden - start : COLUMNS;
    const Packed* gate = packed + row * 2 * hidden + start;
    const Packed* up = gate + hidden;
    const float *gate_bias = bias + start, *up_bias = gate_bias + hidden;
    Out* result = out + row * hidden + start;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const float a = load(gate + j) + gate_bias[j];
      store(result + j, a / (1.0f + exp_f32(-a)) * (load(up + j) + up_bias[j]));
    }
  }
  return LIGHTNINGDIT_OK;
}

template <bool SUMS, typename Grad, typename Packed>
static int backward(const Grad* grad, const Packed* packed, const float* bias, Packed* grad_packed, float* sums, int64_t rows,
                    int64_t hidden, int threads) {
  const int64_t blocks = (hidden + COLUMNS - 1) / COLUMNS, chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
  for (int64_t item = 0; item < chunks * blocks; ++item) {
    const int64_t chunk = item / blocks, start = item % blocks * COLUMNS;
    const int64_t count = hidden - start < COLUMNS ? hidden - start : COLUMNS;
    const int64_t end = (chunk + 1) * CHUNK < rows ? (chunk + 1) * CHUNK : rows;
    const float *gate_bias = bias + start, *up_bias = gate_bias + hidden;
    float* sum_gate = SUMS ? sums + chunk * 2 * hidden + start : nullptr;
    float* sum_up = SUMS ? sum_gate + hidden : nullptr;
    for (int64_t j = 0; SUMS && j < count; ++j) sum_gate[j] = sum_up[j] = 0.0f;
    for (int64_t row = chunk * CHUNK; row < end; ++row) {
      const int64_t offset = row * 2 * hidden + start;
      const Packed* gate = packed + offset;
      const Packed* up = gate + hidden;
      const Grad* incoming = grad + row * hidden + start;
      Packed* grad_gate = grad_packed + offset;
      Packed* grad_up = grad_gate + hidden;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const float a = load(gate + j) + gate_bias[j], d = load(incoming + j);
        const float sigmoid = 1.0f / (1.0f + exp_f32(-a));
        const float d_gate = d * (load(up + j) + up_bias[j]) * sigmoid * (1.0f + a * (1.0f - sigmoid)), d_up = d * a * sigmoid;
        store(grad_gate + j, d_gate);
        store(grad_up + j, d_up);
        if (SUMS) {
          sum_gate[j] += d_gate;
          sum_up[j] += d_up;
        }
      }
    }
  }
  return LIGHTNINGDIT_OK;
}

LIGHTNINGDIT_SWIGLU_FORWARD(swiglu_forward) {
  return with_types(packed_dtype, out_dtype, [=](auto a, auto b) {
    return forward((const decltype(a)*)packed, bias, (decltype(b)*)out, rows, hidden, threads);
  });
}

LIGHTNINGDIT_SWIGLU_BACKWARD(swiglu_backward) {
  return with_types(grad_dtype, packed_dtype, [=](auto a, auto b) {
    const decltype(a)* from = (const decltype(a)*)grad;
    const decltype(b)* at = (const decltype(b)*)packed;
    decltype(b)* to = (decltype(b)*)grad_packed;
    return sums ? backward<true>(from, at, bias, to, sums, rows, hidden, threads)
                : backward<false>(from, at, bias, to, sums, rows, hidden, threads);
  });
}

}  // namespace LIGHTNINGDIT_LEVEL
