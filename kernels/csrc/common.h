// What the kernels share: element types, a vectorisable exp, the split of work over threads.
//
// Every kernel file is compiled once per instruction-set level, with LIGHTNINGDIT_LEVEL naming the level; dispatch.cpp
// chooses at run time. So everything here lives in that namespace, is static, and no standard-library template is used: a copy
// of one, built for AVX-512 and picked by the linker for all, would crash older machines.
#pragma once

#include <stdint.h>
#include <string.h>

// Element types of the C ABI, the numbers of native.py.
enum { LIGHTNINGDIT_F32 = 0, LIGHTNINGDIT_BF16 = 1, LIGHTNINGDIT_F16 = 2 };

// Return values of the C ABI.
enum { LIGHTNINGDIT_OK = 0, LIGHTNINGDIT_UNSUPPORTED_DTYPE = 1 };

#ifdef LIGHTNINGDIT_LEVEL
namespace LIGHTNINGDIT_LEVEL {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
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

// fp16 in integer and fp32 arithmetic without branches, so that loops around it become SIMD at every level; GCC 12 leaves loops
// over _Float16 scalar, F16C or not. Exponents are moved by exact multiplications; a denormal is the mantissa of a number near 1/2.
static inline float load(const fp16* p) {
  const uint32_t word = uint32_t(p->bits) << 16, magnitude = word + word;
  const float normal = as_float((magnitude >> 4) + 0x70000000u) * 0x1p-112f;  // infinity and NaN come out as themselves
  const float denormal = as_float((magnitude >> 17) | 0x3f000000u) - 0.5f;
  return as_float((word & 0x80000000u) | as_bits(magnitude < 0x08000000u ? denormal : normal));
}

static inline void store(float* p, float x) { *p = x; }

// Round to nearest even. A NaN keeps its upper bits and is made quiet: rounding could turn it into infinity.
static inline void store(bf16* p, float x) {
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t quiet_nan = (bits >> 16) | 0x40u;
  p->bits = uint16_t(x != x ? quiet_nan : rounded);
}

// Round to nearest even, above 65504 to infinity: adding a power of two that is 2^13 units above leaves fp16's bits, rounded by the addition.
static inline void store(fp16* p, float x) {
  const uint32_t word = as_bits(x), magnitude = word + word;
  const float value = as_float(word & 0x7fffffffu) * 0x1p112f * 0x1p-110f;  // 4 |x|, or infinity for what has no place in fp16
  uint32_t exponent = magnitude & 0xff000000u;
  exponent = exponent < 0x71000000u ? 0x71000000u : exponent;  // denormals all have the smallest
  const uint32_t rounded = as_bits(as_float((exponent >> 1) + 0x07800000u) + value);
  const uint32_t bits = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  p->bits = uint16_t(((word >> 16) & 0x8000u) | (magnitude > 0xff000000u ? 0x7e00u : bits));
}

// Calls call(A(), B()) with the element types that the numbers a and b name; bf16 and fp16 do not meet in one kernel.
template <typename Call>
static int with_type(int dtype, Call call) {
  switch (dtype) {
    case LIGHTNINGDIT_F32: return call(float());
    case LIGHTNINGDIT_BF16: return call(bf16());
    case LIGHTNINGDIT_F16: return call(fp16());
  }
  return LIGHTNINGDIT_UNSUPPORTED_DTYPE;
}

template <typename A, typename B>
constexpr bool meet = true;
template <>
constexpr bool meet<bf16, fp16> = false;
template <>
constexpr bool meet<fp16, bf16> = false;

template <typename Call>
static int with_types(int a, int b, Call call) {
  return with_type(a, [&](auto first) {
    return with_type(b, [&](auto second) {
      if constexpr (meet<decltype(first), decltype(second)>) return call(first, second);
      else return int(LIGHTNINGDIT_UNSUPPORTED_DTYPE);
    });
  });
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
