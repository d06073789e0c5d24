// SPDX-License-Identifier: Apache-2.0
// Monotonic alignment: a reader walks along the keys, stops at key j of row i with probability p_ij, and starts row
// i + 1 where it stopped.
//
//     p_ij = sigmoid(e_ij), hard: 1 if e_ij > 0, else 0; 0 where masked
//     r_ij = r_i,j-1 (1 - p_i,j-1) + a_i-1,j          the probability that the walk of row i comes to key j
//     a_ij = p_ij r_ij                                that it stops there
//
// and, with chunks, a softmax over the keys w_k = k - width + 1 ... k behind each stop k:
//
//     b_ij = sum_k a_ik e^u_ij / sum_{l in w_k} e^u_il    over the k whose chunk holds j
//
// Shapes     energy, chunk (heads, rows, keys); state (heads, keys).
// Parallel   heads; rows follow each other, and so do the keys of r.
// Memory     per worker 7 arrays of the keys, and twice the width of a chunk.
// Numerics   Sums and products of what is not negative, in float64: nothing cancels and nothing is divided by a product
//            that vanished (the closed form with cumulative products does both). 1 - p is computed as sigmoid(-e). Each
//            chunk is scaled by its own maximum. If p is off by d_ij, a row of a is off by at most that of the row
//            before plus 2 sum_j r_ij d_ij, in the sum of the absolute values. A key that no walk comes to, r = 0, has
//            no influence, whatever it holds. What is below the normal range counts as 0: subnormal numbers are a
//            hundred times slower, and every walk leaves some behind.
// References Raffel et al. 2017 (arXiv 1704.00784), equations 11 to 14 and algorithm 1; Chiu & Raffel 2018 (arXiv
//            1712.05382); Arivazhagan et al. 2019 (arXiv 1906.05218), chunks from the first key on.
#pragma once

#include <string.h>

#include "cpu/math-inl.h"
#include "cpu/rows-inl.h"
#include "qkv/alignment.h"

namespace qkv::inline QKV_LEVEL {

template <class A>
struct AlignmentScratch {
  A *score, *stop, *pass, *share, *top, *chunk, *rise;

  // Vectors are read past the last key, and chunks before the first: -inf, or no share, stand there.
  static int64_t carve(const Alignment& x, A* base, AlignmentScratch* out) {
    const int64_t margin = round_up(x.chunk ? x.width : 0, kLanes<A>), size = margin + round_up(x.keys, kLanes<A>);
    A** fields[] = {&out->score, &out->stop, &out->pass, &out->share, &out->top, &out->chunk, &out->rise};
    int64_t used = 0;
    for (A** field : fields) {
      *field = base + used;
      used += size + kLanes<A>;
    }
    out->chunk += margin;  // what is before the first key
    return used * static_cast<int64_t>(sizeof(A));
  }
};

// --- stops ---------------------------------------------------------------------------------------------------

// p and 1 - p of each score; NaN for NaN and +inf.
template <class A>
inline void stops(const Alignment& x, const AlignmentScratch<A>& scratch) {
  const Vec<A> one = splat(A{1}), zero{};
  for (int64_t j = 0; j < x.keys; j += kLanes<A>) {
    const Vec<A> e = load(scratch.score + j), odd = e == splat(-kInf<A>) ? zero : e - e;
    Vec<A> small = zero, large = one;  // of p and 1 - p
    if (!x.hard) {
      const Vec<A> t = exp2(-maximum(-e, e) * splat(static_cast<A>(1.4426950408889634)));
      large = one / (one + t);
      small = t * large;
    }
    const IntVec<A> likely = mutant(50) ? e >= zero : e > zero;
    store(scratch.stop + j, (likely ? large : small) + odd);
    store(scratch.pass + j, (likely ? small : large) + odd);
  }
}

// The walk of one row: state becomes its alignment, which is also written to `row`.
template <class A>
inline void walk(int64_t keys, const AlignmentScratch<A>& scratch, double* state, A* row) {
  Walk<A> walker;
  for (int64_t j = 0; j < keys; ++j) row[j] = walker.step(state[j], scratch.stop[j], scratch.pass[j]);
}

// --- chunks --------------------------------------------------------------------------------------------------

template <class A>
QKV_INLINE Vec<A> exponential(Vec<A> u, Vec<A> top) {
  return exp2((u - top) * splat(static_cast<A>(1.4426950408889634)));
}

// share: in the alignment, 0 beyond the last key. Each pass goes over the keys once for each place in the chunk.
template <class A>
inline void weigh_chunks(const Alignment& x, const AlignmentScratch<A>& scratch, A* weights) {
  const Vec<A> zero{};
  const A *u = scratch.chunk, *top = scratch.top, *share = scratch.share;
  for (int64_t k = 0; k < x.keys; k += kLanes<A>) {
    Vec<A> most = splat(kLowest<A>), sum{};
    for (int64_t d = 0; d < x.width; ++d) most = maximum(most, load(u + k - d));
    for (int64_t d = 0; d < x.width; ++d) sum += exponential<A>(load(u + k - d), most);
    const Vec<A> a = load(share + k);
    store(scratch.top + k, mutant(52) ? splat(A{0}) : most);
    store(scratch.share + k, a == zero ? zero : a / sum);
  }
  for (int64_t j = 0; j < x.keys; j += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t d = 0; d < x.width; ++d) {
      const Vec<A> s = load(share + j + d);
      sum += s == zero ? zero : exponential<A>(load(u + j), load(top + j + d)) * s;
    }
    store(weights + j, sum);
  }
}

// Chunks from the first key on.
template <class A>
inline void weigh_pasts(const Alignment& x, const AlignmentScratch<A>& scratch, A* weights) {
  A most = kLowest<A>;
  for (int64_t k = 0; k < x.keys; ++k) {
    const A before = most;
    most = scratch.chunk[k] > most ? scratch.chunk[k] : most;
    scratch.top[k] = most;
    scratch.rise[k] = before - most;
  }
  for (int64_t k = x.keys; k < x.keys + kLanes<A>; ++k) scratch.rise[k] = 0;
  for (int64_t k = 0; k < x.keys; k += kLanes<A>) {
    store(weights + k, exponential<A>(load(scratch.chunk + k), load(scratch.top + k)));
    store(scratch.rise + k, exponential<A>(load(scratch.rise + k), Vec<A>{}));
  }
  PastSum<A> past;
  for (int64_t k = 0; k < x.keys; ++k) scratch.share[k] = past.step(scratch.share[k], weights[k], scratch.rise[k]);
  PastTail<A> rest;
  for (int64_t k = x.keys - 1; k >= 0; --k) weights[k] = rest.step(scratch.share[k], weights[k], scratch.rise[k]);
}

// --- rows ----------------------------------------------------------------------------------------------------

template <class A>
inline void fill(A* x, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

template <class A>
inline void align_as(const Alignment& x, int64_t head, void* memory) {
  AlignmentScratch<A> scratch;
  const int64_t bytes = AlignmentScratch<A>::carve(x, static_cast<A*>(memory), &scratch);
  const size_t row_bytes = static_cast<size_t>(x.keys) * sizeof(A);
  memset(memory, 0, static_cast<size_t>(bytes));
  fill(scratch.score + x.keys, kLanes<A>, -kInf<A>);
  if (x.chunk) {
    fill(scratch.chunk - x.width, x.width, -kInf<A>);
    fill(scratch.chunk + x.keys, kLanes<A>, -kInf<A>);
  }
  double* const state = x.state + head * x.keys;
  for (int64_t i = 0; i < x.rows; ++i) {
    const int64_t at = (head * x.rows + i) * x.keys;
    A* const row = static_cast<A*>(x.energy) + at;
    memcpy(scratch.score, row, row_bytes);
    stops(x, scratch);
    walk(x.keys, scratch, state, row);
    if (!x.chunk) continue;
    A* const weights = static_cast<A*>(x.chunk) + at;
    memcpy(scratch.chunk, weights, row_bytes);
    memcpy(scratch.share, row, row_bytes);
    fill(scratch.share + x.keys, kLanes<A>, A{0});
    if (x.width == 0) weigh_pasts(x, scratch, scratch.score);
    else weigh_chunks(x, scratch, scratch.score);
    memcpy(weights, scratch.score, row_bytes);
    fill(scratch.score + x.keys, kLanes<A>, -kInf<A>);
  }
}

}  // namespace qkv::inline QKV_LEVEL
