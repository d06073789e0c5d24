// SPDX-License-Identifier: Apache-2.0
// The two products for few rows (decoding), with head_dim in the lanes.
//
//     s[key][row] = sum over d of q[row][d] k[key][d],   o[row][d] += sum over keys of p[key][row] v[key][d]
//
// With queries in the lanes a single row would use one lane in kLanes; here a row of K or V is a run of full vectors.
// Keys are taken kGroupKeys at a time: read once from memory, converted where they are not whole vectors of A, and
// used from L1 by all rows of the group, two or four at a time. Scores land in the same S^T tile, one lane a row, so
// masks, modifiers and softmax are the same text. Row-major operands: Q and O are (rows, ld) with ld a multiple of the
// vector.
//
// Memory is the limit, and a core waits for it or works, not both, unless what it waits for was asked for early:
// between every two loads, a line of each of the next three groups of keys (Soon). In bursts they would hold these up,
// most where memory is far.
//
// Cost per key and row: D / lanes fma (half as many dots of bfloat16, whose subnormals then count as 0), 3 shuffles and
// adds of the tree, 1 to 2 of the transpose for all rows, Dv / lanes fma, against (D + Dv) NV fma for all lanes
// together: worth it up to half the lanes (tiles.h).
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

// Loops over a group are made for up to N rows, and take the N of their rows.
template <class A, class Use>
QKV_INLINE void with_most_rows(int rows, const Use& use) {
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
// the group, and each asks for its share. Where nothing comes next they ask for what they read: a branch costs more.
template <int N>
constexpr int kPasses = N > kRowsAtOnce ? N / kRowsAtOnce : 1;

// A busy processor drops some of what it is asked for, so whole lines are asked for three times, a group of keys apart
// (Zen 4: from memory 1.05 to 1.5 times the time else for up to 4 rows, from the caches 0.8 to 1.0). Loads of less ask
// for their line more than once anyway.
template <class A, class T>
constexpr int kAsks = kHalves<T> * kLanes<A> * int64_t{sizeof(T)} == kLine ? 3 : 1;

struct Soon {
  const char* at;  // the first row that is left
  int64_t step;    // from row to row
  int64_t size;    // of an element
  int64_t bytes;   // of a row that a loop loads at a time, up to a line
  int64_t again;   // to the same row of the group after, which is asked for as well
  bool run;        // row after row in memory, where it is best to ask in that order
};

template <class A, class T>
inline Soon take_soon(Ahead& next, const Rows<const T>& group) {
  constexpr int64_t kElements = kHalves<T> * kLanes<A>;
  const int64_t step = next.gap, size = next.size;
  const char* const rows = take_rows(next, kGroupKeys);
  if (!rows) {
    return {reinterpret_cast<const char*>(group.data), group.ld * int64_t{sizeof(T)}, sizeof(T), kLine, 0, false};
  }
  const int64_t load = kElements * size, bytes = load < kLine ? load : kLine;
  return {rows, step, size, bytes, next.again, step == next.columns * size};
}

// --- scores of a group ---------------------------------------------------------------------------------------

// Scores of R rows, of up to N, against kLanes / R keys: lane r kLanes / R + i is that of row r and key i.
template <int R, int N, class A, class T>
QKV_INLINE Vec<A> score_rows_of_keys(const T* first, int64_t ld, const A* q, int64_t ldq, Soon& soon) {
  constexpr int w = kLanes<A>, n = w / R, F = kFactors<T, N>, P = kPasses<N>, kAsked = n / P;
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
      if constexpr (i.value % P == 0) ask<kAsks<A, T>>(line, apart, soon.again);
      Vec<A> k[F];
      load_factors_as<N, A>(key.row(i), k);
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        unroll<F>([&](auto f) __attribute__((always_inline)) {
          sum[r * n + i] = multiply_into<N, A>(first, x[r][f], k[f], sum[r * n + i]);
        });
      });
    });
    key.on(kHalves<T> * w);
  }
  return sum_lanes<A>(sum);
}

// Scores of kLanes keys, of which `keys` are kept, for at most N rows. Lanes N and above repeat the first N.
// best[lane]: the largest of every kLanes / N keys; in memory, where there are few registers they are all needed.
template <int N, class A, class T>
QKV_INLINE void score_keys(const Rows<const T>& k, const A* q, int64_t ldq, int rows, int keys, A* s, A* best,
                           Soon& soon) {
  constexpr int w = kLanes<A>;
  alignas(kVectorBytes) A part[N * w];
  const auto score = [&](auto R, int from, int r) __attribute__((always_inline)) {
    return score_rows_of_keys<R.value, N>(k.data + from * k.ld, k.ld, q + r * ldq, ldq, soon);
  };
  int r = 0;
  if constexpr (N >= 4 && kRowsAtOnce == 4) {
    for (; r + 4 <= rows; r += 4) {
      Vec<A> x[4];
      unroll<4>([&](auto i) __attribute__((always_inline)) { x[i] = score(Constant<4>{}, i * w / 4, r); });
      unroll<2>([&](auto i) __attribute__((always_inline)) { exchange_both<A, w / 4>(x[2 * i], x[2 * i + 1]); });
      unroll<2>([&](auto i) __attribute__((always_inline)) { exchange_both<A, w / 2>(x[i], x[i + 2]); });
      unroll<4>([&](auto i) __attribute__((always_inline)) { store(part + (r + i) * w, x[i]); });
    }
  }
  if constexpr (N > 1) {
    for (; r + 2 <= rows; r += 2) {
      Vec<A> a = score(Constant<2>{}, 0, r), b = score(Constant<2>{}, w / 2, r);
      exchange_both<A, w / 2>(a, b);
      store(part + r * w, a);
      store(part + (r + 1) * w, b);
    }
  }
  for (; r < rows; ++r) store(part + r * w, score(Constant<1>{}, 0, r));
  for (; r < N; ++r) store(part + r * w, Vec<A>{});
  // Lane g N + r of vector i becomes the score of row r and key g N + i: the first stages of a transpose do.
  Vec<A> x[w];
  unroll<N>([&](auto i) __attribute__((always_inline)) { x[i] = load(part + i * w); });
  transpose<A, 1, N, N>(x);
  unroll<N>([&](auto i) __attribute__((always_inline)) {
    store(part + i * w, x[i]);
    store(best, maximum(load(best), x[i]));
  });
  unroll<w>([&](auto i) __attribute__((always_inline)) {
    const Vec<A> lanes = repeat<N>(part + i % N * w + i / N * N);
    if (i < keys) store(s + i * w, lanes);
  });
}

// Scores of keys lo ... hi - 1 of a block for `rows` rows; top[lane] = max(top, s).
template <class A>
inline void score_few(const Block<A>& k, const A* q, int64_t ldq, int rows, int lo, int hi, A* s, Vec<A>& top,
                      Ahead& next) {
  constexpr int w = kLanes<A>;
  with_most_rows<A>(rows, [&](auto N) __attribute__((always_inline)) {
    alignas(kVectorBytes) A best[w];
    store(best, splat(-kInf<A>));
    for (int g0 = lo; g0 < hi; g0 += kGroupKeys) {
      const int keys = hi - g0 < kGroupKeys ? hi - g0 : kGroupKeys;
      fetch_beside(next);
      with_group(k, g0, keys, rows, [&]<class T>(const Rows<const T>& group) __attribute__((always_inline)) {
        const auto whole = keys % w == 0 ? group : repeat_last(group, keys, ldq, k.scratch);
        constexpr int kShare = kHalves<T> / kFactors<T, N.value>;  // of a row of Q: words are half as many
        Soon soon = take_soon<A>(next, whole);
        for (int j = 0; j < keys; j += w) {
          score_keys<N.value>(Rows{whole.data + j * whole.ld, whole.ld}, q, ldq / kShare, rows, keys - j,
                              s + (g0 + j) * w, best, soon);
        }
      });
    }
    for (int i = 0; i < w; i += N) top = maximum(top, repeat<N.value>(best + i));
  });
}

// --- output of a group ---------------------------------------------------------------------------------------

template <int R>
constexpr int most_columns() {  // vectors of R rows' O in registers
  return (kVectorRegisters == 32 ? 16 : 8) / (R > 2 ? R : 2);
}

// R rows, C vectors of columns: o += p v over the keys of a group, in pass `pass` of P over it.
template <int R, int C, int P, class A, class T>
QKV_INLINE void output_columns(const Rows<const T>& v, int64_t d, const A* p, int keys, A* o, int64_t ldo,
                               const Soon& soon, int pass) {
  constexpr int w = kLanes<A>, H = kHalves<T>, kLoads = C / H, kEvery = P < kLoads ? P : kLoads;
  Vec<A> sum[R][C];
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<C>([&](auto c) __attribute__((always_inline)) { sum[r][c] = zero<A>(); });
  });
  const T* row = v.data + d;
  const char* turn = soon.at + d * soon.size + pass * (kLoads / kEvery) * soon.bytes;
  for (int j = 0; j < keys; ++j, row += v.ld, turn += soon.step) {
    const char* line = turn;
    Vec<A> x[R];
    unroll<R>([&](auto r) __attribute__((always_inline)) { x[r] = splat(p[j * w + r]); });
    unroll<kLoads>([&](auto c) __attribute__((always_inline)) {
      if constexpr (c.value % kEvery == 0) ask<kAsks<A, T>>(line, soon.bytes, soon.again);
      Vec<A> y[H];
      load_halves_as<A>(row + c * H * w, y);
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        unroll<H>([&](auto h)
                      __attribute__((always_inline)) { sum[r][c * H + h] = fma_into(x[r], y[h], sum[r][c * H + h]); });
      });
    });
  }
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
QKV_INLINE void output_rows_of_group(const Rows<const T>& v, const A* p, int keys, A* o, int64_t ldo, const Soon& soon,
                                     int pass) {
  constexpr int w = kLanes<A>, kMost = most_columns<R>();
  int64_t d = 0;
  const auto columns = [&](auto C) __attribute__((always_inline)) {
    for (; d + C * w <= ldo; d += C * w) output_columns<R, C.value, P>(v, d, p, keys, o, ldo, soon, pass);
  };
  if constexpr (kMost > 4) columns(Constant<kMost>{});
  columns(Constant<4>{});
  columns(Constant<2>{});
  if constexpr (kHalves<T> == 1) columns(Constant<1>{});
}

// o += p v over keys lo ... hi - 1, the sum of a group at a time; lane r of p is row r.
template <class A>
inline void output_few(const Block<A>& v, const A* p, int rows, int lo, int hi, A* o, int64_t ldo, Ahead& next) {
  with_most_rows<A>(rows, [&](auto N) __attribute__((always_inline)) {
    for (int j0 = lo, end; j0 < hi; j0 = end) {
      end = (j0 / kGroupKeys + 1) * kGroupKeys;  // the same sums wherever a mask begins
      if (end > hi) end = hi;
      const int keys = end - j0;
      const A* weights = p + j0 * kLanes<A>;
      fetch_beside(next);
      with_group(v, j0, keys, rows, [&]<class T>(const Rows<const T>& group) __attribute__((always_inline)) {
        constexpr int P = kPasses<N.value>;
        const Soon soon = take_soon<A>(next, group);
        int r = 0, pass = 0;
        const auto some = [&](auto R) __attribute__((always_inline)) {
          for (; r + R <= rows; r += R, ++pass) {
            output_rows_of_group<R.value, P>(group, weights + r, keys, o + r * ldo, ldo, soon, pass);
          }
        };
        if constexpr (N >= 4 && kRowsAtOnce == 4) some(Constant<4>{});
        if constexpr (N >= 2) some(Constant<2>{});
        some(Constant<1>{});
      });
    }
  });
}

// K and V are read once, at the speed of memory: the lines of a group of keys are asked for two groups before, from
// this block on into the next; or one, two and three groups before, unless rows are so far apart that they crowd into
// few sets of the cache.
inline Ahead ahead_few(const View& view, int64_t columns, RowRange block, RowRange next) {
  const int64_t size = itemsize(view.dtype), step = view.s * size;
  const bool close = (step < 0 ? -step : step) <= 8 * columns * size;
  const bool thrice = kVectorBytes == kLine && view.dtype != DType::f16 && close;  // kAsks
  const int64_t before = (thrice || share_sets(view) ? 1 : 2) * kGroupKeys;
  if (next.n > before) next.n = before;
  Ahead a = rows_ahead(view, {block.first + before * step, block.n - before}, next, columns);
  if (thrice) a.again = kGroupKeys * step;
  return a;
}

constexpr int kFewTurns = kBlockKeys<1> / kGroupKeys;  // how often the products over a block call fetch_beside

}  // namespace qkv::inline QKV_LEVEL
