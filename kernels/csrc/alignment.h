// Arguments of the alignment-loss kernels, the same for the C ABI and for every instruction-set level.
//
// z is (batch, tokens, width), f (batch, tokens, feature_width), both contiguous; rows = batch * tokens. partial and loss are scratch and
// result. Norms are clamped at eps from below. Where grad_z is null the distance loss computes its value alone.
#pragma once

// The widest panel of tokens, and the channels that a panel is padded to a multiple of: they size the scratch memory (native.py).
#define LIGHTNINGDIT_ALIGNMENT_PANEL 32
#define LIGHTNINGDIT_ALIGNMENT_ROWS 8
// Tokens whose costs are added to one partial sum of the cosine loss.
#define LIGHTNINGDIT_ALIGNMENT_CHUNK 64

#define LIGHTNINGDIT_COSINE_FORWARD(name)                                                                                     \
  int name(const void* z, const void* f, double* partial, float* loss, int64_t rows, int64_t width, float target, float eps, \
           int z_dtype, int f_dtype, int threads)

#define LIGHTNINGDIT_COSINE_BACKWARD(name)                                                                                   \
  int name(const float* grad, const void* z, const void* f, void* grad_z, int64_t rows, int64_t width, float target,        \
           float eps, int z_dtype, int f_dtype, int threads)

#define LIGHTNINGDIT_DISTANCE(name)                                                                                            \
  int name(const void* z, const void* f, float* z_inverse, float* f_inverse, float* grad_z, float* loss, double* partial,     \
           float* scratch, int64_t batch, int64_t tokens, int64_t width, int64_t feature_width, float margin, float eps,      \
           int z_dtype, int f_dtype, int threads)
