// SPDX-License-Identifier: Apache-2.0
// Vectors as compiler vector extensions: operators come from the language, and what it lacks (fma, max, floor,
// shuffles, conversions) is one leaf per level below. The width follows from the level's flags.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/unroll-inl.h"
#include "qkv/dtype.h"

namespace qkv::inline QKV_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class A>
struct Lane;
template <>
struct Lane<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float InMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  using Int = int32_t;
};
template <>
struct Lane<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double InMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  using Int = int64_t;
};
template <class A>
using Vec = typename Lane<A>::V;
template <class A>
using IntVec = typename Lane<A>::I;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <class A>
constexpr A kInf = static_cast<A>(__builtin_huge_val());
using F = Vec<float>;
using D = Vec<double>;

template <class A>
QKV_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // x - 0 keeps every x, -0 and NaN included
}
// Not by memcpy: GCC would load integers, and carry them to the float registers through the stack.
template <class A>
QKV_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Lane<A>::InMemory*>(p);
}
template <class A>
QKV_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Lane<A>::InMemory*>(p) = v;
}

// The compiler must not see how this pointer relates to others: of all their sums it would keep one each, on the stack.
template <class T>
QKV_INLINE void forget(T*& p) {
  asm("" : "+r"(p));
}

template <class T>
struct UnalignedOf {
  typedef T Type __attribute__((aligned(1), may_alias));
};
template <class T>
using Unaligned = typename UnalignedOf<T>::Type;

template <class A>
QKV_INLINE Vec<A> absolute(Vec<A> x) {
  constexpr auto kSign = static_cast<typename Lane<A>::Int>(typename Lane<A>::Int{1} << (8 * sizeof(A) - 1));
  return (Vec<A>)((IntVec<A>)x & ~kSign);
}

// Zero that is made anew: as copies of one register, two dozen of them take a unit that multiplies.
template <class A>
QKV_INLINE Vec<A> zero() {
  Vec<A> x{};
#if defined(__AVX512F__) && !defined(QKV_EMULATED)
  asm("vpxord %0, %0, %0" : "=v"(x));
#endif
  return x;
}

// --- leaves: fma, floor, max, any ----------------------------------------------------------------------------
// maximum(a, b) is a > b ? a : b, so that a NaN in b comes through. reciprocal_estimate is 1 / x to 12 bits or more.
#if defined(__AVX512F__)
QKV_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
QKV_INLINE D fma(D a, D b, D c) { return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
// c + a b in c's register: left to choose, compilers overwrite a or b and then need moves.
#if defined(QKV_EMULATED)
QKV_INLINE F fma_into(F a, F b, F c) { return fma(a, b, c); }
QKV_INLINE D fma_into(D a, D b, D c) { return fma(a, b, c); }
#else
QKV_INLINE F fma_into(F a, F b, F c) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
QKV_INLINE D fma_into(D a, D b, D c) {
  asm("vfmadd231pd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#endif
QKV_INLINE F maximum(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
QKV_INLINE F minimum(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
QKV_INLINE F reciprocal_estimate(F a) { return (F)_mm512_rcp14_ps((__m512)a); }
QKV_INLINE D maximum(D a, D b) { return (D)_mm512_max_pd((__m512d)a, (__m512d)b); }
QKV_INLINE bool any(IntVec<float> m) { return _mm512_movepi32_mask((__m512i)m) != 0; }
QKV_INLINE bool any(IntVec<double> m) { return _mm512_movepi64_mask((__m512i)m) != 0; }
#elif defined(__AVX2__)
QKV_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
QKV_INLINE D fma(D a, D b, D c) { return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
// c + a b in c's register: left to choose, compilers overwrite a or b, and keep them on the stack for it.
QKV_INLINE F fma_into(F a, F b, F c) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  return c;
}
QKV_INLINE D fma_into(D a, D b, D c) {
  asm("vfmadd231pd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  return c;
}
// b in memory: with 16 registers there may be none for it.
QKV_INLINE F fma_from(const float* b, F a, F c) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "m"(*reinterpret_cast<const Lane<float>::InMemory*>(b)));
  return c;
}
QKV_INLINE F maximum(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
QKV_INLINE F minimum(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
QKV_INLINE F reciprocal_estimate(F a) { return (F)_mm256_rcp_ps((__m256)a); }
QKV_INLINE D maximum(D a, D b) { return (D)_mm256_max_pd((__m256d)a, (__m256d)b); }
QKV_INLINE F floor(F a) { return (F)_mm256_floor_ps((__m256)a); }
QKV_INLINE D floor(D a) { return (D)_mm256_floor_pd((__m256d)a); }
QKV_INLINE bool any(IntVec<float> m) { return _mm256_movemask_ps((__m256)m) != 0; }
QKV_INLINE bool any(IntVec<double> m) { return _mm256_movemask_pd((__m256d)m) != 0; }
#elif defined(__x86_64__)
QKV_INLINE F fma(F a, F b, F c) { return a * b + c; }
QKV_INLINE D fma(D a, D b, D c) { return a * b + c; }
QKV_INLINE F fma_into(F a, F b, F c) {
  asm("mulps %2, %1\n\taddps %1, %0" : "+x"(c), "+x"(a) : "x"(b));
  return c;
}
QKV_INLINE D fma_into(D a, D b, D c) {
  asm("mulpd %2, %1\n\taddpd %1, %0" : "+x"(c), "+x"(a) : "x"(b));
  return c;
}
QKV_INLINE F maximum(F a, F b) { return (F)_mm_max_ps((__m128)a, (__m128)b); }
QKV_INLINE F minimum(F a, F b) { return (F)_mm_min_ps((__m128)a, (__m128)b); }
QKV_INLINE F reciprocal_estimate(F a) { return (F)_mm_rcp_ps((__m128)a); }
QKV_INLINE D maximum(D a, D b) { return (D)_mm_max_pd((__m128d)a, (__m128d)b); }
QKV_INLINE F floor(F a) { return (F)_mm_floor_ps((__m128)a); }
QKV_INLINE D floor(D a) { return (D)_mm_floor_pd((__m128d)a); }
QKV_INLINE bool any(IntVec<float> m) { return _mm_movemask_ps((__m128)m) != 0; }
QKV_INLINE bool any(IntVec<double> m) { return _mm_movemask_pd((__m128d)m) != 0; }
#elif defined(__aarch64__)
QKV_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
QKV_INLINE D fma(D a, D b, D c) { return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
QKV_INLINE F fma_into(F a, F b, F c) { return fma(a, b, c); }  // one instruction, always in c's register
QKV_INLINE D fma_into(D a, D b, D c) { return fma(a, b, c); }
QKV_INLINE F maximum(F a, F b) { return a > b ? a : b; }
QKV_INLINE F minimum(F a, F b) { return (F)vminq_f32((float32x4_t)a, (float32x4_t)b); }
QKV_INLINE F reciprocal_estimate(F a) {  // 8 bits, and a step
  const float32x4_t x = (float32x4_t)a, r = vrecpeq_f32(x);
  return (F)vmulq_f32(r, vrecpsq_f32(x, r));
}
QKV_INLINE D maximum(D a, D b) { return a > b ? a : b; }
QKV_INLINE F floor(F a) { return (F)vrndmq_f32((float32x4_t)a); }
QKV_INLINE D floor(D a) { return (D)vrndmq_f64((float64x2_t)a); }
QKV_INLINE bool any(IntVec<float> m) { return vmaxvq_u32((uint32x4_t)m) != 0; }
QKV_INLINE bool any(IntVec<double> m) { return vmaxvq_u32((uint32x4_t)m) != 0; }
#endif

// --- leaves: float16 and boolean rows ------------------------------------------------------------------------
#if defined(__AVX512F__)
constexpr int kHalfLanes = 16;
QKV_INLINE void half_to_float(const uint16_t* x, float* y) {
  _mm512_storeu_ps(y, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
}
QKV_INLINE void float_to_half(const float* x, uint16_t* y) {
  const __m256i h = _mm512_cvtps_ph(_mm512_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), h);
}
#elif defined(__F16C__)
constexpr int kHalfLanes = 8;
QKV_INLINE void half_to_float(const uint16_t* x, float* y) {
  _mm256_storeu_ps(y, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
QKV_INLINE void float_to_half(const float* x, uint16_t* y) {
  const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), h);
}
#elif defined(__aarch64__)
constexpr int kHalfLanes = 4;
QKV_INLINE void half_to_float(const uint16_t* x, float* y) {
  vst1q_f32(y, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))));
}
QKV_INLINE void float_to_half(const float* x, uint16_t* y) {
  vst1_u16(y, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x))));
}
#else
constexpr int kHalfLanes = 1;
QKV_INLINE void half_to_float(const uint16_t* x, float* y) { *y = f16_to_float(*x); }
QKV_INLINE void float_to_half(const float* x, uint16_t* y) { *y = double_to_f16(*x); }
#endif

// Vectors of A from what is stored: A itself or, for float, one of the 16-bit types.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
template <class A>
QKV_INLINE Vec<A> load_as(const A* p) {
  return load(p);
}
#if defined(__AVX512F__)
template <class A>
QKV_INLINE F load_as(const Bf16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}
template <class A>
QKV_INLINE F load_as(const Half* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#else
template <class A>
QKV_INLINE F load_as(const Bf16* p) {
#if defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2)));
  Bits x;
  __builtin_memcpy(&x, p, sizeof(x));
  return (F)(__builtin_convertvector(x, IntVec<float>) << 16);
#endif
}
template <class A>
QKV_INLINE F load_as(const Half* p) {
#if defined(__AVX2__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#else
  float x[kLanes<float>];
  const auto* bits = reinterpret_cast<const uint16_t*>(p);
  for (int i = 0; i < kLanes<float>; i += kHalfLanes) half_to_float(bits + i, x + i);
  return load(x);
#endif
}
#endif

// Bit t says whether x[t] is y; n <= 32.
QKV_INLINE uint32_t equal_words(const int64_t* x, int64_t y, int n) {
  uint32_t bits = 0;
  int t = 0;
#if defined(__AVX512F__)
  for (; t < n; t += 8) {
    const auto there = static_cast<__mmask8>(n - t < 8 ? (1 << (n - t)) - 1 : 0xff);
    const __m512i eight = _mm512_maskz_loadu_epi64(there, x + t);
    bits |= static_cast<uint32_t>(_mm512_mask_cmpeq_epi64_mask(there, eight, _mm512_set1_epi64(y))) << t;
  }
#endif
  for (; t < n; ++t) bits |= static_cast<uint32_t>(x[t] == y) << t;
  return bits;
}

// Bit t says whether byte t of 32 is not zero.
QKV_INLINE uint32_t nonzero_bytes(const uint8_t* x) {
#if defined(__AVX2__)
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
#elif defined(__x86_64__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16));
  const int lo = _mm_movemask_epi8(_mm_cmpeq_epi8(a, zero)), hi = _mm_movemask_epi8(_mm_cmpeq_epi8(b, zero));
  return ~(static_cast<uint32_t>(lo) | static_cast<uint32_t>(hi) << 16);
#else
  uint32_t bits = 0;
  for (int t = 0; t < 32; ++t) bits |= static_cast<uint32_t>(x[t] != 0) << t;
  return bits;
#endif
}

// --- leaves: loads in place of shuffles ----------------------------------------------------------------------
// Lane t is p[t % N]: loads alone, where a shuffle would wait for the one unit that does them.
template <int N, class A>
QKV_INLINE Vec<A> repeat(const A* p) {
  [[maybe_unused]] constexpr int kBytes = N * static_cast<int>(sizeof(A));
  if constexpr (N == 1) return splat(*p);
  if constexpr (N == kLanes<A>) return load(p);
#if defined(__AVX512F__)
  if constexpr (kBytes == 8) return (Vec<A>)_mm512_set1_pd(*reinterpret_cast<const Unaligned<double>*>(p));
  if constexpr (kBytes == 16) return (Vec<A>)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
  if constexpr (kBytes == 32) return (Vec<A>)_mm512_broadcast_f32x8(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
#elif defined(__AVX2__)
  if constexpr (kBytes == 8) return (Vec<A>)_mm256_set1_pd(*reinterpret_cast<const Unaligned<double>*>(p));
  if constexpr (kBytes == 16) return (Vec<A>)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  Vec<A> x;
  for (int t = 0; t < kLanes<A>; ++t) x[t] = p[t % N];
  return x;
}

// Half a vector from each of two places: what the last stage would make of whole ones, but by loading, where the other
// stages wait for the one unit that shuffles.
#if defined(__AVX512F__)
QKV_INLINE F load_halves(const float* low, const float* high) {
  return (F)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
QKV_INLINE D load_halves(const double* low, const double* high) {
  return (D)_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(low)), _mm256_loadu_pd(high), 1);
}
#elif defined(__AVX2__)
QKV_INLINE F load_halves(const float* low, const float* high) {
  return (F)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
QKV_INLINE D load_halves(const double* low, const double* high) {
  return (D)_mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(low)), _mm_loadu_pd(high), 1);
}
#else
template <class A>
QKV_INLINE Vec<A> load_halves(const A* low, const A* high) {
  Vec<A> x;
  __builtin_memcpy(&x, low, sizeof(x) / 2);
  __builtin_memcpy(reinterpret_cast<char*>(&x) + sizeof(x) / 2, high, sizeof(x) / 2);
  return x;
}
#endif

}  // namespace qkv::inline QKV_LEVEL
