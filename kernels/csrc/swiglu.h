// Arguments of the SwiGLU kernels, the same for the C ABI and for every instruction-set level.
//
// packed and grad_packed are (rows, 2 * hidden), [gate | up]; bias is (2 * hidden) in fp32, added to packed; grad and out are
// (rows, hidden). All contiguous. sums may be null; it is (chunks, 2 * hidden), one chunk for every LIGHTNINGDIT_SWIGLU_CHUNK rows: the
// sum of grad_packed over them.
#pragma once

enum { LIGHTNINGDIT_SWIGLU_CHUNK = 32 };

#define LIGHTNINGDIT_SWIGLU_FORWARD(name)                                                                              \
  int name(const void* packed, const float* bias, void* out, int64_t rows, int64_t hidden, int packed_dtype,           \
           int out_dtype, int threads)

#define LIGHTNINGDIT_SWIGLU_BACKWARD(name)                                                                             \
  int name(const void* grad, const void* packed, const float* bias, void* grad_packed, float* sums, int64_t rows,      \
           int64_t hidden, int grad_dtype, int packed_dtype, int threads)
