// Arguments of the norm kernels, the same for the C ABI and for every instruction-set level.
//
// x, residual, grad_residual and dx are (batch, tokens, width) in x_dtype, y and dy in y_dtype, h and grad_h in h_dtype. gate, factor =
// (1 + scale) * weight and shift are (batch, width) in fp32; bias is (width), added to y; mean and rstd are (batch, tokens) in fp32. All
// contiguous. What may be null: y with residual, mean, grad_residual, dy, and y in the backward. sums is (batch, chunks, 4, width), one
// chunk for every LIGHTNINGDIT_NORM_CHUNK tokens: over the tokens of a chunk, grad_h * x_hat, grad_h, (with dy) dx and (with y) dx * y.
#pragma once

enum { LIGHTNINGDIT_NORM_CHUNK = 32 };

#define LIGHTNINGDIT_NORM_FORWARD(name)                                                                                   \
  int name(const void* x, const void* y, const float* bias, const float* gate, const float* factor, const float* shift,   \
           void* residual, void* h, float* mean, float* rstd, int64_t batch, int64_t tokens, int64_t width, float eps, int x_dtype,       \
           int y_dtype, int h_dtype, int threads)

#define LIGHTNINGDIT_NORM_BACKWARD(name)                                                                                  \
  int name(const void* grad_residual, const void* grad_h, const void* residual, const void* y, const float* gate,         \
           const float* factor, const float* mean, const float* rstd, void* dx, void* dy, float* sums, int64_t batch,     \
           int64_t tokens, int64_t width, int x_dtype, int y_dtype, int h_dtype, int threads)
