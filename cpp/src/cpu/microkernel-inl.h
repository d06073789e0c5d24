// SPDX-License-Identifier: Apache-2.0
// The one micro-kernel:  C[R rows][NV vectors] (+)= A[R rows][n] * B[n][NV vectors]
//
// B is a tile with queries in its lanes (Q^T for the scores, P^T for the output); A is the user's K or V, read in
// place by broadcast, one scalar for NV multiply-adds. Both products of attention have this form:
//     S^T = K Q^T       rows are keys,        n runs over head_dim   (A row-major: rows lda apart)
//     O^T += V^T P^T    rows are columns of V, n runs over keys      (A transposed: n steps lda apart)
//     O += P V          the same with P as A and V as B: rows are queries, lanes are columns of V
// Where the processor multiplies pairs of bfloat16, X = Pair and n counts pairs (pairs-inl.h); else X = A.
// Each C element is one chain of fma in the order of n, whatever R is: tails and full tiles round alike.
//
// Registers: R * NV accumulators, NV for B, one broadcast.  32 registers: 12 * 2 + 2 + 1 = 27 or 6 * 4 + 4 + 1 = 29;
// two fma a cycle with latency 4 need 8 accumulators, 24 also hide the loads.  16 registers: 6 * 2 + 2 + 1 = 15, or
// 3 * 4 + 3 + 1 = 16 with the last vector of B a memory operand. Loads: NV + R a step, 14 or 10 for 24 fma. A core that
// loads two vectors a cycle comes close to its limit: the scalar is broadcast once for all NV (as a memory operand of
// each fma it would be loaded NV times), and pointers stay in registers: one for every third row, which with lda and
// 2 lda reaches the rows between.
#pragma once

#include "cpu/ahead-inl.h"
#include "cpu/pair-simd-inl.h"

namespace qkv::inline QKV_LEVEL {

constexpr int kMaxRows = kVectorRegisters == 32 ? 12 : 6;
template <int NV>
constexpr int kProductRows = NV > 2 ? kMaxRows / 2 : kMaxRows;
// So many are left to smaller products, as halves (for_rows).
template <int R>
constexpr int kTailRows = R == 12 ? 16 : (R == 6 ? 8 : (R == 3 ? 4 : 0));

enum class Layout { RowMajor, Transposed };

template <class A, int R, int NV>
using Accumulators = Vec<A>[R][NV];

QKV_INLINE F accumulate_one(const float*, F a, F b, F c) { return fma_into(a, b, c); }
QKV_INLINE D accumulate_one(const double*, D a, D b, D c) { return fma_into(a, b, c); }
QKV_INLINE F accumulate_one(const Pair*, F a, F b, F c) { return dot_into(a, b, c); }

constexpr int kStepsPerTurn = 4;  // short enough a loop (16 turns at D = 64) for its end to be predicted

// B: vector v of row k; a product then goes on by some rows. What comes next is asked for at the pace of A, or of B
// where that is what comes from far, so many bytes a row.
template <class T>
struct Rows {  // ld apart
  T* data;
  int64_t ld;
  static constexpr int64_t kBytes = 0;
  QKV_INLINE auto at(int64_t k, int v) const {
    return load(data + k * ld + v * (kVectorBytes / static_cast<int>(sizeof(T))));
  }
  QKV_INLINE void on(int64_t rows) { data += rows * ld; }
};
template <class T>
Rows(T*, int64_t) -> Rows<T>;  // which Clang before 17 does not find itself
template <class A, int NV>
struct Packed {  // rows of NV vectors, one after the other
  const A* data;
  static constexpr int64_t kBytes = 0;
  QKV_INLINE const A* from(int64_t k, int v) const { return data + (k * NV + v) * kLanes<A>; }
  QKV_INLINE Vec<A> at(int64_t k, int v) const { return load(from(k, v)); }
  QKV_INLINE void on(int64_t rows) { data += rows * NV * kLanes<A>; }
};

template <Layout kLayout, int R, int NV, class A, class X, class B>
QKV_INLINE void multiply(const X* a, int64_t lda, B b, int64_t n, Accumulators<A, R, NV>& acc, Ahead& next) {
  constexpr bool kAlong = kLayout == Layout::RowMajor;  // a step goes along the rows of A, or from one to the next
  constexpr int kPointers = kAlong ? (R + 2) / 3 : 1;
  constexpr int kLoaded = R * NV + NV == kVectorRegisters ? NV - 1 : NV;  // vectors of B in registers
  const X* row[kPointers];
  unroll<kPointers>([&](auto i) __attribute__((always_inline)) { row[i] = a + 3 * i * lda; });
  const auto forget_rows = [&] { unroll<kPointers>([&](auto i) __attribute__((always_inline)) { forget(row[i]); }); };
  const auto step = [&](int k) __attribute__((always_inline)) {
    Vec<A> bk[kLoaded];
    unroll<kLoaded>([&](auto v) __attribute__((always_inline)) { bk[v] = b.at(k, v); });
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      const X* x = kAlong ? row[kAlong ? r / 3 : 0] + r % 3 * lda + k : row[0] + r;
      const Vec<A> broadcast = splat(*x);
      unroll<kLoaded>(
          [&](auto v) __attribute__((always_inline)) { acc[r][v] = accumulate_one(x, broadcast, bk[v], acc[r][v]); });
      if constexpr (kLoaded < NV) acc[r][kLoaded] = fma_from(b.from(k, kLoaded), broadcast, acc[r][kLoaded]);
    });
    if constexpr (!kAlong) {
      row[0] += lda;
      forget_rows();
    }
  };
  const auto advance = [&](int steps) __attribute__((always_inline)) {
    b.on(steps);
    if (kAlong) unroll<kPointers>([&](auto i) __attribute__((always_inline)) { row[i] += steps; });
    forget_rows();
  };
  constexpr int64_t kBytes = B::kBytes ? B::kBytes : R * static_cast<int64_t>(sizeof(X));
  constexpr auto lines_until = [](int64_t steps) { return static_cast<int>((steps * kBytes + kLine - 1) / kLine); };
  int64_t k = 0;
  for (; k + kStepsPerTurn <= n; k += kStepsPerTurn) {
    QKV_FLAT
    for (int i = 0; i < kStepsPerTurn; ++i) {
      fetch_lines(next, lines_until(i + 1) - lines_until(i));
      step(i);
    }
    advance(kStepsPerTurn);
  }
  for (; k < n; ++k) {
    step(0);
    advance(1);
  }
}

template <int R, int NV, class A>
QKV_INLINE void clear(Accumulators<A, R, NV>& acc) {
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) { acc[r][v] = zero<A>(); });
  });
}

// x[0] = max(x[0], ..., x[n - 1]) by halves: a chain of R maxima would keep the next product waiting.
template <int n, int NV, class A, int R>
QKV_INLINE void take_maximum(Vec<A> (&x)[R][NV]) {
  if constexpr (n > 1) {
    constexpr int kHalf = (n + 1) / 2;
    unroll<n - kHalf>([&](auto i) __attribute__((always_inline)) {
      unroll<NV>([&](auto v) __attribute__((always_inline)) { x[i][v] = maximum(x[i][v], x[i + kHalf][v]); });
    });
    take_maximum<kHalf, NV, A>(x);
  }
}

// S^T rows: s[r][lanes] = sum over d of k[r][d] q[d][lanes], and top[lanes] = max(top, s).
template <int R, int NV, class A, class X>
QKV_INLINE void score_rows(const X* k, int64_t ldk, const A* q, int64_t D, A* s, Vec<A> (&top)[NV], Ahead& next) {
  Accumulators<A, R, NV> acc;
  clear<R, NV, A>(acc);
  multiply<Layout::RowMajor, R, NV, A>(k, ldk, Packed<A, NV>{q}, D, acc, next);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) { store(s + (r * NV + v) * kLanes<A>, acc[r][v]); });
  });
  take_maximum<R, NV, A>(acc);
  unroll<NV>([&](auto v) __attribute__((always_inline)) { top[v] = maximum(top[v], acc[0][v]); });
}

// O^T rows: o[r][lanes] += sum over keys of v[key][r] p[key][lanes]. The sum of a block's keys is added as a whole: in
// one chain over all keys, an o that has grown large beside its terms would round with each of them.
template <Layout kLayout, int R, int NV, class A, class X>
QKV_INLINE void output_rows(const X* v, int64_t ldv, const A* p, int64_t keys, A* o, Ahead& next) {
  Accumulators<A, R, NV> acc;
  clear<R, NV, A>(acc);
  multiply<kLayout, R, NV, A>(v, ldv, Packed<A, NV>{p}, keys, acc, next);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto i) __attribute__((always_inline)) {
      A* to = o + (r * NV + i) * kLanes<A>;
      store(to, load(to) + acc[r][i]);
    });
  });
}

// Rows of O that need no other keys, with columns of V in the lanes: o[r][d] = factor[r] (sum over keys of p[key][r]
// v[key][d], onto o[r][d] or 0), and 0 where the factor is. The chains are those of O^T, and so are the bits: a sum of
// -0 becomes 0 there, too.
template <int R, int NV, class A>
QKV_INLINE void finish_rows(Rows<const A> p, Rows<const A> v, int64_t keys, const A* factor, Rows<A> o, bool onto,
                            Ahead& next) {
  Accumulators<A, R, NV> acc;
  clear<R, NV, A>(acc);
  multiply<Layout::Transposed, R, NV, A>(p.data, p.ld, v, keys, acc, next);
  if (onto) {
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<NV>([&](auto i) __attribute__((always_inline)) { acc[r][i] += load(o.data + r * o.ld + i * kLanes<A>); });
    });
  }
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    const Vec<A> f = splat(factor[mutant(80) ? 0 : r.value]);
    unroll<NV>([&](auto i) __attribute__((always_inline)) {
      A* to = o.data + r * o.ld + i * kLanes<A>;
      store(to, f == Vec<A>{} ? Vec<A>{} : (Vec<A>{} + acc[r][i]) * f);
    });
  });
}

// Calls body(Constant<R>, first row) over n rows: as many R as fit, then 8, 4, 2, 1. The last 16 as 8 and 8, not 12 and
// 4, the last 8 of sixes as 4 and 4, the last 4 of threes as 2 and 2: fewer rows have too few chains to hide the
// latency of fma.
template <int R, class Body>
QKV_INLINE void for_rows(int64_t n, const Body& body, int64_t row = 0) {
  constexpr int next = R > 8 ? 8 : (R > 4 ? 4 : (R == 3 ? 2 : R / 2));
  for (; n - row >= R && n - row != kTailRows<R>; row += R) body(Constant<R>{}, row);
  if constexpr (next > 0) for_rows<next>(n, body, row);
}

}  // namespace qkv::inline QKV_LEVEL
