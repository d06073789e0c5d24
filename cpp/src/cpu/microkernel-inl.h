// SPDX-License-Identifier: Apache-2.0
// The one micro-kernel:  C[R rows][NV vectors] (+)= A[R rows][n] * B[n][NV vectors]
//
// B is a tile with queries in its lanes (Q^T for the scores, P^T for the output); A is the user's K or V, read in
// place by broadcast, one scalar for NV multiply-adds. Both products of attention have this form:
//     S^T = K Q^T       rows are keys,        n runs over head_dim   (A row-major: rows lda apart)
//     O^T += V^T P^T    rows are columns of V, n runs over keys      (A transposed: n steps lda apart)
// Where the processor multiplies pairs of bfloat16, X = Pair and n counts pairs (pairs-inl.h); else X = A.
// Each C element is one chain of fma in the order of n, whatever R is: tails and full tiles round alike.
//
// Registers: R * NV accumulators, NV for B, one broadcast.  32 registers: 12 * 2 + 2 + 1 = 27; two fma a cycle
// with latency 4 need 8 accumulators, 24 also hide the loads.  16 registers: 6 * 2 + 2 + 1 = 15.
// Where fma takes a broadcast operand, every other row uses it: fewer instructions per fma without more loads than the
// core can do, for the front end may be shared with a neighbour on the same core. Four steps a turn make the loop short
// enough (16 turns at D = 64) for its end to be predicted.
#pragma once

#include "cpu/simd.h"

namespace qkv::inline QKV_LEVEL {

constexpr int kMaxRows = kVectorRegisters == 32 ? 12 : 6;

enum class Layout { RowMajor, Transposed };

template <class A, int R, int NV>
using Accumulators = Vec<A>[R][NV];

QKV_INLINE F accumulate_one(const float*, F a, F b, F c) { return fma_into(a, b, c); }
QKV_INLINE D accumulate_one(const double*, D a, D b, D c) { return fma_into(a, b, c); }
QKV_INLINE F accumulate_one(const Pair*, F a, F b, F c) { return dot_into(a, b, c); }

template <Layout kLayout, int R, int NV, class A, class X>
QKV_INLINE void multiply_step(const X* a, int64_t lda, const A* b, int64_t k, Accumulators<A, R, NV>& acc) {
  Vec<A> bk[NV];
  unroll<NV>([&](auto v) __attribute__((always_inline)) { bk[v] = load(b + (k * NV + v) * kLanes<A>); });
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    const X* x = kLayout == Layout::RowMajor ? a + r * lda + k : a + k * lda + r;
    if constexpr (r.value % 2 == 1) {  // every other row: balances instructions against loads
      unroll<NV>([&](auto v) __attribute__((always_inline)) { acc[r][v] = fma_scalar(x, bk[v], acc[r][v]); });
    } else {
      const Vec<A> broadcast = splat(*x);
      unroll<NV>([&](auto v)
                     __attribute__((always_inline)) { acc[r][v] = accumulate_one(x, broadcast, bk[v], acc[r][v]); });
    }
  });
}

template <Layout kLayout, int R, int NV, class A, class X>
QKV_INLINE void multiply(const X* a, int64_t lda, const A* b, int64_t n, Accumulators<A, R, NV>& acc) {
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    unroll<4>([&](auto i) __attribute__((always_inline)) { multiply_step<kLayout, R, NV>(a, lda, b, k + i, acc); });
  }
  for (; k < n; ++k) multiply_step<kLayout, R, NV>(a, lda, b, k, acc);
}

// S^T rows: s[r][lanes] = sum over d of k[r][d] q[d][lanes], and top[lanes] = max(top, s).
template <int R, int NV, class A, class X>
QKV_INLINE void score_rows(const X* k, int64_t ldk, const A* q, int64_t D, A* s, Vec<A> (&top)[NV]) {
  Accumulators<A, R, NV> acc{};
  multiply<Layout::RowMajor, R, NV>(k, ldk, q, D, acc);
  unroll<NV>([&](auto v) __attribute__((always_inline)) {
    Vec<A> best = acc[0][v];
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      store(s + (r * NV + v) * kLanes<A>, acc[r][v]);
      best = maximum(best, acc[r][v]);
    });
    top[v] = maximum(top[v], best);
  });
}

// O^T rows: o[r][lanes] += sum over keys of v[key][r] p[key][lanes].
template <Layout kLayout, int R, int NV, class A, class X>
QKV_INLINE void output_rows(const X* v, int64_t ldv, const A* p, int64_t keys, A* o) {
  Accumulators<A, R, NV> acc;
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto i) __attribute__((always_inline)) { acc[r][i] = load(o + (r * NV + i) * kLanes<A>); });
  });
  multiply<kLayout, R, NV>(v, ldv, p, keys, acc);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto i) __attribute__((always_inline)) { store(o + (r * NV + i) * kLanes<A>, acc[r][i]); });
  });
}

// Calls body(Constant<R>, first row) over n rows: as many kMaxRows as fit, then 8, 4, 2, 1.
template <int R = kMaxRows, class Body>
QKV_INLINE void for_rows(int64_t n, const Body& body, int64_t row = 0) {
  constexpr int next = R > 8 ? 8 : (R > 4 ? 4 : R / 2);
  for (; n - row >= R; row += R) body(Constant<R>{}, row);
  if constexpr (next > 0) for_rows<next>(n, body, row);
}

}  // namespace qkv::inline QKV_LEVEL
