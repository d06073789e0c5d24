// SPDX-License-Identifier: Apache-2.0
// What the products for few rows read (few-inl.h): rows of K and V where they lie if whole vectors of A can be loaded
// from there, words of bfloat16 in their own order, and else copies.
#pragma once

#include "cpu/rows-inl.h"

namespace qkv::inline QKV_LEVEL {

// --- rows of K and V -----------------------------------------------------------------------------------------

constexpr int kGroupKeys = 16;  // 8 KiB of K or V at D = 128 in float: a sixth of L1

template <class A>
struct Block {    // rows of K or V as A with unit stride
  const A* data;  // nullptr: still as they are in the array; few rows convert them a group at a time, just before use
  int64_t ld;
  const View* view = nullptr;
  const char* first = nullptr;  // the block's first row
  int64_t columns = 0;
  A* scratch = nullptr;         // kGroupKeys rows
  const Pair* pairs = nullptr;  // or K as pairs of bfloat16, ld of them apart
};

inline bool share_sets(const View& view) { return view.s * itemsize(view.dtype) % 4096 == 0; }

// Rows that share what is loaded, and converted: as many as the registers have sums for, in the scores beside those of
// Q. Two rows of O and four columns at a time would load as often as four and two, but convert twice.
constexpr int kRowsAtOnce = kVectorRegisters == 32 && kFewRows<float> >= 4 ? 4 : 2;
constexpr int kOutputRowsAtOnce = kFewRows<float> >= 4 ? 4 : 2;

// A key's lanes in the score tile of so many rows, each a row of Q, and zeros after the last.
template <class A>
constexpr int few_lanes(int rows) {
  int n = 1;
  while (n < rows && n < kFewRows<A>) n *= 2;
  return n;
}

// Can few rows be read where they are? Not where vectors straddle the row's end, nor, when they are read more than
// twice, where a group's rows share so few sets of the cache that they evict each other.
constexpr int kInPlaceRows = 4;
static_assert(kInPlaceRows <= 2 * kRowsAtOnce);
template <class A>
inline bool read_in_place(const View& view, int64_t columns, int rows) {
  return whole_vectors<A>(view, columns) && (rows <= kInPlaceRows || !share_sets(view));
}

// Rows first ... first + n - 1 of a view, a row of so many columns, as whole vectors padded with 0.
template <class A>
inline void convert_rows(const View& view, const char* first, int64_t n, int64_t columns, A* to) {
  const int64_t ld = round_up(columns, kLanes<A>), step = view.s * itemsize(view.dtype);
  for (int64_t j = 0; j < n; ++j) {
    load_row(first + j * step, view.dtype, view.d, columns, to + j * ld);
    for (int64_t d = columns; d < ld; ++d) to[j * ld + d] = 0;
  }
}

// A row of bfloat16 is read as 32-bit words: the even elements are their low halves, the odd ones their high halves,
// one instruction away from floats each. So Q lies in that order, and O is put back into its own after each group.
template <class T>
constexpr int kHalves = 1;
template <>
constexpr int kHalves<Bf16> = kVectorBytes > 16 || kVectorRegisters == 32 ? 2 : 1;

// Scores of two rows and more take such words as they are where the processor multiplies pairs of bfloat16, and Q is
// words of them, too; their products with V are dots as well (few-pairs-inl.h). One row waits for memory in either
// case, and less so where it asks at the pace of V's products.
struct DotBf16 {
  uint16_t bits;
};
template <>
constexpr int kHalves<DotBf16> = 2;
template <class T>
constexpr bool kDots = false;
template <>
constexpr bool kDots<DotBf16> = true;
template <class T>
constexpr int kFactors = kDots<T> ? 1 : kHalves<T>;  // vectors that a word is in the scores

// Converted in registers, each time that it is loaded: for eight rows at AVX2, which load K four times and V twice, 1.3
// times as fast as a copy. Not by how the array lies: the order of a sum must not depend on that.
template <class A, class T>
inline bool reads_stored(int64_t columns) {
  return columns % (kHalves<T> * kLanes<A>) == 0;
}

template <class A, class T>
QKV_INLINE void load_halves_as(const T* from, Vec<A> (&x)[kHalves<T>]) {
  if constexpr (kHalves<T> == 2) {
    const F words = load(reinterpret_cast<const float*>(from));
    x[0] = low_half(words);
    x[1] = high_half(words);
  } else {
    x[0] = load_as<A>(from);
  }
}

template <class A, class T>
QKV_INLINE void load_factors_as(const T* from, Vec<A> (&x)[kFactors<T>]) {
  if constexpr (kDots<T>) x[0] = load(reinterpret_cast<const float*>(from));
  else load_halves_as<A>(from, x);
}
template <class A, class T>
QKV_INLINE Vec<A> multiply_into(const T*, Vec<A> a, Vec<A> b, Vec<A> c) {
  if constexpr (kDots<T>) return dot_into(a, b, c);
  else return fma_into(a, b, c);
}

// Q, all rows of it, as the words of such K need it.
template <class A>
inline void order_queries(const View& k, int64_t D, int rows, bool dots, A* q, int64_t n) {
  constexpr int w = kLanes<A>;
  if (kHalves<Bf16> == 1 || k.dtype != DType::bf16 || !reads_stored<A, Bf16>(D)) return;
  for (int64_t i = 0; i < n; i += 2 * w) {
    const Vec<A> a = load(q + i), b = load(q + i + w);
    const Vec<A> even = every_other<A, false>(a, b), odd = every_other<A, true>(a, b);
    if constexpr (kPairs && sizeof(A) == 4) {
      if (dots && rows > 1) {
        store(q + i / 2, pair_of(even, odd));
        continue;
      }
    }
    store(q + i, even);
    store(q + i + w, odd);
  }
}

// Rows of 16-bit elements where they lie, or a copy without gaps.
template <class T>
inline Rows<const T> stored_rows(const View& view, const char* first, int64_t n, int64_t columns, void* scratch) {
  const T* const x = reinterpret_cast<const T*>(first);
  if (view.d == 1) return {x, view.s};
  T* const to = static_cast<T*>(scratch);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < columns; ++d) to[j * columns + d] = x[j * view.s + d * view.d];
  }
  return {to, columns};
}

// Calls use(rows) with keys j0 ... j0 + n - 1 of a block, as they are stored or converted, for rows with N lanes
// (few_lanes). With tile registers bfloat16 of two and more is always dots: the other is not compiled.
template <int N, class A, class Use>
QKV_INLINE void with_group(const Block<A>& block, int64_t j0, int64_t n, bool dots, const Use& use) {
  if (block.data) return use(Rows<const A>{block.data + j0 * block.ld, block.ld});
  const View& view = *block.view;
  const char* const first = block.first + j0 * view.s * itemsize(view.dtype);
  if constexpr (sizeof(A) == 4) {
    if (view.dtype == DType::bf16 && reads_stored<A, Bf16>(block.columns)) {
      if constexpr (kPairs && N > 1) {
        if (dots || kTileUnit) return use(stored_rows<DotBf16>(view, first, n, block.columns, block.scratch));
      }
      if constexpr (!kTileUnit || N == 1) {
        return use(stored_rows<Bf16>(view, first, n, block.columns, block.scratch));
      }
    }
    if (view.dtype == DType::f16 && reads_stored<A, Half>(block.columns)) {
      return use(stored_rows<Half>(view, first, n, block.columns, block.scratch));
    }
  }
  convert_rows(view, first, n, block.columns, block.scratch);
  use(Rows<const A>{block.scratch, block.ld});
}

}  // namespace qkv::inline QKV_LEVEL
