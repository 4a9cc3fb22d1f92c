// What the kernels share: element types, a vectorisable exp, the split of work over threads.
//
// Every kernel file is compiled once per instruction-set level, with LIGHTNINGDIT_LEVEL naming the level; dispatch.cpp
// chooses at run time. So everything here lives in that namespace, is static, and no standard-library template is used: a copy
// of one, built for AVX-512 and picked by the linker for all, would crash older machines.
#pragma once

#include <stdint.h>
#include <string.h>

// Element types of the C ABI, the numbers of native.py.
enum { LIGHTNINGDIT_F32 = 0, LIGHTNINGDIT_BF16 = 1 };

// Return values of the C ABI.
enum { LIGHTNINGDIT_OK = 0, LIGHTNINGDIT_UNSUPPORTED_DTYPE = 1 };

#ifdef LIGHTNINGDIT_LEVEL
namespace LIGHTNINGDIT_LEVEL {

struct bf16 {
  uint16_t bits;
};

static inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) { return as_float(uint32_t(p->bits) << 16); }

static inline void store(float* p, float x) { *p = x; }

// Round to nearest even. A NaN keeps its upper bits and is made quiet: rounding could turn it into infinity.
static inline void store(bf16* p, float x) {
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t quiet_nan = (bits >> 16) | 0x40u;
  p->bits = uint16_t(x != x ? quiet_nan : rounded);
}

// exp(x) to 1 ulp, over the whole range: overflows to infinity, underflows through the denormals to zero, keeps NaN.
// Branch-free, so that loops around it become SIMD; libm's expf is a call per element. Polynomial: Cephes expf (Moshier).
static inline float exp_f32(float x) {
  x = x < -105.0f ? -105.0f : x;
  x = x > 90.0f ? 90.0f : x;
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  float shifted = x * 1.44269504088896341f + to_integer;
  float n = shifted - to_integer;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors: n reaches 130 and -152, beyond the exponent of one float.
  int32_t k = int32_t(as_bits(shifted) - as_bits(to_integer));
  int32_t half = k >> 1;
  return p * as_float(uint32_t(half + 127) << 23) * as_float(uint32_t(k - half + 127) << 23);
}

// Threads worth waking for `count` elements: below 32,768 each (the grain of ATen) the wake-up costs more than it saves.
static inline int threads_for(int64_t count, int threads) {
  int64_t useful = count / 32768;
  if (useful < 1) return 1;
  return useful < threads ? int(useful) : threads;
}

}  // namespace LIGHTNINGDIT_LEVEL
#endif
