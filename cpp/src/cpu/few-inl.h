// SPDX-License-Identifier: Apache-2.0
// The two products for few rows (decoding), with head_dim in the lanes.
//
//     s[key][row] = sum over d of q[row][d] k[key][d],   o[row][d] += sum over keys of p[key][row] v[key][d]
//
// With queries in the lanes a single row would use one lane in kLanes; here a row of K or V is a run of full vectors.
// Keys are taken kGroupKeys at a time: read once from memory, converted where they are not whole vectors of A, and
// used from L1 by all rows of the group, two or four at a time. Scores land in the same S^T tile, so masks, modifiers
// and softmax are the same text; but a key has as many lanes as there are rows, rounded up to a power of two, where
// nothing wants a vector for each key (key_lanes): a softmax of lanes without a row takes as long as one of rows.
// Row-major operands: Q and O are (rows, ld) with ld a multiple of the vector; rows that are missing are zeros.
//
// Memory is the limit, and a core waits for it or works, not both, unless what it waits for was asked for early:
// between every two loads, a line of each of the next three groups of keys (Soon). In bursts they would hold these up,
// most where memory is far. Where rows lie one after the other they are asked for in that order, whatever order the
// products take, so that the processor sees a stream and helps (Zen 3: V at 17 instead of 13 GB/s a core).
// To leave it to the processor alone, key by key along memory with sums of O in L1, serves only loads whose addresses
// grow evenly and little work a line (Zen 3, against this: float of one row 1.05, of two 0.92, of eight 0.63 times as
// fast, heads of a token together 0.35 to 1.1; bfloat16 0.6 to 0.95).
//
// Cost per key and row: D / lanes fma (half as many dots of bfloat16, whose subnormals then count as 0), 3 shuffles and
// adds of the tree, Dv / lanes fma, against (D + Dv) NV fma for all lanes together: worth it up to half the lanes
// (tiles.h).
#pragma once

#include "cpu/few-operands-inl.h"

namespace qkv::inline QKV_LEVEL {

// --- keys ----------------------------------------------------------------------------------------------------

// Rows of keys, `ld` apart: with a pointer to every fourth the others are at most 3 ld away, an address that costs
// nothing.
template <class T, int N>
struct EvenRows {
  static constexpr int kPointers = (N + 3) / 4;
  const T* every_fourth[kPointers];
  int64_t ld;
  EvenRows(const T* first, int64_t step) : ld(step) {
    unroll<kPointers>([&](auto i) __attribute__((always_inline)) { every_fourth[i] = first + 4 * i * ld; });
    on(0);
  }
  QKV_INLINE const T* row(int i) const { return every_fourth[i / 4] + i % 4 * ld; }
  QKV_INLINE void on(int elements) {
    unroll<kPointers>([&](auto i) __attribute__((always_inline)) {
      every_fourth[i] += elements;
      forget(every_fourth[i]);
    });
  }
};

// A group whose keys are not a multiple of kLanes goes on with the last one, whose scores are then not kept.
template <class A, class T>
inline Rows<const T> repeat_last(const Rows<const T>& group, int keys, int64_t columns, A* scratch) {
  T* const to = reinterpret_cast<T*>(scratch);
  for (int64_t i = 0; i < round_up(keys, kLanes<A>); ++i) {
    const T* const from = group.data + (i < keys ? i : keys - 1) * group.ld;
    if (from != to + i * columns) __builtin_memcpy(to + i * columns, from, columns * sizeof(T));
  }
  return {to, columns};
}

// --- what comes next -----------------------------------------------------------------------------------------

// Loops over a group are made for N rows: 1, 2, 4 or 8 (few_lanes).
template <class A, class Use>
QKV_INLINE void with_few_lanes(int rows, const Use& use) {
  constexpr int kMost = kFewRows<A>;
  if (rows == 1) return use(Constant<1>{});
  if constexpr (kMost >= 4) {
    if (rows == 2) return use(Constant<2>{});
  }
  if constexpr (kMost >= 8) {
    if (rows <= 4) return use(Constant<4>{});
  }
  if constexpr (kMost >= 2) use(Constant<kMost>{});
}

// The rows that are asked for while a group is used, line by line between its loads. N rows take so many passes over
// the group, and each asks for its share, or for all where it loads too few vectors at a time to share them. Where
// nothing comes next they ask for what they read: a branch costs more.
template <int N, int kAtOnce = kRowsAtOnce>
constexpr int kPasses = N > kAtOnce ? N / kAtOnce : 1;

// A busy processor drops some of what it is asked for, so whole lines are asked for three times, a group of keys apart
// (Zen 4: from memory 1.05 to 1.5 times the time else for up to 4 rows, from the caches 0.8 to 1.0). Loads of half a
// line ask for it twice anyway, and again where little is done with it: one row or two, nothing to convert (Zen 3: 1.05
// to 1.12 times as fast; four rows and eight 0.95 to 0.98).
constexpr int kMostRowsAgain = 2;
template <class A, class T, int N>
constexpr int kAsks = kHalves<T> * kLanes<A> * int64_t{sizeof(T)} == kLine                         ? 3
                      : kVectorBytes * 2 == kLine && sizeof(T) == sizeof(A) && N <= kMostRowsAgain ? 2
                                                                                                   : 1;

struct Soon {
  const char* at;  // the first row that is left
  int64_t step;    // from row to row
  int64_t size;    // of an element
  int64_t bytes;   // of a row that a loop loads at a time, up to a line
  int64_t again;   // to the same row of the group after, which is asked for as well
  bool run;        // row after row in memory, where it is best to ask in that order
};

template <class A, class T>
inline Soon take_soon(Ahead& next, const Rows<const T>& group, int64_t keys = kGroupKeys) {
  constexpr int64_t kElements = kHalves<T> * kLanes<A>;
  const int64_t step = next.gap, size = next.size;
  const char* const rows = take_rows(next, keys);
  if (!rows) {
    return {reinterpret_cast<const char*>(group.data), group.ld * int64_t{sizeof(T)}, sizeof(T), kLine, 0, false};
  }
  const int64_t load = kElements * size, bytes = load < kLine ? load : kLine;
  return {rows, step, size, bytes, next.again, step == next.columns * size};
}

// --- scores of a group ---------------------------------------------------------------------------------------

// Scores of R rows, of N, against kLanes / R keys: R lanes a key. Where the rows take two passes, exchange_both of
// theirs brings keys into order: the even lanes' keys come first.
template <int R, int N, class A, class T>
QKV_INLINE Vec<A> score_rows_of_keys(const T* first, int64_t ld, const A* q, int64_t ldq, Soon& soon) {
  constexpr int w = kLanes<A>, n = w / R, F = kFactors<T>, P = kPasses<N>, kAsked = n / P;
  const char* turn = soon.at;
  const int64_t apart = soon.run ? soon.bytes : soon.step, on = soon.run ? kAsked * soon.bytes : soon.bytes;
  soon.at += kAsked * soon.step;
  EvenRows<T, n> key(first, ld);
  Vec<A> sum[w] = {};
  for (int64_t d = 0; d < ldq; d += F * w) {
    const char* line = turn;
    turn += on;
    Vec<A> x[R][F];
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<F>([&](auto f) __attribute__((always_inline)) { x[r][f] = load(q + r * ldq + d + f * w); });
    });
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      if constexpr (i.value % P == 0) ask<kAsks<A, T, N>>(line, apart, soon.again);
      Vec<A> k[F];
      load_factors_as<A>(key.row(i), k);
      constexpr int kAt = P == 1 ? i.value : i % (n / P) * P + i / (n / P);
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        unroll<F>([&](auto f) __attribute__((always_inline)) {
          Vec<A>& to = sum[kAt * R + r];
          to = multiply_into<A>(first, x[r][f], k[f], to);
        });
      });
    });
    key.on(kHalves<T> * w);
  }
  return sum_lanes<A>(sum);
}

// Scores of kLanes keys, of which `keys` are kept, for N rows: N lanes a key.
template <int N, class A, class T>
QKV_INLINE void score_keys(const Rows<const T>& k, const A* q, int64_t ldq, int keys, A* s, Soon& soon) {
  constexpr int w = kLanes<A>, P = kPasses<N>, R = N / P, kEach = w / R;
  static_assert(P <= 2 || P == kEach);
  for (int j = 0; j < w && j < keys; j += kEach, s += P * w) {
    Vec<A> x[P];
    unroll<P>([&](auto i) __attribute__((always_inline)) {
      x[i] = score_rows_of_keys<R, N>(k.data + j * k.ld, k.ld, q + i * R * ldq, ldq, soon);
    });
    join_rows<A, R>(x);
    unroll<P>([&](auto i) __attribute__((always_inline)) { store(s + i * w, x[i]); });
  }
}

// A vector of lanes for each key, which repeat its few; top[lane] = max(top, s).
template <int N, class A>
QKV_INLINE void widen_scores(int lo, int hi, A* s, Vec<A>& top) {
  for (int j = hi - 1; j >= lo; --j) {  // in place, from the last one on
    const Vec<A> lanes = repeat<N>(s + j * N);
    store(s + j * kLanes<A>, lanes);
    top = maximum(top, lanes);
  }
}

// Scores of keys lo ... hi - 1 of a block for `rows` rows of Q, and zeros after them; so many lanes a key. Are those of
// bfloat16 dots?
template <class A>
inline void score_few(const Block<A>& k, const A* q, int64_t ldq, int rows, bool dots, int lanes, int lo, int hi, A* s,
                      Vec<A>& top, Ahead& next) {
  constexpr int w = kLanes<A>;
  with_few_lanes<A>(rows, [&](auto N) __attribute__((always_inline)) {
    for (int g0 = lo; g0 < hi; g0 += kGroupKeys) {
      const int keys = hi - g0 < kGroupKeys ? hi - g0 : kGroupKeys;
      fetch_beside(next);
      const auto use = [&]<class T>(const Rows<const T>& group) __attribute__((always_inline)) {
        const auto whole = keys % w == 0 ? group : repeat_last(group, keys, ldq, k.scratch);
        constexpr int kShare = kHalves<T> / kFactors<T>;  // of a row of Q: words are half as many
        Soon soon = take_soon<A>(next, whole);
        for (int j = 0; j < keys; j += w) {
          score_keys<N.value>(Rows{whole.data + j * whole.ld, whole.ld}, q, ldq / kShare, keys - j, s + (g0 + j) * N,
                              soon);
        }
      };
      with_group<N.value>(k, g0, keys, dots, use);
    }
    if (lanes == w) widen_scores<N.value>(lo, hi, s, top);
  });
}

// --- output of a group ---------------------------------------------------------------------------------------

template <int R>
constexpr int most_columns() {  // vectors of R rows' O in registers
  return (kVectorRegisters == 32 ? 16 : 8) / (R > 2 ? R : 2);
}

// R rows, C vectors of columns: o += p v over the keys of a group, in pass `pass` of P over it.
template <int R, int C, int P, class A, class T>
QKV_INLINE void output_columns(const Rows<const T>& v, int64_t d, Rows<const A> p, int keys, A* o, int64_t ldo,
                               Soon& soon, int pass) {
  constexpr int w = kLanes<A>, H = kHalves<T>, kLoads = C / H, kEvery = P < kLoads ? P : kLoads;
  Vec<A> sum[R][C];
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<C>([&](auto c) __attribute__((always_inline)) { sum[r][c] = zero<A>(); });
  });
  const T* row = v.data + d;
  const int64_t asked = kLoads / kEvery * soon.bytes;
  const bool along = kVectorBytes < kLine && soon.run;
  const char* turn = along ? soon.at : soon.at + d * soon.size + pass * asked;
  const int64_t on = along ? asked : soon.step;
  for (int j = 0; j < keys; ++j, row += v.ld, turn += on, p.data += p.ld) {
    const char* line = turn;
    Vec<A> x[R];
    unroll<R>([&](auto r) __attribute__((always_inline)) { x[r] = splat(p.data[r]); });
    QKV_FLAT
    for (int c = 0; c < kLoads; ++c) {
      if (c % kEvery == 0) ask<kAsks<A, T, R * P>>(line, soon.bytes, soon.again);
      Vec<A> y[H];
      load_halves_as<A>(row + c * H * w, y);
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        unroll<H>([&](auto h)
                      __attribute__((always_inline)) { sum[r][c * H + h] = fma_into(x[r], y[h], sum[r][c * H + h]); });
      });
    }
  }
  if (along) soon.at = turn;
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    if constexpr (H == 2) {
      unroll<C / 2>([&](auto c) __attribute__((always_inline)) {
        const Vec<A> even = sum[r][2 * c], odd = sum[r][2 * c + 1];
        sum[r][2 * c] = in_turn<A, false>(even, odd);
        sum[r][2 * c + 1] = in_turn<A, true>(even, odd);
      });
    }
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      A* to = o + r * ldo + d + c * w;
      store(to, load(to) + sum[r][c]);
    });
  });
}

template <int R, int P, class A, class T>
QKV_INLINE void output_rows_of_group(const Rows<const T>& v, Rows<const A> p, int keys, A* o, int64_t ldo, Soon& soon,
                                     int pass) {
  constexpr int w = kLanes<A>, kMost = most_columns<R>();
  int64_t d = 0;
  const auto columns = [&](auto C) __attribute__((always_inline)) {
    for (; d + C * w <= ldo; d += C * w) output_columns<R, C.value, P>(v, d, p, keys, o, ldo, soon, pass);
  };
  if constexpr (kMost > 4) columns(Constant<kMost>{});
  if constexpr (kMost >= 4) columns(Constant<4>{});
  columns(Constant<2>{});
  if constexpr (kHalves<T> == 1) columns(Constant<1>{});
}

// o += p v over keys lo ... hi - 1, the sum of a group at a time; lane r of a key's in p is row r. Rows after the
// last one, up to a multiple of those taken at a time, are there to be written; what they hold counts for nothing.
template <class A>
inline void output_few(const Block<A>& v, const A* p, int lanes, int rows, int lo, int hi, A* o, int64_t ldo,
                       Ahead& next) {
  with_few_lanes<A>(rows, [&](auto N) __attribute__((always_inline)) {
    for (int j0 = lo, end; j0 < hi; j0 = end) {
      end = (j0 / kGroupKeys + 1) * kGroupKeys;  // the same sums wherever a mask begins
      if (end > hi) end = hi;
      const int keys = end - j0;
      const Rows<const A> weights{p + j0 * lanes, lanes};
      fetch_beside(next);
      const auto use = [&]<class T>(const Rows<const T>& group) __attribute__((always_inline)) {
        if constexpr (!kDots<T>) {  // those are for add_few_pairs: dots_values
          constexpr int P = kPasses<N.value, kOutputRowsAtOnce>, R = N / P;
          Soon soon = take_soon<A>(next, group);
          for (int r = 0, pass = 0; r < rows; r += R, ++pass) {
            output_rows_of_group<R, P>(group, Rows{weights.data + r, weights.ld}, keys, o + r * ldo, ldo, soon, pass);
          }
        }
      };
      with_group<N.value>(v, j0, keys, false, use);
    }
  });
}

// K and V are read once, at the speed of memory: the lines of a group of keys are asked for two groups before, from
// this block on into the next; or one, two and three groups before, unless rows are so far apart that they crowd into
// few sets of the cache.
inline bool asks_again(const View& view, int rows) {  // kAsks
  if (kVectorBytes == kLine) return view.dtype != DType::f16;
  return kVectorBytes * 2 == kLine && itemsize(view.dtype) >= 4 && rows <= kMostRowsAgain;
}

inline Ahead ahead_few(const View& view, int64_t columns, int rows, RowRange block, RowRange next) {
  const int64_t size = itemsize(view.dtype), step = view.s * size;
  const bool close = (step < 0 ? -step : step) <= 8 * columns * size;
  const bool again = asks_again(view, rows) && close;
  const int64_t before = (again || share_sets(view) ? 1 : 2) * kGroupKeys;
  if (next.n > before) next.n = before;
  Ahead a = rows_ahead(view, {block.first + before * step, block.n - before}, next, columns);
  if (again) a.again = kGroupKeys * step;
  return a;
}

constexpr int kFewTurns = kBlockKeys<1> / kGroupKeys;  // how often the products over a block call fetch_beside

}  // namespace qkv::inline QKV_LEVEL
