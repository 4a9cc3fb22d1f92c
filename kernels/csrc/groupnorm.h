// Arguments of the GroupNorm + SiLU kernels, the same for the C ABI and for every instruction-set level.
//
// x, out, grad, grad_x are (batch, channels, pixels), or (batch, pixels, channels) if channels_last; dense. weight, bias are (channels),
// mean, rstd (batch, groups), sums (2, batch, channels): of dy and of dy * x_hat. scratch holds, if channels_last,
// batch * (chunks * 2 + 4) * channels floats, chunks = ceil(pixels / LIGHTNINGDIT_GROUPNORM_CHUNK), else, in the backward to an x of 16
// bits, threads * channels / groups * pixels.
#pragma once

#define LIGHTNINGDIT_GROUPNORM_CHUNK 64

#define LIGHTNINGDIT_GROUPNORM_FORWARD(name)                                                                              \
  int name(const void* x, const float* weight, const float* bias, void* out, float* mean, float* rstd, float* scratch,    \
           int64_t batch, int64_t channels, int64_t pixels, int64_t groups, float eps, int channels_last, int x_dtype,    \
           int out_dtype, int threads)

#define LIGHTNINGDIT_GROUPNORM_BACKWARD(name)                                                                             \
  int name(const void* grad, const void* x, const float* weight, const float* bias, const float* mean, const float* rstd, \
           void* grad_x, float* sums, float* scratch, int64_t batch, int64_t channels, int64_t pixels, int64_t groups,    \
           int channels_last, int grad_dtype, int x_dtype, int threads)
