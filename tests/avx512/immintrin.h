// SPDX-License-Identifier: Apache-2.0
// AVX-512 and AMX for processors without them: the intrinsics that the levels v4, zen4 and amx call, on halves of 32
// bytes or lane by lane. Found in place of the compiler's header where QKV_EMULATE is on (CMakeLists.txt), so that the
// text of these levels, each shuffle and mask of it, is tested on any x86-64 machine with AVX2. What an instruction
// does is from Intel's manual, volume 2; not how fast.
#pragma once
#include_next <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __AVX512F__ 1
#define EMULATED static inline __attribute__((always_inline, artificial))

namespace emulated {

typedef int32_t I32 __attribute__((vector_size(64), may_alias));
typedef uint16_t U16 __attribute__((vector_size(64), may_alias));

template <class Half, class Whole, class Op>
EMULATED Whole by_halves(Whole a, Whole b, Whole c, Op op) {
  Half x[2], y[2], z[2];
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  memcpy(z, &c, 64);
  for (int i = 0; i < 2; ++i) z[i] = op(x[i], y[i], z[i]);
  memcpy(&c, z, 64);
  return c;
}

// --- arithmetic ----------------------------------------------------------------------------------------------

EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m256>(a, b, c, [](auto x, auto y, auto z) { return _mm256_fmadd_ps(x, y, z); });
}
EMULATED __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return by_halves<__m256d>(a, b, c, [](auto x, auto y, auto z) { return _mm256_fmadd_pd(x, y, z); });
}
EMULATED __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
EMULATED __m512d max_pd(__m512d a, __m512d b) { return a > b ? a : b; }
EMULATED __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
EMULATED __m512 rcp14_ps(__m512 a) { return (__m512)((I32)(1 / a) & ~0x3ff); }  // 13 of 23 bits are left

EMULATED __m512 floor_ps(__m512 a) {
  return by_halves<__m256>(a, a, a, [](auto x, auto, auto) { return _mm256_floor_ps(x); });
}
EMULATED __m512 reduce_ps(__m512 a, int control) {  // what a has above its floor; 0 for infinities
  if (control != 9) abort();
  const __m512 size = (__m512)((I32)a & 0x7fffffff);
  return size == __builtin_huge_valf() ? __m512{} : a - floor_ps(a);
}
template <class A, class V, class Power>
EMULATED V scale_lanes(unsigned there, V a, V b, Power power) {  // a 2^floor(b), 0 where it is not wanted
  for (unsigned i = 0; i < 64 / sizeof(A); ++i) {
    const A most = 4000, n = static_cast<A>(__builtin_floor(b[i])), near = n < -most ? -most : (n > most ? most : n);
    a[i] = !(there >> i & 1) ? 0 : (n != n ? n : power(a[i], static_cast<int>(near)));
  }
  return a;
}
EMULATED __m512 maskz_scalef_ps(__mmask16 there, __m512 a, __m512 b) {
  return scale_lanes<float>(there, a, b, [](float x, int n) { return __builtin_ldexpf(x, n); });
}
EMULATED __m512d maskz_scalef_pd(__mmask8 there, __m512d a, __m512d b) {
  return scale_lanes<double>(there, a, b, [](double x, int n) { return __builtin_ldexp(x, n); });
}

// --- bfloat16 ------------------------------------------------------------------------------------------------

EMULATED __m512 without_subnormals(__m512 x) {
  const I32 small = ((I32)x & 0x7fffffff) < 0x00800000;
  return (__m512)((I32)x & ~(small & 0x7fffffff));
}
EMULATED __m512 even_half(__m512 pairs) { return without_subnormals((__m512)((I32)pairs << 16)); }
EMULATED __m512 odd_half(__m512 pairs) { return without_subnormals((__m512)((I32)pairs & (int32_t)0xffff0000u)); }

// The processor has AVX512-BF16, unless QKV_EMULATE_BF16=0 says that it has not, as many of level v4.
inline const bool has_bf16 = !getenv("QKV_EMULATE_BF16") || *getenv("QKV_EMULATE_BF16") != '0';
EMULATED void use_bf16() {
  if (!has_bf16) abort();
}

// c + a b for the odd halves, then for the even ones. The products are exact, no sum is subnormal.
EMULATED __m512 dpbf16_ps(__m512 c, __m512 a, __m512 b) {
  use_bf16();
  const __m512 odd = without_subnormals(fmadd_ps(odd_half(a), odd_half(b), without_subnormals(c)));
  return without_subnormals(fmadd_ps(even_half(a), even_half(b), odd));
}
// To nearest even; NaN stays NaN, subnormals become 0. The second operand's come first.
EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  use_bf16();
  U16 to;
  for (int i = 0; i < 32; ++i) {
    const __m512 x = without_subnormals(i < 16 ? low : high);
    const auto bits = static_cast<uint32_t>(((I32)x)[i % 16]);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return (__m512i)to;
}

// --- masks ---------------------------------------------------------------------------------------------------

template <class Bit>
EMULATED unsigned mask_of(int lanes, Bit bit) {
  unsigned bits = 0;
  for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(bit(i)) << i;
  return bits;
}
EMULATED __mmask16 movepi32_mask(__m512i a) {
  __m256 half[2];
  memcpy(half, &a, 64);
  return static_cast<__mmask16>(_mm256_movemask_ps(half[0]) | _mm256_movemask_ps(half[1]) << 8);
}
EMULATED __mmask8 movepi64_mask(__m512i a) {
  __m256d half[2];
  memcpy(half, &a, 64);
  return static_cast<__mmask8>(_mm256_movemask_pd(half[0]) | _mm256_movemask_pd(half[1]) << 4);
}
template <class V>
EMULATED unsigned not_less(int lanes, V a, V b, int how) {
  if (how != _CMP_NLT_UQ) abort();
  return mask_of(lanes, [&](int i) { return !(a[i] < b[i]); });
}
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) { return static_cast<__mmask16>(not_less(16, a, b, how)); }
EMULATED __mmask8 cmp_pd_mask(__m512d a, __m512d b, int how) { return static_cast<__mmask8>(not_less(8, a, b, how)); }
EMULATED __mmask8 mask_cmpeq_epi64_mask(__mmask8 there, __m512i a, __m512i b) {
  return static_cast<__mmask8>(there & mask_of(8, [&](int i) { return a[i] == b[i]; }));
}

// --- loads and stores ----------------------------------------------------------------------------------------

EMULATED __m512 loadu_ps(const void* p) {
  __m512 x;
  memcpy(&x, p, 64);
  return x;
}
EMULATED void storeu_ps(void* p, __m512 x) { memcpy(p, &x, 64); }
template <class V>
EMULATED V load_where(unsigned there, const void* p, int size) {  // of the rest no memory is read
  char x[64] = {};
  for (int i = 0; i < 64 / size; ++i) {
    if (there >> i & 1) memcpy(x + i * size, static_cast<const char*>(p) + i * size, static_cast<size_t>(size));
  }
  V v;
  memcpy(&v, x, 64);
  return v;
}
EMULATED __m512 maskz_loadu_ps(__mmask16 there, const void* p) { return load_where<__m512>(there, p, 4); }
EMULATED __m512i maskz_loadu_epi64(__mmask8 there, const void* p) { return load_where<__m512i>(there, p, 8); }
EMULATED __m512 set1_ps(float x) { return x - __m512{}; }
EMULATED __m512d set1_pd(double x) { return x - __m512d{}; }
EMULATED __m512i set1_epi64(long long x) { return x - __m512i{}; }

// --- conversions and shuffles --------------------------------------------------------------------------------

template <class Whole, class Half>
EMULATED Whole join(Half low, Half high) {
  const Half both[2] = {low, high};
  Whole x;
  memcpy(&x, both, 64);
  return x;
}
EMULATED __m512 cvtph_ps(__m256i x) {
  return join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
EMULATED __m256i cvtps_ph(__m512 x, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) abort();
  __m256 half[2];
  memcpy(half, &x, 64);
  return _mm256_set_m128i(_mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                          _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EMULATED __m512i cvtepu16_epi32(__m256i x) {
  return join<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                       _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
EMULATED __m512i slli_epi32(__m512i x, int bits) { return (__m512i)((I32)x << bits); }
EMULATED __m512 broadcast_f32x4(__m128 x) { return join<__m512>(_mm256_set_m128(x, x), _mm256_set_m128(x, x)); }
EMULATED __m512 broadcast_f32x8(__m256 x) { return join<__m512>(x, x); }
EMULATED __m512 castps256_ps512(__m256 x) { return join<__m512>(x, x); }
EMULATED __m512d castpd256_pd512(__m256d x) { return join<__m512d>(x, x); }
template <class Whole, class Half>
EMULATED Whole insert_half(Whole a, Half b, int at) {
  Half half[2];
  memcpy(half, &a, 64);
  half[at] = b;
  return join<Whole>(half[0], half[1]);
}
EMULATED __m512 insertf32x8(__m512 a, __m256 b, int at) { return insert_half(a, b, at); }
EMULATED __m512d insertf64x4(__m512d a, __m256d b, int at) { return insert_half(a, b, at); }

template <class... T>
EMULATED __m512i set_epi16(T... from_the_last) {
  const int values[] = {from_the_last...};
  U16 x;
  for (int i = 0; i < 32; ++i) x[i] = static_cast<uint16_t>(values[31 - i]);
  return (__m512i)x;
}
EMULATED __m512i permutexvar_epi16(__m512i order, __m512i a) {
  U16 x;
  for (int i = 0; i < 32; ++i) x[i] = ((U16)a)[((U16)order)[i] & 31];
  return (__m512i)x;
}
EMULATED __m512 permutex2var_ps(__m512 a, __m512i order, __m512 b) {
  __m512 x;
  for (int i = 0; i < 16; ++i) x[i] = (((I32)order)[i] & 16 ? b : a)[((I32)order)[i] & 15];
  return x;
}
EMULATED __m512d permutex2var_pd(__m512d a, __m512i order, __m512d b) {
  __m512d x;
  for (int i = 0; i < 8; ++i) x[i] = (order[i] & 8 ? b : a)[order[i] & 7];
  return x;
}
template <int kFrom>
EMULATED __m512i unpack(__m512i a, __m512i b) {  // four of each eight, in turn
  U16 x;
  for (int i = 0; i < 32; ++i) x[i] = ((U16)(i % 2 ? b : a))[i / 8 * 8 + kFrom + i % 8 / 2];
  return (__m512i)x;
}
EMULATED __m512i unpacklo_epi16(__m512i a, __m512i b) { return unpack<0>(a, b); }
EMULATED __m512i unpackhi_epi16(__m512i a, __m512i b) { return unpack<4>(a, b); }

// --- tile registers ------------------------------------------------------------------------------------------
// Eight of 16 rows of 64 bytes for each thread, which work while it has set them up.

struct TileRegisters {
  bool on = false;
  char row[8][16][64];
};
inline thread_local TileRegisters tiles;

inline char (&tile(int t))[16][64] {
  if (!tiles.on) abort();
  return tiles.row[t];
}
inline void tile_load(int t, const void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(tile(t)[r], static_cast<const char*>(p) + r * row_bytes, 64);
}
inline void tile_store(int t, void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(p) + r * row_bytes, tile(t)[r], 64);
}
inline void tile_zero(int t) { memset(tile(t), 0, sizeof(tiles.row[t])); }
// C[16][16] += A[16][16 pairs] B[16 pairs][16]: the even halves' sum and the odd ones', then both.
inline void tile_dot(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    __m512 even{}, odd{};
    for (int k = 0; k < 16; ++k) {
      int32_t pair;
      memcpy(&pair, tile(a)[m] + 4 * k, 4);
      const __m512 x = (__m512)(pair - I32{}), y = loadu_ps(tile(b)[k]);
      even = without_subnormals(fmadd_ps(even_half(x), even_half(y), even));
      odd = without_subnormals(fmadd_ps(odd_half(x), odd_half(y), odd));
    }
    const __m512 sum = without_subnormals(even + odd);
    storeu_ps(tile(c)[m], without_subnormals(without_subnormals(loadu_ps(tile(c)[m])) + sum));
  }
}

}  // namespace emulated

#define _mm512_broadcast_f32x4 emulated::broadcast_f32x4
#define _mm512_broadcast_f32x8 emulated::broadcast_f32x8
#define _mm512_castpd256_pd512 emulated::castpd256_pd512
#define _mm512_castps256_ps512 emulated::castps256_ps512
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_pd_mask emulated::cmp_pd_mask
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 emulated::insertf32x8
#undef _mm512_insertf64x4
#define _mm512_insertf64x4 emulated::insertf64x4
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_mask_cmpeq_epi64_mask emulated::mask_cmpeq_epi64_mask
#define _mm512_maskz_loadu_epi64 emulated::maskz_loadu_epi64
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_maskz_scalef_pd emulated::maskz_scalef_pd
#define _mm512_maskz_scalef_ps emulated::maskz_scalef_ps
#define _mm512_max_pd emulated::max_pd
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_movepi64_mask emulated::movepi64_mask
#define _mm512_permutex2var_pd emulated::permutex2var_pd
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_rcp14_ps emulated::rcp14_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated::reduce_ps
#define _mm512_set1_epi64 emulated::set1_epi64
#define _mm512_set1_pd emulated::set1_pd
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set_epi16 emulated::set_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_unpackhi_epi16 emulated::unpackhi_epi16
#define _mm512_unpacklo_epi16 emulated::unpacklo_epi16
