// SPDX-License-Identifier: Apache-2.0
// The two products for few rows (decoding), with head_dim in the lanes.
//
//     s[key][row] = sum over d of q[row][d] k[key][d],   o[row][d] += sum over keys of p[key][row] v[key][d]
//
// With queries in the lanes a single row would use one lane in kLanes; here a row of K or V is a run of full vectors,
// read once per row of the group from L1 and once per block from memory. Scores land in the same S^T tile, one lane a
// row, so masks, modifiers and softmax are the same text. Row-major operands: Q and O are (rows, ld) with ld a multiple
// of the vector; K and V rows are full vectors too (load_block pads where head_dim is not).
//
// Cost per key and row: D / lanes fma, 3 shuffles and adds of the tree, 4 of the transpose, Dv / lanes fma, against
// (D + Dv) NV fma for all lanes together: worth it up to half the lanes (tiles.h).
#pragma once

#include "cpu/rows-inl.h"

namespace qkv::inline QKV_LEVEL {

// x[0 ... kLanes - 1] -> the vector of their sums: lane i is the sum of the lanes of x[i].
template <class A, int N = kLanes<A>, int S = 1>
QKV_INLINE Vec<A> sum_lanes(Vec<A> (&x)[kLanes<A>]) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    unroll<N / 2>([&](auto i) __attribute__((always_inline)) {
      const Vec<A> a = x[2 * i], b = x[2 * i + 1];
      x[i] = exchange_lanes<A, S, false>(a, b) + exchange_lanes<A, S, true>(a, b);
    });
    return sum_lanes<A, N / 2, S * 2>(x);
  }
}

// Scores of keys lo ... hi - 1 of a block for `rows` rows; top[lane] = max(top, s).
template <class A>
inline void score_few(const A* k, int64_t ldk, const A* q, int64_t ldq, int rows, int lo, int hi, A* s, Vec<A>& top,
                      Ahead& next) {
  constexpr int w = kLanes<A>;
  for (int j0 = lo; j0 < hi; j0 += w) {
    const A* key[w];  // past the end: the last key again, and its score is not kept
    unroll<w>([&](auto i) __attribute__((always_inline)) { key[i] = k + (j0 + i < hi ? j0 + i : hi - 1) * ldk; });
    Vec<A> tile[w] = {};
    for (int r = 0; r < rows; ++r) {
      fetch(next);
      const A* row = q + r * ldq;
      Vec<A> sum[w] = {};
      for (int64_t d = 0; d < ldq; d += w) {
        const Vec<A> x = load(row + d);
        unroll<w>([&](auto i) __attribute__((always_inline)) { sum[i] = fma(x, load(key[i] + d), sum[i]); });
      }
      tile[r] = sum_lanes<A>(sum);
    }
    transpose<A>(tile);
    for (int i = 0; i < w && j0 + i < hi; ++i) {
      store(s + (j0 + i) * w, tile[i]);
      top = maximum(top, tile[i]);
    }
  }
}

template <int C, class A>
QKV_INLINE void output_few_columns(const A* v, int64_t ldv, const A* p, int keys, A* o) {
  constexpr int w = kLanes<A>;
  Vec<A> sum[C];
  unroll<C>([&](auto c) __attribute__((always_inline)) { sum[c] = load(o + c * w); });
  for (int j = 0; j < keys; ++j) {
    const Vec<A> x = splat(p[j * w]);
    unroll<C>([&](auto c) __attribute__((always_inline)) { sum[c] = fma(x, load(v + j * ldv + c * w), sum[c]); });
  }
  unroll<C>([&](auto c) __attribute__((always_inline)) { store(o + c * w, sum[c]); });
}

// o += p v over keys lo ... hi - 1; lane r of p is row r. Sixteen keys at a time stay in L1 for all rows.
template <class A>
inline void output_few(const A* v, int64_t ldv, const A* p, int rows, int lo, int hi, A* o, int64_t ldo, Ahead& next) {
  constexpr int w = kLanes<A>, kGroup = 16;
  for (int j0 = lo; j0 < hi; j0 += kGroup) {
    const int keys = hi - j0 < kGroup ? hi - j0 : kGroup;
    for (int r = 0; r < rows; ++r) {
      const A *values = v + j0 * ldv, *weights = p + j0 * w + r;
      A* out = o + r * ldo;
      fetch(next);
      int64_t d = 0;
      for (; d + 8 * w <= ldo; d += 8 * w) output_few_columns<8>(values + d, ldv, weights, keys, out + d);
      for (; d + 4 * w <= ldo; d += 4 * w) output_few_columns<4>(values + d, ldv, weights, keys, out + d);
      for (; d + 2 * w <= ldo; d += 2 * w) output_few_columns<2>(values + d, ldv, weights, keys, out + d);
      for (; d < ldo; d += w) output_few_columns<1>(values + d, ldv, weights, keys, out + d);
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
