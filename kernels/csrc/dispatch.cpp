// The C ABI: every exported function calls its twin at the highest instruction-set level that this processor has.
#include "alignment.h"
#include "attention.h"
#include "common.h"
#include "groupnorm.h"
#include "norm.h"
#include "swiglu.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define DECLARE(level)                             \
  namespace level {                                \
  LIGHTNINGDIT_ATTENTION_SCRATCH(attention_scratch);   \
  LIGHTNINGDIT_ATTENTION_FORWARD(attention_forward);   \
  LIGHTNINGDIT_ATTENTION_BACKWARD(attention_backward); \
  LIGHTNINGDIT_COSINE_FORWARD(cosine_forward);     \
  LIGHTNINGDIT_COSINE_BACKWARD(cosine_backward);   \
  LIGHTNINGDIT_DISTANCE(distance);                 \
  LIGHTNINGDIT_GROUPNORM_FORWARD(groupnorm_forward);   \
  LIGHTNINGDIT_GROUPNORM_BACKWARD(groupnorm_backward); \
  LIGHTNINGDIT_NORM_FORWARD(norm_forward);         \
  LIGHTNINGDIT_NORM_BACKWARD(norm_backward);       \
  LIGHTNINGDIT_SWIGLU_FORWARD(swiglu_forward);     \
  LIGHTNINGDIT_SWIGLU_BACKWARD(swiglu_backward);   \
  }

DECLARE(baseline)
#ifdef LIGHTNINGDIT_HAS_V3
DECLARE(v3)
#endif
#ifdef LIGHTNINGDIT_HAS_V4
DECLARE(v4)
#endif

// x86-64-v3 is AVX2 with FMA, x86-64-v4 is AVX-512 F, BW, CD, DQ, VL; 1 is the compiler's own baseline.
static int detect_level() {
#ifdef LIGHTNINGDIT_HAS_V3
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#ifdef LIGHTNINGDIT_HAS_V4
  if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 4;
#endif
  if (v3) return 3;
#endif
  return 1;
}

static const int detected_level = detect_level();
static int level = detected_level;

#ifdef LIGHTNINGDIT_HAS_V4
#define TRY_V4(call) \
  if (level >= 4) return v4::call;
#else
#define TRY_V4(call)
#endif
#ifdef LIGHTNINGDIT_HAS_V3
#define TRY_V3(call) \
  if (level >= 3) return v3::call;
#else
#define TRY_V3(call)
#endif
#define DISPATCH(call) \
  TRY_V4(call)         \
  TRY_V3(call)         \
  return baseline::call;

// Raised with every change of a signature, so that a library left over from an older build is refused.
EXPORT int lightningdit_abi_version() { return 6; }

EXPORT int lightningdit_level() { return level; }

// Lowers the level for tests (never above what the processor has). Returns the level now in use.
EXPORT int lightningdit_set_level(int wanted) { return level = wanted < detected_level ? wanted : detected_level; }

// out (count, bytes) from `count` rows that lie anywhere. It computes nothing, so it needs no levels.
EXPORT int lightningdit_gather_rows(const int64_t* addresses, char* out, int64_t count, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) memcpy(out + i * bytes, (const void*)addresses[i], bytes);
  return LIGHTNINGDIT_OK;
}

EXPORT LIGHTNINGDIT_NORM_FORWARD(lightningdit_norm_forward) {
  DISPATCH(norm_forward(x, y, bias, gate, factor, shift, residual, h, mean, rstd, batch, tokens, width, eps, x_dtype, y_dtype, h_dtype,
                        threads))
}

EXPORT LIGHTNINGDIT_NORM_BACKWARD(lightningdit_norm_backward) {
  DISPATCH(norm_backward(grad_residual, grad_h, residual, y, gate, factor, mean, rstd, dx, dy, sums, batch, tokens, width, x_dtype, y_dtype,
                         h_dtype, threads))
}

EXPORT LIGHTNINGDIT_GROUPNORM_FORWARD(lightningdit_groupnorm_forward) {
  DISPATCH(groupnorm_forward(x, weight, bias, out, mean, rstd, scratch, batch, channels, pixels, groups, eps, channels_last, x_dtype,
                             out_dtype, threads))
}

EXPORT LIGHTNINGDIT_GROUPNORM_BACKWARD(lightningdit_groupnorm_backward) {
  DISPATCH(groupnorm_backward(grad, x, weight, bias, mean, rstd, grad_x, sums, scratch, batch, channels, pixels, groups, channels_last,
                              grad_dtype, x_dtype, threads))
}

EXPORT LIGHTNINGDIT_SWIGLU_FORWARD(lightningdit_swiglu_forward) {
  DISPATCH(swiglu_forward(packed, bias, out, rows, hidden, packed_dtype, out_dtype, threads))
}

EXPORT LIGHTNINGDIT_SWIGLU_BACKWARD(lightningdit_swiglu_backward) {
  DISPATCH(swiglu_backward(grad, packed, bias, grad_packed, sums, rows, hidden, grad_dtype, packed_dtype, threads))
}

EXPORT LIGHTNINGDIT_COSINE_FORWARD(lightningdit_cosine_forward) {
  DISPATCH(cosine_forward(z, f, partial, loss, rows, width, target, eps, z_dtype, f_dtype, threads))
}

EXPORT LIGHTNINGDIT_COSINE_BACKWARD(lightningdit_cosine_backward) {
  DISPATCH(cosine_backward(grad, z, f, grad_z, rows, width, target, eps, z_dtype, f_dtype, threads))
}

EXPORT LIGHTNINGDIT_DISTANCE(lightningdit_distance) {
  DISPATCH(distance(z, f, z_inverse, f_inverse, grad_z, loss, partial, scratch, batch, tokens, width, feature_width, margin, eps, z_dtype,
                    f_dtype, threads))
}

EXPORT LIGHTNINGDIT_ATTENTION_SCRATCH(lightningdit_attention_scratch) { DISPATCH(attention_scratch(tokens, head_dim, backward)) }

EXPORT LIGHTNINGDIT_ATTENTION_FORWARD(lightningdit_attention_forward) {
  DISPATCH(attention_forward(qkv, table, bias, q_weight, k_weight, q_bias, k_bias, out, lse, scratch, batch, tokens, heads, head_dim, eps,
                             center, qkv_dtype, out_dtype, threads))
}

EXPORT LIGHTNINGDIT_ATTENTION_BACKWARD(lightningdit_attention_backward) {
  DISPATCH(attention_backward(grad, qkv, lse, table, bias, q_weight, k_weight, q_bias, k_bias, grad_qkv, sums, scratch, batch, tokens,
                              heads, head_dim, eps, center, qkv_dtype, out_dtype, threads))
}
