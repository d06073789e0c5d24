// SPDX-License-Identifier: Apache-2.0
// The two products for few rows (decoding), with head_dim in the lanes.
//
//     s[key][row] = sum over d of q[row][d] k[key][d],   o[row][d] += sum over keys of p[key][row] v[key][d]
//
// With queries in the lanes a single row would use one lane in kLanes; here a row of K or V is a run of full vectors.
// Keys are taken kGroupKeys at a time: read once from memory, converted where they are not whole vectors of A, and
// used from L1 by all rows of the group, two at a time. Scores land in the same S^T tile, one lane a row, so masks,
// modifiers and softmax are the same text. Row-major operands: Q and O are (rows, ld) with ld a multiple of the vector.
//
// Cost per key and row: D / lanes fma, 3 shuffles and adds of the tree, 4 of the transpose for all rows, Dv / lanes
// fma, against (D + Dv) NV fma for all lanes together: worth it up to half the lanes (tiles.h).
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

// Can few rows be read where they are? Not where vectors straddle the row's end, nor, when they are read more than
// once, where a group's rows share so few sets of the cache that they evict each other.
template <class A>
inline bool read_in_place(const View& view, int64_t columns, int rows) {
  return whole_vectors<A>(view, columns) && (rows <= 2 || !share_sets(view));
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

// Converting in registers beats a copy in L1 while a value is loaded no more than twice.
constexpr int kDirectRows = 4;

template <class A, class T, class Use>
QKV_INLINE void with_half_rows(const Block<A>& block, const char* first, int64_t n, int rows, const Use& use) {
  const Rows<const T> stored{reinterpret_cast<const T*>(first), block.view->s};
  if (rows <= kDirectRows) return use(stored);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < block.ld; d += kLanes<A>) {
      store(block.scratch + j * block.ld + d, load_as<A>(stored.data + j * stored.ld + d));
    }
  }
  use(Rows<const A>{block.scratch, block.ld});
}

// Calls use(rows) with keys j0 ... j0 + n - 1 of a block, read where they are or converted.
template <class A, class Use>
QKV_INLINE void with_group(const Block<A>& block, int64_t j0, int64_t n, int rows, const Use& use) {
  if (block.data) return use(Rows<const A>{block.data + j0 * block.ld, block.ld});
  const View& view = *block.view;
  const char* const first = block.first + j0 * view.s * itemsize(view.dtype);
  if constexpr (sizeof(A) == 4) {
    if (view.d == 1 && block.columns == block.ld) {
      if (view.dtype == DType::bf16) return with_half_rows<A, Bf16>(block, first, n, rows, use);
      if (view.dtype == DType::f16) return with_half_rows<A, Half>(block, first, n, rows, use);
    }
  }
  convert_rows(view, first, n, block.columns, block.scratch);
  use(Rows<const A>{block.scratch, block.ld});
}

// --- scores --------------------------------------------------------------------------------------------------

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

// Scores of R rows against kLanes / R keys: lane r kLanes / R + i is that of row r and key i.
template <int R, class A, class T>
QKV_INLINE Vec<A> score_rows_of_keys(const T* const* key, const A* q, int64_t ldq, Ahead& next) {
  constexpr int w = kLanes<A>, n = w / R;
  Vec<A> sum[w] = {};
  for (int64_t d = 0; d < ldq; d += w) {
    fetch(next);
    Vec<A> x[R];
    unroll<R>([&](auto r) __attribute__((always_inline)) { x[r] = load(q + r * ldq + d); });
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      const Vec<A> k = load_as<A>(key[i] + d);
      unroll<R>([&](auto r) __attribute__((always_inline)) { sum[r * n + i] = fma_into(x[r], k, sum[r * n + i]); });
    });
  }
  return sum_lanes<A>(sum);
}

// Scores of the kLanes keys of a group from j0 on.
template <class A, class T>
QKV_INLINE void score_group(const Rows<const T>& k, const A* q, int64_t ldq, int rows, int j0, int keys, A* s,
                            Vec<A>& top, Ahead& next) {
  constexpr int w = kLanes<A>;
  const T* key[w];  // past the end: the last key again, and its score is not kept
  unroll<w>([&](auto i)
                __attribute__((always_inline)) { key[i] = k.data + (j0 + i < keys ? j0 + i : keys - 1) * k.ld; });
  Vec<A> tile[w];
  unroll<w>([&](auto i) __attribute__((always_inline)) { tile[i] = Vec<A>{}; });
  int r = 0;
  for (; r + 2 <= rows; r += 2) {
    const Vec<A> a = score_rows_of_keys<2>(key, q + r * ldq, ldq, next);
    const Vec<A> b = score_rows_of_keys<2>(key + w / 2, q + r * ldq, ldq, next);
    tile[r] = exchange_lanes<A, w / 2, false>(a, b);
    tile[r + 1] = exchange_lanes<A, w / 2, true>(a, b);
  }
  if (r < rows) tile[r] = score_rows_of_keys<1>(key, q + r * ldq, ldq, next);
  transpose<A>(tile);
  Vec<A> best = top;
  for (int i = 0; i < w && j0 + i < keys; ++i) {
    store(s + (j0 + i) * w, tile[i]);
    best = maximum(best, tile[i]);
  }
  top = best;
}

// Scores of keys lo ... hi - 1 of a block for `rows` rows; top[lane] = max(top, s).
template <class A>
inline void score_few(const Block<A>& k, const A* q, int64_t ldq, int rows, int lo, int hi, A* s, Vec<A>& top,
                      Ahead& next) {
  for (int g0 = lo; g0 < hi; g0 += kGroupKeys) {
    const int keys = hi - g0 < kGroupKeys ? hi - g0 : kGroupKeys;
    with_group(k, g0, keys, rows, [&](const auto& group) __attribute__((always_inline)) {
      for (int j0 = 0; j0 < keys; j0 += kLanes<A>) {
        score_group(group, q, ldq, rows, j0, keys, s + g0 * kLanes<A>, top, next);
      }
    });
  }
}

// --- output --------------------------------------------------------------------------------------------------

constexpr int kMostColumns = kVectorRegisters == 32 ? 8 : 4;  // vectors of two rows' O in registers

// R rows, C vectors of columns: o += p v over the keys of a group.
template <int R, int C, class A, class T>
QKV_INLINE void output_columns(const Rows<const T>& v, int64_t d, const A* p, int keys, A* o, int64_t ldo,
                               Ahead& next) {
  constexpr int w = kLanes<A>;
  Vec<A> sum[R][C];
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<C>([&](auto c) __attribute__((always_inline)) { sum[r][c] = zero<A>(); });
  });
  for (int j = 0; j < keys; ++j) {
    fetch(next);
    Vec<A> x[R];
    unroll<R>([&](auto r) __attribute__((always_inline)) { x[r] = splat(p[j * w + r]); });
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      const Vec<A> y = load_as<A>(v.data + j * v.ld + d + c * w);
      unroll<R>([&](auto r) __attribute__((always_inline)) { sum[r][c] = fma_into(x[r], y, sum[r][c]); });
    });
  }
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      A* to = o + r * ldo + d + c * w;
      store(to, load(to) + sum[r][c]);
    });
  });
}

template <int R, class A, class T>
QKV_INLINE void output_rows_of_group(const Rows<const T>& v, const A* p, int keys, A* o, int64_t ldo, Ahead& next) {
  constexpr int w = kLanes<A>, kMost = kMostColumns;
  int64_t d = 0;
  for (; d + kMost * w <= ldo; d += kMost * w) output_columns<R, kMost>(v, d, p, keys, o, ldo, next);
  for (; d + 4 * w <= ldo; d += 4 * w) output_columns<R, 4>(v, d, p, keys, o, ldo, next);
  for (; d + 2 * w <= ldo; d += 2 * w) output_columns<R, 2>(v, d, p, keys, o, ldo, next);
  for (; d < ldo; d += w) output_columns<R, 1>(v, d, p, keys, o, ldo, next);
}

// o += p v over keys lo ... hi - 1, the sum of a group at a time; lane r of p is row r.
template <class A>
inline void output_few(const Block<A>& v, const A* p, int rows, int lo, int hi, A* o, int64_t ldo, Ahead& next) {
  for (int j0 = lo, end; j0 < hi; j0 = end) {
    end = (j0 / kGroupKeys + 1) * kGroupKeys;  // the same sums wherever a mask begins
    if (end > hi) end = hi;
    const int keys = end - j0;
    const A* weights = p + j0 * kLanes<A>;
    with_group(v, j0, keys, rows, [&](const auto& group) __attribute__((always_inline)) {
      int r = 0;
      for (; r + 2 <= rows; r += 2) output_rows_of_group<2>(group, weights + r, keys, o + r * ldo, ldo, next);
      if (r < rows) output_rows_of_group<1>(group, weights + r, keys, o + r * ldo, ldo, next);
    });
  }
}

// K and V are read once, at the speed of memory: the lines of a group of keys are asked for two groups before, from
// this block on into the next; one group before where they crowd into few sets of the cache.
inline Ahead ahead_few(const View& view, int64_t columns, RowRange block, RowRange next, int64_t turns) {
  const int64_t before = (share_sets(view) ? 1 : 2) * kGroupKeys;
  if (next.n > before) next.n = before;
  const RowRange rest{block.first + before * view.s * itemsize(view.dtype), block.n - before};
  return ahead(view, rest, next, columns, turns);
}

// How often the product over a block calls fetch.
template <class A>
inline int64_t few_turns(int rows, int64_t columns, bool scores) {
  const int64_t vectors = round_up(columns, kLanes<A>) / kLanes<A>,
                passes = kBlockKeys<1> / kGroupKeys * ((rows + 1) / 2);
  constexpr int64_t steps = kGroupKeys / kLanes<A>;
  if (scores) return passes * vectors * (rows > 1 ? 2 * steps : steps);
  return passes * (vectors + kMostColumns - 1) / kMostColumns * kGroupKeys;
}

}  // namespace qkv::inline QKV_LEVEL
