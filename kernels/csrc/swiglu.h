// Arguments of the SwiGLU kernels, the same for the C ABI and for every instruction-set level.
//
// packed is (rows, 2 * hidden), [gate | up]; grad and out are (rows, hidden). All contiguous.
#pragma once

#define LIGHTNINGDIT_SWIGLU_FORWARD(name) \
  int name(const void* packed, void* out, int64_t rows, int64_t hidden, int packed_dtype, int out_dtype, int threads)

#define LIGHTNINGDIT_SWIGLU_BACKWARD(name)                                                                             \
  int name(const void* grad, const void* packed, void* grad_packed, int64_t rows, int64_t hidden, int grad_dtype,      \
           int packed_dtype, int threads)
