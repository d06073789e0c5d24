// SPDX-License-Identifier: Apache-2.0
// Pairs of bfloat16 in vectors, and their dot where the level has one; else the same names without an effect.
#pragma once

#include "cpu/simd.h"

namespace qkv::inline QKV_LEVEL {

// A lane of 32 bits holds two neighbours along the summed index, the first in its low half.
typedef uint32_t UintVec __attribute__((vector_size(kVectorBytes)));
struct __attribute__((packed, aligned(2))) Pair {
  uint32_t bits;
};
QKV_INLINE F splat(Pair x) { return (F)(static_cast<int32_t>(x.bits) - IntVec<float>{}); }
QKV_INLINE F pair_of(F low, F high) {  // of values that are bfloat16 already
  return (F)((IntVec<float>)((UintVec)low >> 16) | ((IntVec<float>)high & static_cast<int32_t>(0xffff0000u)));
}
QKV_INLINE F low_half(F pair) { return (F)((IntVec<float>)pair << 16); }
QKV_INLINE F high_half(F pair) { return (F)((IntVec<float>)pair & static_cast<int32_t>(0xffff0000u)); }
#if defined(__AVX512F__)
// Two instructions are AVX512-BF16's, which not all processors of level v4 have: Plan::pairs. Written out, so that they
// are compiled with the rest of the level and no compiler takes them for other work.
constexpr bool kPairs = true;
#if defined(QKV_EMULATED)
QKV_INLINE F round_halves(F low, F high) { return (F)emulated::cvtne2ps_pbh((__m512)high, (__m512)low); }
QKV_INLINE F dot_into(F a, F b, F c) { return (F)emulated::dpbf16_ps((__m512)c, (__m512)a, (__m512)b); }
#else
QKV_INLINE F round_halves(F low, F high) {  // those of low first
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(low) : "v"(low), "v"(high));
  return low;
}
// c + a b for both halves, in c's register.
QKV_INLINE F dot_into(F a, F b, F c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#endif
QKV_INLINE F round_pair(F low, F high) {  // to nearest even; NaN stays NaN, subnormals become 0
  const __m512i halves = (__m512i)round_halves(low, high);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (F)_mm512_permutexvar_epi16(order, halves);
}
// Pairs of neighbours in `even` and `odd`: those of the first and of the second four of each eight halves.
QKV_INLINE F low_pairs(F even, F odd) { return (F)_mm512_unpacklo_epi16((__m512i)even, (__m512i)odd); }
QKV_INLINE F high_pairs(F even, F odd) { return (F)_mm512_unpackhi_epi16((__m512i)even, (__m512i)odd); }
// The lanes of `there`, 0 in the others, of which no memory is read.
QKV_INLINE F load_lanes(uint32_t there, const float* p) {
  return (F)_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), p);
}
// Lane t is lane[t] of a and b, one after the other.
QKV_INLINE F choose_lanes(F a, F b, IntVec<float> lane) {
  return (F)_mm512_permutex2var_ps((__m512)a, (__m512i)lane, (__m512)b);
}
#else
constexpr bool kPairs = false;
QKV_INLINE F round_pair(F low, F) { return low; }
QKV_INLINE F low_pairs(F even, F) { return even; }
QKV_INLINE F high_pairs(F even, F) { return even; }
QKV_INLINE F load_lanes(uint32_t, const float* p) { return load(p); }
QKV_INLINE F choose_lanes(F a, F, IntVec<float>) { return a; }
QKV_INLINE F dot_into(F, F, F c) { return c; }
#endif

}  // namespace qkv::inline QKV_LEVEL
