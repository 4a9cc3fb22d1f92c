// SwiGLU: out = silu(gate) * up, and its gradient. Memory-bound: one pass, the activation recomputed in the backward.
#include "common.h"
#include "swiglu.h"

namespace LIGHTNINGDIT_LEVEL {

// Columns that one work item covers: long enough for SIMD, short enough that a single wide row still splits over threads.
static const int64_t COLUMNS = 1024;

template <typename Packed, typename Out>
static int forward(const Packed* packed, Out* out, int64_t rows, int64_t hidden, int threads) {
  const int64_t blocks = (hidden + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
  for (int64_t item = 0; item < rows * blocks; ++item) {
    const int64_t row = item / blocks, start = item % blocks * COLUMNS;
    const int64_t count = hidden - start < COLUMNS ? hidden - start : COLUMNS;
    const Packed* gate = packed + row * 2 * hidden + start;
    const Packed* up = gate + hidden;
    Out* result = out + row * hidden + start;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const float a = load(gate + j);
      store(result + j, a / (1.0f + exp_f32(-a)) * load(up + j));
    }
  }
  return LIGHTNINGDIT_OK;
}

template <typename Grad, typename Packed>
static int backward(const Grad* grad, const Packed* packed, Packed* grad_packed, int64_t rows, int64_t hidden, int threads) {
  const int64_t blocks = (hidden + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * hidden, threads))
  for (int64_t item = 0; item < rows * blocks; ++item) {
    const int64_t row = item / blocks, start = item % blocks * COLUMNS;
    const int64_t count = hidden - start < COLUMNS ? hidden - start : COLUMNS;
    const int64_t offset = row * 2 * hidden + start;
    const Packed* gate = packed + offset;
    const Packed* up = gate + hidden;
    const Grad* incoming = grad + row * hidden + start;
    Packed* grad_gate = grad_packed + offset;
    Packed* grad_up = grad_gate + hidden;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const float a = load(gate + j), d = load(incoming + j);
      const float sigmoid = 1.0f / (1.0f + exp_f32(-a));
      store(grad_gate + j, d * load(up + j) * sigmoid * (1.0f + a * (1.0f - sigmoid)));
      store(grad_up + j, d * a * sigmoid);
    }
  }
  return LIGHTNINGDIT_OK;
}

LIGHTNINGDIT_SWIGLU_FORWARD(swiglu_forward) {
  const float* packed_f32 = (const float*)packed;
  const bf16* packed_bf16 = (const bf16*)packed;
  if (packed_dtype == LIGHTNINGDIT_F32 && out_dtype == LIGHTNINGDIT_F32) return forward(packed_f32, (float*)out, rows, hidden, threads);
  if (packed_dtype == LIGHTNINGDIT_F32 && out_dtype == LIGHTNINGDIT_BF16) return forward(packed_f32, (bf16*)out, rows, hidden, threads);
  if (packed_dtype == LIGHTNINGDIT_BF16 && out_dtype == LIGHTNINGDIT_BF16) return forward(packed_bf16, (bf16*)out, rows, hidden, threads);
  return LIGHTNINGDIT_UNSUPPORTED_DTYPE;
}

LIGHTNINGDIT_SWIGLU_BACKWARD(swiglu_backward) {
  const float* grad_f32 = (const float*)grad;
  const bf16* grad_bf16 = (const bf16*)grad;
  const float* packed_f32 = (const float*)packed;
  const bf16* packed_bf16 = (const bf16*)packed;
  if (grad_dtype == LIGHTNINGDIT_F32 && packed_dtype == LIGHTNINGDIT_F32)
    return backward(grad_f32, packed_f32, (float*)grad_packed, rows, hidden, threads);
  if (grad_dtype == LIGHTNINGDIT_BF16 && packed_dtype == LIGHTNINGDIT_F32)
    return backward(grad_bf16, packed_f32, (float*)grad_packed, rows, hidden, threads);
  if (grad_dtype == LIGHTNINGDIT_BF16 && packed_dtype == LIGHTNINGDIT_BF16)
    return backward(grad_bf16, packed_bf16, (bf16*)grad_packed, rows, hidden, threads);
  return LIGHTNINGDIT_UNSUPPORTED_DTYPE;
}

}  // namespace LIGHTNINGDIT_LEVEL
