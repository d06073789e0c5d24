// SPDX-License-Identifier: Apache-2.0
// Forward attention with queries in the lanes.
//
//     s = scale q k^T,  s = softcap tanh(s / softcap),  s += bias - slope |p - j|,  s = -inf where masked
//     o = softmax(s) v,  lse = log sum exp(s)
//
// Shapes     q (Hq, Sq, D), k (Hkv, Sk, D), v (Hkv, Sk, Dv) per batch element, any strides.
// Parallel   over tasks (batch, kv head, at most kTaskRows rows); a row is a (query, head of the group) pair,
//            query-major, so the heads that share K and V fill the lanes together. Rows are cut into tiles of L = NV
//            vectors. Few queries against long keys: over parts of the keys too (parts-inl.h).
// Loop       for each block of kKeys keys, for each tile: look (mask) -> S^T = K Q^T -> modify -> softmax ->
//            O^T += V^T P^T. Scores are transposed: max, sum, rescaling and masks are vertical, one lane a query,
//            and K and V are read in place by broadcast. Only what is not already A with unit stride is converted,
//            once per block and task.
// Memory     per worker, in A: tasks' Q^T and O^T kTaskRows (D + Dv), one score tile kKeys L, converted K and V
//            kKeys (D + Dv): 0.25 MiB for D = Dv = 128 in float. Independent of Sq and Sk. Other products have more
//            (plan_scratch).
// Numerics   A = float (double for float64). Powers of two of the scale are folded into Q exactly; the rest, c,
//            is applied in p = 2^(c (s - m)): a key with the largest score has p = 1 exactly, and equal scores have
//            equal weights. Blocks start at multiples of kKeys and lazy rescaling decides per lane: a row's result
//            depends on nothing else in its tile.
//            |error| <= u_out |o| + (u + 2 (sqrt(D) u max|q||k| scale + 2 u max|s|) + (8 + sqrt(Sk)) u) sum p|v|.
// References Milakov & Gimelshein 2018 (arXiv 1805.02867); Rabe & Staats 2021 (arXiv 2112.05682); Dao et al. 2022
//            (arXiv 2205.14135); lazy rescaling: FlashAttention-4.
#pragma once

#include "cpu/dropout-inl.h"
#include "cpu/focus-inl.h"
#include "cpu/guard-inl.h"
#include "cpu/math-inl.h"
#include "cpu/microkernel-inl.h"
#include "cpu/modify-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/normalizers-inl.h"
#include "cpu/task-inl.h"

namespace qkv::inline QKV_LEVEL {

// --- load ----------------------------------------------------------------------------------------------------

template <class A, int NV>
inline int64_t output_size(const Problem& p, const Tile<A, NV>& tile) {
  return tile.by_rows ? tile.rows * round_up(p.Dv, kLanes<A>) : p.Dv * NV * kLanes<A>;
}

template <class A, int NV>
inline void clear_output(const Problem& p, const Tile<A, NV>& tile) {
  const int64_t runs = tile.at_once ? tile.rows : 1, n = tile.at_once ? p.Dv : output_size(p, tile);
  for (int64_t r = 0; r < runs; ++r) {
    A* const o = tile.o + r * tile.o_row;
    for (int64_t i = 0; i < n; i += kLanes<A>) store(o + i, Vec<A>{});
  }
}

// As a tile is before its first key; rows of out are written later.
template <class A, int NV>
inline void clear(const Problem& p, Tile<A, NV>& tile) {
  if (!tile.at_once) clear_output(p, tile);
  for (int v = 0; v < NV; ++v) {
    tile.m[v] = splat(-kInf<A>);
    tile.l[v] = Vec<A>{};
  }
}

template <class A, int NV>
inline void load_queries(const Problem& p, int64_t batch, const Sequence& seq, const ScoreRule<A>& rule,
                         const Scratch<A>& scratch, Tile<A, NV>& tile) {
  constexpr int w = kLanes<A>, L = NV * w;
  const int64_t size = itemsize(p.q.dtype), step = p.q.s * size, head_step = p.q.h * size;
  const char* const first = p.q.data + lead_offset(p, p.q, batch) * size + seq.q_row * step;
  const bool whole = whole_vectors<A>(p.q, p.D);
  const bool as_pairs = tile.pairs && rule.fold == 1 && p.q.d == 1 && p.D % (2 * w) == 0;  // words of two elements
  const bool in_place = !tile.few && (whole || as_pairs);
  const int64_t ld = tile.few ? round_up(p.D, w) : Scratch<A>::ld(p);
  const int count = tile.few ? few_lanes<A>(tile.rows) : L;
  const auto query = [&](int i) { return first + tile.lanes.head[i] * head_step + tile.lanes.query[i] * step; };
  const A* row[kMaxLanes];
  const int even = in_place && tile.lanes.consecutive ? tile.lanes.living : 0;  // the usual, and a small call is short
  const char* at = even > 0 ? query(0) : nullptr;
  for (int i = 0; i < even; ++i, at += step) row[i] = reinterpret_cast<const A*>(at);
  for (int i = even; i < count; ++i) {
    A* const copy = (tile.few ? tile.q : scratch.rows) + i * ld;
    row[i] = copy;
    int64_t n = 0;
    if (i < tile.lanes.live && tile.lanes.alive[i]) {
      if (in_place) {
        row[i] = reinterpret_cast<const A*>(query(i));
        continue;
      }
      if (whole) copy_row<A>(query(i), p.D, reinterpret_cast<char*>(copy));
      else load_row(query(i), p.q.dtype, p.q.d, p.D, copy);
      n = p.D;
    }
    for (; n < round_up(p.D, w); ++n) copy[n] = 0;
  }
  if (!tile.few) rows_to_lanes<A, NV>(row, as_pairs ? p.D / 2 : p.D, tile.q);
  const int64_t q_size = tile.few ? count * ld : p.D * L;
  if (p.score == Score::additive) {
    load_additive<A, NV>(p, rule.fold, tile.few, tile.rows, tile.q, {scratch.terms, p.D});
  } else if (rule.fold != 1) {
    const Vec<A> fold = splat(rule.fold);
    for (int64_t i = 0; i < q_size; i += w) store(tile.q + i, load(tile.q + i) * fold);
  }
  if (tile.few) order_queries<A>(p.k, p.D, tile.rows, tile.dots, tile.q, q_size);
  if constexpr (Tile<A, NV>::kCanPair) {
    if (tile.pairs && !as_pairs) pack_queries<NV>(p.D, tile.q);
  }
  if constexpr (Tile<A, NV>::kCanSplit) {
    if (tile.split) split_queries<NV>(p.D, tile.pieces);
  }
  clear(p, tile);
}

// Rows a multiple of 1 KiB apart share 4 of the 64 sets of a 48 KiB cache, which hold half of a block's 96 rows. Half
// as far apart they fit, with room for nothing else; that shows where a product of six rows walks down them more often.
template <class A>
inline bool collides(const Block<A>& block) {
  constexpr int64_t kApart = kVectorRegisters == 16 ? 512 : 1024;
  return block.ld * static_cast<int64_t>(sizeof(A)) % kApart == 0;
}

// In place where the array already is what the products read; otherwise converted into scratch, for few rows (so many;
// else 0) when they are used.
template <class A>
inline Block<A> load_block(const View& view, const char* first, int64_t n, int64_t columns, int few_rows, A* scratch) {
  const int64_t ld = round_up(columns, kLanes<A>);
  const bool readable = view.dtype == kDType<A> && (view.d == 1 || columns == 1);
  if (few_rows ? read_in_place<A>(view, columns, few_rows) : readable) {
    return {reinterpret_cast<const A*>(first), view.s, nullptr, nullptr, 0, scratch};
  }
  if (few_rows) return {nullptr, ld, &view, first, columns, scratch};
  convert_rows(view, first, n, columns, scratch);
  return {scratch, ld};
}

// --- mask ----------------------------------------------------------------------------------------------------

template <class A, int NV>
inline void mask_scores(const Visible& seen, A* s, Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>;
  using Int = typename Lane<A>::Int;
  IntVec<A> lane[NV];
  for (int v = 0; v < NV; ++v) {
    for (int i = 0; i < w; ++i) lane[v][i] = static_cast<Int>(uint32_t{1} << (v * w + i));
    top[v] = splat(-kInf<A>);
  }
  for (int j = seen.lo; j < seen.hi; ++j) {
    const IntVec<A> bits = static_cast<Int>(seen.bits[j]) - IntVec<A>{};
    for (int v = 0; v < NV; ++v) {
      A* at = s + (j * NV + v) * w;
      const Vec<A> x = (bits & lane[v]) != IntVec<A>{} ? load(at) : splat(mutant(14) ? A{-10000} : -kInf<A>);
      store(at, x);
      top[v] = maximum(top[v], x);
    }
  }
}

// --- softmax -------------------------------------------------------------------------------------------------

template <class A, int NV>
inline void rescale(const Vec<A> (&alpha)[NV], int64_t Dv, const Tile<A, NV>& tile) {
  constexpr int w = kLanes<A>;
  const int64_t ld = round_up(Dv, w);
  for (int r = 0; tile.by_rows && r < tile.rows; ++r) {
    for (int64_t d = r * ld; d < (r + 1) * ld; d += w) store(tile.o + d, load(tile.o + d) * splat(alpha[0][r]));
  }
  for (int64_t d = 0; !tile.by_rows && d < Dv; ++d) {
    for (int v = 0; v < NV; ++v) {
      A* o = tile.o + (d * NV + v) * w;
      store(o, load(o) * alpha[v]);
    }
  }
}

// What divides by the sum of weights: 0 where nothing was seen.
template <class A>
QKV_INLINE Vec<A> inverse(Vec<A> l) {
  return l == Vec<A>{} ? Vec<A>{} : splat(static_cast<A>(1)) / l;
}

// Weights are added up in steps of so many keys: equal ones, in one chain, would all round the same way. Those of a
// few products, so that the sum is the same where they are added as they leave it.
constexpr int kSumKeys = 24;
static_assert(kSumKeys % kMaxRows == 0 && kKeys % kSumKeys == 0 && kBlockKeys<1> % kSumKeys == 0);

// S^T becomes P^T = 2^(c (s - m)); m, l and O^T move to the new maximum where it rose enough.
template <class A, int NV>
inline void softmax(Range keys, A c, const Vec<A> (&top)[NV], int64_t Dv, A* s, Tile<A, NV>& tile) {
  constexpr int w = kLanes<A>;
  const Vec<A> factor = splat(c);
  IntVec<A> rises[NV];
  bool any_rises = false, fresh = true;  // fresh: no lane has a maximum; l and O^T are 0 or NaN, or O not begun
  for (int v = 0; v < NV; ++v) {
    rises[v] = (top[v] - tile.m[v]) * factor > splat(static_cast<A>(tile.lazy));
    any_rises = any_rises || any(rises[v]);
    fresh = fresh && !any((IntVec<A>)(tile.m[v] > splat(-kInf<A>)));
  }
  if (any_rises) {
    Vec<A> alpha[NV];
    for (int v = 0; v < NV; ++v) {
      const Vec<A> m = rises[v] ? top[v] : tile.m[v];
      if (!fresh) {
        alpha[v] = rises[v] ? exp2((tile.m[v] - m) * factor) : splat(static_cast<A>(1));
        tile.l[v] *= alpha[v];
      }
      tile.m[v] = m;
    }
    if (!fresh && !mutant(1)) rescale<A, NV>(alpha, Dv, tile);
  }
  Vec<A> m[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {  // a lane that saw nothing yet has m = -inf, and -inf + inf is not a number
    m[v] = tile.m[v] == splat(-kInf<A>) ? Vec<A>{} : tile.m[v];
    sum[v] = Vec<A>{};
  }
  for (int from = keys.lo / kSumKeys * kSumKeys; from < keys.hi; from += kSumKeys) {
    const int lo = from > keys.lo ? from : keys.lo, hi = from + kSumKeys < keys.hi ? from + kSumKeys : keys.hi;
    Vec<A> part[NV] = {};
    for (int j = lo; j < hi; ++j) {
      unroll<NV>([&](auto v) __attribute__((always_inline)) {
        const Vec<A> p = exp2_product(load(s + (j * NV + v) * w) - m[v], factor);
        store(s + (j * NV + v) * w, p);
        part[v] += p;
      });
    }
    unroll<NV>([&](auto v) __attribute__((always_inline)) { sum[v] += part[v]; });
  }
  for (int v = 0; v < NV; ++v) tile.l[v] += sum[v];
}

}  // namespace qkv::inline QKV_LEVEL
