// SPDX-License-Identifier: Apache-2.0
// Rows in and out of the accumulation type A: any dtype, any stride, converted once; and the two transposes that
// put queries into lanes (pack) and take them out again (write).
#pragma once

#include "cpu/microkernel-inl.h"
#include "cpu/shuffle-inl.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"
#include "qkv/problem.h"

namespace qkv::inline QKV_LEVEL {

template <class A>
constexpr DType kDType = sizeof(A) == 4 ? DType::f32 : DType::f64;

// As float_to_bf16 rounds.
QKV_INLINE void round_to_bf16(F x, uint16_t* y) {
  typedef uint16_t Some __attribute__((vector_size(kVectorBytes / 2)));
  const UintVec bits = (UintVec)x, upper = bits >> 16;
  const UintVec near = mutant(8) ? upper : (bits + 0x7fff + (upper & 1)) >> 16;
  const Some rounded = __builtin_convertvector(x == x ? near : upper | 0x40, Some);
  __builtin_memcpy(y, &rounded, sizeof(rounded));
}

// n elements. Rows are short: what a compiler makes of a memcpy takes longer to begin than to copy one.
template <class A>
inline void copy_row(const char* src, int64_t n, char* dst) {
  constexpr int64_t kStep = kVectorBytes, kSize = sizeof(A);
  const int64_t bytes = n * kSize;
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep) __builtin_memcpy(dst + at, src + at, kStep);
  for (; at < bytes; at += kSize) __builtin_memcpy(dst + at, src + at, kSize);
}

// dst[i] = element i of a row of n, stride in elements.
template <class A>
inline void load_row(const char* src, DType t, int64_t stride, int64_t n, A* dst) {
  if (stride == 1 && t == kDType<A>) return copy_row<A>(src, n, reinterpret_cast<char*>(dst));
  const int64_t step = stride * itemsize(t);
  if constexpr (sizeof(A) == 4) {
    if (stride == 1 && t == DType::bf16) {
      const auto* x = reinterpret_cast<const uint16_t*>(src);
      int64_t i = 0;
      for (; i + kLanes<A> <= n; i += kLanes<A>) store(dst + i, load_as<A>(reinterpret_cast<const Bf16*>(x + i)));
      for (; i < n; ++i) dst[i] = bf16_to_float(x[i]);
      return;
    }
    if (stride == 1 && t == DType::f16) {
      const auto* x = reinterpret_cast<const uint16_t*>(src);
      int64_t i = 0;
      for (; i + kHalfLanes <= n; i += kHalfLanes) half_to_float(x + i, dst + i);
      for (; i < n; ++i) dst[i] = f16_to_float(x[i]);
      return;
    }
  }
  switch (t) {
    case DType::f32:
      for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<A>(*reinterpret_cast<const float*>(src + i * step));
      break;
    case DType::f64:
      for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<A>(*reinterpret_cast<const double*>(src + i * step));
      break;
    default:
      for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<A>(load_as_double(src + i * step, t, 0));
  }
}

template <class A>
inline void store_row(const A* src, int64_t n, char* dst, DType t, int64_t stride) {
  if (stride == 1 && t == kDType<A>) return copy_row<A>(reinterpret_cast<const char*>(src), n, dst);
  if constexpr (sizeof(A) == 4) {
    if (stride == 1 && t == DType::bf16) {
      auto* y = reinterpret_cast<uint16_t*>(dst);
      int64_t i = 0;
      for (; i + kLanes<A> <= n; i += kLanes<A>) round_to_bf16(load(src + i), y + i);
      for (; i < n; ++i) y[i] = float_to_bf16(src[i]);
      return;
    }
    if (stride == 1 && t == DType::f16) {
      auto* y = reinterpret_cast<uint16_t*>(dst);
      int64_t i = 0;
      for (; i + kHalfLanes <= n; i += kHalfLanes) float_to_half(src + i, y + i);
      for (; i < n; ++i) y[i] = double_to_f16(src[i]);
      return;
    }
  }
  const int64_t step = stride * itemsize(t);
  for (int64_t i = 0; i < n; ++i) store_from_double(dst + i * step, t, 0, src[i]);
}

// x[i][lane] = row[lane][d0 + i]
template <class A>
QKV_INLINE void lanes_of(const A* const* row, int64_t d0, Vec<A> (&x)[kLanes<A>]) {
  constexpr int w = kLanes<A>;
  unroll<w / 2>([&](auto i) __attribute__((always_inline)) {
    const A *const a = row[i] + d0, *const b = row[w / 2 + i] + d0;
    x[i] = load_halves(a, b);
    x[w / 2 + i] = load_halves(a + w / 2, b + w / 2);
  });
  transpose<A, 1, w / 2>(x);
}

// tile[d][lane] = row[lane][d]: L rows that can be read up to the next multiple of the vector.
template <class A, int NV>
inline void rows_to_lanes(const A* const* row, int64_t n, A* tile) {
  constexpr int w = kLanes<A>, L = NV * w;
  for (int64_t d0 = 0; d0 < n; d0 += w) {
    for (int v = 0; v < NV; ++v) {
      Vec<A> x[w];
      lanes_of<A>(row + v * w, d0, x);
      const int64_t live = n - d0;
      unroll<w>([&](auto i) __attribute__((always_inline)) {  // not a loop, for which x would have to lie in memory
        if (live >= w || i < live) store(tile + (d0 + i) * L + v * w, x[i]);
      });
    }
  }
}

QKV_INLINE void put(F x, float* to) { store(to, x); }
QKV_INLINE void put(D x, double* to) { store(to, x); }
QKV_INLINE void put(F x, uint16_t* to) { round_to_bf16(x, to); }

// row[lane][d] = factor[lane] tile[d][lane], and 0 where keep[lane] is 0 whatever the tile holds; uint16_t is bfloat16.
// Tile and rows are touched up to the next multiple of the vector in d.
template <class A, int NV, class T>
inline void lanes_to_rows(const A* tile, int64_t n, const A* factor, const A* keep, T* const* row) {
  constexpr int w = kLanes<A>, L = NV * w;
  for (int v = 0; v < NV; ++v) {
    const Vec<A> f = load(factor + v * w), k = load(keep + v * w);
    for (int64_t d0 = 0; d0 < n; d0 += w) {
      Vec<A> x[w];
      unroll<w>([&](auto i) __attribute__((always_inline)) {
        x[i] = load(tile + (d0 + i) * L + v * w) * f;
        x[i] = k == Vec<A>{} ? Vec<A>{} : x[i];
      });
      transpose<A>(x);
      unroll<w>([&](auto i) __attribute__((always_inline)) { put(x[i], row[v * w + i] + d0); });
    }
  }
}

// May rows of n elements be read and written as whole vectors of A where they are?
template <class A>
inline bool whole_vectors(const View& view, int64_t n) {
  return view.dtype == kDType<A> && view.d == 1 && n % kLanes<A> == 0;
}

// V as the micro-kernel reads it: panels of kMaxRows columns, key by key, so that the walk down a column is along
// memory. A key's columns start at whole vectors: stores that straddle cache lines would cost more than the gaps. A
// panel goes on for kTailRows columns, so that the products of the last ones stay in theirs.
template <class A>
constexpr int64_t kPitch = round_up(kTailRows<kMaxRows>, kLanes<A>);
template <class A>
constexpr int64_t kPanel = kKeys * kPitch<A> + kLanes<A>;  // panels a line off multiples of the cache's
template <class A>
inline int64_t packed_index(int64_t column, int64_t key) {
  return column / kMaxRows * kPanel<A> + key * kPitch<A> + column % kMaxRows;
}
template <class A>
inline int64_t packed_size(int64_t columns) {
  return (columns / kMaxRows + 1) * kPanel<A>;
}

template <class A>
inline void pack_columns(const A* v, int64_t ldv, int64_t keys, int64_t columns, A* packed) {
  for (int64_t j = 0; j < keys; ++j) {  // along the rows, as they lie in memory
    const A* row = v + j * ldv;
    A* to = packed + j * kPitch<A>;
    int64_t d = 0;
    for (; columns - d >= kPitch<A>; d += kMaxRows, to += kPanel<A>) {
      for (int i = 0; i < kPitch<A>; i += kLanes<A>) store(to + i, load(row + d + i));
    }
    for (; d < columns; d += kMaxRows, to += kPanel<A>) {
      for (int64_t i = 0; i < kMaxRows && d + i < columns; ++i) to[i] = row[d + i];
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
