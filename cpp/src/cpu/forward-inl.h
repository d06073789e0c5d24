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
//            kKeys (D + Dv): 0.25 MiB for D = Dv = 128 in float. Independent of Sq and Sk.
// Numerics   A = float (double for float64). Powers of two of the scale are folded into Q exactly; the rest, c,
//            is applied in p = 2^(c (s - m)): a key with the largest score has p = 1 exactly, and equal scores have
//            equal weights. Blocks start at multiples of kKeys and lazy rescaling decides per lane: a row's result
//            depends on nothing else in its tile.
//            |error| <= u_out |o| + (u + 2 (sqrt(D) u max|q||k| scale + 2 u max|s|) + (8 + sqrt(Sk)) u) sum p|v|.
// References Milakov & Gimelshein 2018 (arXiv 1805.02867); Rabe & Staats 2021 (arXiv 2112.05682); Dao et al. 2022
//            (arXiv 2205.14135); lazy rescaling: FlashAttention-4.
#pragma once

#include "cpu/additive-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/few-inl.h"
#include "cpu/focus-inl.h"
#include "cpu/guard-inl.h"
#include "cpu/kernel_table.h"
#include "cpu/math-inl.h"
#include "cpu/microkernel-inl.h"
#include "cpu/normalizers-inl.h"
#include "cpu/pairs-inl.h"
#include "cpu/relative-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/split-inl.h"
#include "cpu/tiles.h"
#include "cpu/visible-inl.h"
#include "qkv/softmax.h"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

constexpr double kLog2e = 1.44269504088896340736;

template <class A>
struct ScoreRule {   // how q.k becomes the exponent c (s - m)
  A fold;            // exact factor of Q: the scale's sign, and its power of two where that is above 1
  A c;               // from the units of s to log2
  A scale, softcap;  // modified scores only: their s is in natural units
  double natural;    // natural units per unit of s
  bool modified;
};

template <class A>
inline ScoreRule<A> score_rule(const Problem& p) {
  int exponent = 0;
  const double mantissa = frexp(p.softcap ? p.scale / p.softcap : p.scale, &exponent);
  double fold = mantissa < 0 ? -1 : 1;
  double rest = mantissa < 0 ? -mantissa : mantissa;
  if (exponent > 1) fold = ldexp(fold, exponent - 1);  // q.k stays below the score: no early overflow
  rest = ldexp(rest, exponent > 1 ? 1 : exponent);
  ScoreRule<A> r;
  r.modified = p.softcap != 0 || p.bias.data || p.alibi;
  r.fold = static_cast<A>(fold);
  r.scale = static_cast<A>(mutant(10) ? rest * 1.001 : rest);
  r.softcap = static_cast<A>(p.softcap);
  if (r.scale == 0) {  // below A's range: every finite score is 0, and -inf must not meet 0
    r.fold = 0;
    r.scale = 1;
    rest = 1;
  }
  r.natural = r.modified ? 1 : (mutant(10) ? rest * 1.001 : rest);
  r.c = static_cast<A>(r.natural * kLog2e);
  return r;
}

template <class A, int NV>
inline bool reads_pairs(const Problem& p) {
  return kPairs && NV == 2 && sizeof(A) == 4 && p.dtype == DType::bf16 && p.score == Score::dot;
}

// Does a key meet most of the queries, or many?
inline bool mostly_seen(const MaskProgram& mask) {
  int64_t before = kUnbounded, after = kUnbounded;  // of all bands
  for (int i = 0; i < mask.n; ++i) {
    const MaskNode& m = mask.nodes[i];
    if (m.op == MaskOp::Band) {
      before = m.a < before ? m.a : before;
      after = m.b < after ? m.b : after;
    } else if (m.op != MaskOp::And && m.op != MaskOp::All && m.op != MaskOp::Prefix && m.op != MaskOp::Lengths) {
      return false;
    }
  }
  return before >= kLeastSplitBand || after >= kLeastSplitBand;
}

template <class A, int NV>
inline bool may_split(const Problem& p) {
  return kTileUnit && NV == 2 && sizeof(A) == 4 && p.dtype != DType::bf16 && p.score == Score::dot && p.D > 0 &&
         mostly_seen(p.program) && mostly_whole(p.D) && mostly_whole(p.Dv) && !(p.dropout.scale > kMostDropoutScale);
}

// For a sequence with so many rows in a group.
template <class A, int NV>
inline bool reads_split(const Problem& p, int64_t rows) {
  return may_split<A, NV>(p) && rows >= kLeastSplitRows && rows * p.D >= kLeastSplitElements;
}

template <class A>
struct Scratch {  // one worker's memory
  A *q, *o, *s, *k, *v, *packed, *rows, *bias, *kept, *terms;
  A *split_q, *split_k, *split_v, *split_p;  // split-inl.h

  static int64_t ld(const Problem& p) { return round_up(p.D > p.Dv ? p.D : p.Dv, kLanes<A>); }
  static int64_t carve(const Problem& p, const Plan& plan, A* base, Scratch* out) {
    constexpr int64_t w = kLanes<A>;
    const bool split = may_split<A, 2>(p);
    const int64_t sizes[] = {plan.worker_rows * query_columns<A>(p),
                             plan.worker_rows * round_up(p.Dv, w),
                             int64_t{kKeys} * kMaxLanes,
                             kKeys * round_up(p.D, w),
                             kKeys * round_up(p.Dv, w),
                             kMaxLanes * ld(p),
                             p.bias.data ? int64_t{kMaxLanes} * kKeys : 0,
                             packed_size<A>(p.Dv),
                             has_threshold(p.normalizer) ? longest_keys(p) * kMaxLanes : 0,
                             AdditiveTerms<A>::size(p),
                             split ? plan.worker_rows * split_lane_size(p.D) : 0,
                             split ? split_size(kKeys, p.D) : 0,
                             split ? split_size(p.Dv, kKeys) : 0,
                             split ? kMaxLanes * split_lane_size(kPassKeys) : 0};
    A** fields[] = {&out->q,      &out->o,    &out->s,     &out->k,       &out->v,       &out->rows,    &out->bias,
                    &out->packed, &out->kept, &out->terms, &out->split_q, &out->split_k, &out->split_v, &out->split_p};
    int64_t used = 0;
    for (int i = 0; i < 14; ++i) {
      *fields[i] = base + used;
      used += round_up(sizes[i], 64 / static_cast<int64_t>(sizeof(A)));
    }
    return used * static_cast<int64_t>(sizeof(A));
  }
};

template <class A, int NV>
struct Tile {  // state of L rows
  TileLanes lanes;
  A *q, *o;  // Q^T (D, L), O^T (Dv, L); few rows: Q (live, D), O (live, Dv), D and Dv rounded up to the vector
  Vec<A> m[NV], l[NV];
  Threshold<A, NV> threshold;
  bool used;  // holds a living row
  bool few;   // at most kFewRows rows: head_dim in the lanes ...
  int rows;   // ... of so many; the other lanes are padding
  // bfloat16 where the level multiplies it at full rate: Q and P are pairs, weights sum to `rounded`.
  static constexpr bool kCanPair = kPairs && NV == 2 && sizeof(A) == 4;
  bool pairs;
  Vec<A> rounded[NV];
  // float cut into bfloat16 where the level has tile registers.
  static constexpr bool kCanSplit = kTileUnit && NV == 2 && sizeof(A) == 4;
  bool split;
  SplitQueries<NV> pieces;
};

// --- tasks ---------------------------------------------------------------------------------------------------

inline int64_t own_rows(const Problem& p, const Sequence& seq) { return p.rows ? p.n_rows : seq.Sq; }

inline bool few_rows(const Problem& p, int64_t rows) {
  return rows <= (p.dtype == DType::f64 ? kFewRows<double> : kFewRows<float>);
}

// Row r of a task's group: query-major over the heads of the group.
template <class A, int NV>
inline void fill_lanes(const Problem& p, const Plan& plan, const Sequence& seq, int64_t group, int64_t rows,
                       int64_t first_row, Tile<A, NV>& tile) {
  constexpr int L = NV * kLanes<A>;
  TileLanes& t = tile.lanes;
  const int64_t left = rows * plan.group_size - first_row;
  t.live = static_cast<int>(left < L ? (left < 0 ? 0 : left) : L);
  if (plan.group_size == 1 && !p.rows && !p.heads) {  // the usual: a lane is a query, and a small call is short
    const int64_t own = seq.Sq - first_row;
    t.living = static_cast<int>(own < t.live ? (own < 0 ? 0 : own) : t.live);
    for (int i = 0; i < t.live; ++i) {
      t.row[i] = t.query[i] = first_row + i;
      t.position[i] = seq.offset + first_row + i;
      t.result_head[i] = t.head[i] = group;
      t.alive[i] = i < t.living;
    }
    t.consecutive = true;
    t.first = t.living > 0 ? t.position[0] : INT64_MAX;
    t.last = t.living > 0 ? t.position[t.living - 1] : INT64_MIN;
    tile.used = t.living > 0;
    return;
  }
  t.living = 0;
  t.consecutive = false;
  t.first = INT64_MAX;
  t.last = INT64_MIN;
  int64_t row = first_row / plan.group_size, member = first_row % plan.group_size;
  for (int i = 0; i < t.live; ++i) {
    t.row[i] = row;
    t.query[i] = p.rows ? p.rows[row] : row;
    t.result_head[i] = group * plan.group_size + member;
    t.head[i] = p.heads ? p.heads[group] : t.result_head[i];
    t.position[i] = seq.offset + t.query[i];
    t.alive[i] = t.query[i] < seq.Sq;
    if (t.alive[i]) {
      ++t.living;
      if (t.position[i] < t.first) t.first = t.position[i];
      if (t.position[i] > t.last) t.last = t.position[i];
    }
    if (++member == plan.group_size) {
      member = 0;
      ++row;
    }
  }
  tile.used = t.living > 0;
}

// --- load ----------------------------------------------------------------------------------------------------

template <class A, int NV>
inline int64_t output_size(const Problem& p, const Tile<A, NV>& tile) {
  return tile.few ? tile.rows * round_up(p.Dv, kLanes<A>) : p.Dv * NV * kLanes<A>;
}

// As a tile is before its first key.
template <class A, int NV>
inline void clear(const Problem& p, Tile<A, NV>& tile) {
  const int64_t n = output_size(p, tile);
  for (int64_t i = 0; i < n; i += kLanes<A>) store(tile.o + i, Vec<A>{});
  for (int v = 0; v < NV; ++v) {
    tile.m[v] = splat(-kInf<A>);
    tile.l[v] = tile.rounded[v] = Vec<A>{};
  }
}

template <class A, int NV>
inline void load_queries(const Problem& p, int64_t batch, const Sequence& seq, const ScoreRule<A>& rule,
                         const Scratch<A>& scratch, Tile<A, NV>& tile) {
  constexpr int w = kLanes<A>, L = NV * w;
  const int64_t lead = lead_offset(p, p.q, batch), size = itemsize(p.q.dtype);
  const bool in_place = !tile.few && whole_vectors<A>(p.q, p.D);
  const int64_t ld = tile.few ? round_up(p.D, w) : Scratch<A>::ld(p);
  const int count = tile.few ? tile.rows : L;
  const A* row[kMaxLanes];
  for (int i = 0; i < count; ++i) {
    A* const copy = (tile.few ? tile.q : scratch.rows) + i * ld;
    row[i] = copy;
    int64_t n = 0;
    if (i < tile.lanes.live && tile.lanes.alive[i]) {
      const int64_t at = lead + tile.lanes.head[i] * p.q.h + (seq.q_row + tile.lanes.query[i]) * p.q.s;
      const char* const query = p.q.data + at * size;
      if (in_place) {
        row[i] = reinterpret_cast<const A*>(query);
        continue;
      }
      load_row(query, p.q.dtype, p.q.d, p.D, copy);
      n = p.D;
    }
    for (; n < round_up(p.D, w); ++n) copy[n] = 0;
  }
  if (!tile.few) rows_to_lanes<A, NV>(row, p.D, tile.q);
  const int64_t q_size = tile.few ? count * ld : p.D * L;
  if (p.score == Score::additive) {
    load_additive<A, NV>(p, rule.fold, tile.few, tile.rows, tile.q, {scratch.terms, p.D});
  } else if (rule.fold != 1) {
    const Vec<A> fold = splat(rule.fold);
    for (int64_t i = 0; i < q_size; i += w) store(tile.q + i, load(tile.q + i) * fold);
  }
  if constexpr (Tile<A, NV>::kCanPair) {
    if (tile.pairs) pack_queries<NV>(p.D, tile.q);
  }
  if constexpr (Tile<A, NV>::kCanSplit) {
    if (tile.split) split_queries<NV>(p.D, tile.pieces);
  }
  clear(p, tile);
}

// Rows a multiple of 1 KiB apart share 4 of the 64 sets of a 48 KiB cache, which hold half of a block's 96 rows.
template <class A>
inline bool collides(const Block<A>& block) {
  return block.ld * static_cast<int64_t>(sizeof(A)) % 1024 == 0;
}

// In place where the array already is what the products read; otherwise converted into scratch, for few rows (so many;
// else 0) when they are used.
template <class A>
inline Block<A> load_block(const View& view, const char* first, int64_t n, int64_t columns, int few_rows, A* scratch) {
  const int64_t ld = round_up(columns, kLanes<A>);
  const bool readable = view.dtype == kDType<A> && (view.d == 1 || columns == 1);
  if (few_rows ? read_in_place<A>(view, columns, few_rows) : readable) {
    return {reinterpret_cast<const A*>(first), view.s};
  }
  if (few_rows) return {nullptr, ld, &view, first, columns, scratch};
  convert_rows(view, first, n, columns, scratch);
  return {scratch, ld};
}

// --- scores --------------------------------------------------------------------------------------------------

// s + b, within the limit where both are finite.
template <class A>
inline Vec<A> keep_finite(Vec<A> s, Vec<A> b, A limit) {
  const Vec<A> sum = s + b, finite = b - b;  // 0, or NaN where the bias is not finite
  Vec<A> kept = sum < splat(-limit) ? splat(-limit) : sum;
  kept = kept > splat(limit) ? splat(limit) : kept;
  return ((finite == Vec<A>{}) & (s - s == Vec<A>{})) ? (mutant(13) ? sum : kept) : sum;
}

// Softcap, bias and ALiBi: a pass over the score tile, in natural units. A finite sum is kept below A's range
// (2^127): two additive -FLT_MAX are not "masked".
template <class A, int NV>
inline void modify_scores(const Problem& p, const ScoreRule<A>& rule, const TileLanes& lanes, int64_t j0,
                          const Visible& seen, const Scratch<A>& scratch, Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>, L = NV * w;
  constexpr A kLimit = sizeof(A) == 4 ? static_cast<A>(0x1p127) : static_cast<A>(0x1p1023);
  const Table<A> table(p, lanes);
  const bool rows = p.bias.data && !table.row;
  A slope[L] = {}, position[L] = {};
  for (int i = 0; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    if (p.alibi) slope[i] = static_cast<A>(p.alibi[lanes.head[i]]);
    position[i] = static_cast<A>(lanes.position[i] - lanes.first);
  }
  for (int v = 0; v < NV; ++v) {
    Vec<A> best = splat(-kInf<A>);
    const Vec<A> slopes = load(slope + v * w), positions = load(position + v * w);
    for (int jb = seen.lo / w * w; jb < seen.hi; jb += w) {
      Vec<A> bias[w];
      if (rows) {
        unroll<w>([&](auto i) __attribute__((always_inline)) {
          bias[i] = v * w + i < lanes.live ? load(scratch.bias + (v * w + i) * kKeys + jb) : Vec<A>{};
        });
        transpose<A>(bias);
      }
      for (int j = jb < seen.lo ? seen.lo : jb; j < jb + w && j < seen.hi; ++j) {
        A* at = scratch.s + (j * NV + v) * w;
        Vec<A> s = load(at) * splat(rule.scale);
        if (p.softcap != 0 && !mutant(11)) s = splat(rule.softcap) * tanh<A>(s);
        if (p.alibi) {
          const Vec<A> d = positions + splat(static_cast<A>(lanes.first - (j0 + j)));
          s = fma(-slopes, mutant(12) ? d : maximum(-d, d), s);
        }
        if (table.row) s += table.at(v * w, j0 + j);
        if (rows) {
          const Vec<A> b = bias[j - jb];
          const Vec<A> sum = s + b;
          s = any(~((sum > splat(-kLimit)) & (sum < splat(kLimit)))) ? keep_finite<A>(s, b, kLimit) : sum;
        }
        store(at, s);
        best = maximum(best, s);
      }
    }
    top[v] = best;
  }
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
  for (int r = 0; tile.few && r < tile.rows; ++r) {
    for (int64_t d = r * ld; d < (r + 1) * ld; d += w) store(tile.o + d, load(tile.o + d) * splat(alpha[0][r]));
  }
  for (int64_t d = 0; !tile.few && d < Dv; ++d) {
    for (int v = 0; v < NV; ++v) {
      A* o = tile.o + (d * NV + v) * w;
      store(o, load(o) * alpha[v]);
    }
  }
}

// Weights are added up in steps of so many keys: equal ones, in one chain, would all round the same way.
constexpr int kSumKeys = 16;

// S^T becomes P^T = 2^(c (s - m)); m, l and O^T move to the new maximum where it rose enough.
template <class A, int NV>
inline void softmax(const Visible& seen, A c, const Vec<A> (&top)[NV], int64_t Dv, A* s, Tile<A, NV>& tile) {
  constexpr int w = kLanes<A>;
  const Vec<A> factor = splat(c);
  IntVec<A> rises[NV];
  bool any_rises = false, fresh = true;  // fresh: no lane has a maximum, and O^T is 0 or NaN
  for (int v = 0; v < NV; ++v) {
    rises[v] = (top[v] - tile.m[v]) * factor > splat(static_cast<A>(kLazyLog2));
    any_rises = any_rises || any(rises[v]);
    fresh = fresh && !any(tile.m[v] > splat(-kInf<A>));
  }
  if (any_rises) {
    Vec<A> alpha[NV];
    for (int v = 0; v < NV; ++v) {
      const Vec<A> m = rises[v] ? top[v] : tile.m[v];
      alpha[v] = rises[v] ? exp2((tile.m[v] - m) * factor) : splat(static_cast<A>(1));
      tile.m[v] = m;
      tile.l[v] *= alpha[v];
      tile.rounded[v] *= alpha[v];
    }
    if (!fresh && !mutant(1)) rescale<A, NV>(alpha, Dv, tile);
  }
  Vec<A> m[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {  // a lane that saw nothing yet has m = -inf, and -inf + inf is not a number
    m[v] = tile.m[v] == splat(-kInf<A>) ? Vec<A>{} : tile.m[v];
    sum[v] = Vec<A>{};
  }
  for (int from = seen.lo / kSumKeys * kSumKeys; from < seen.hi; from += kSumKeys) {
    const int lo = from > seen.lo ? from : seen.lo, hi = from + kSumKeys < seen.hi ? from + kSumKeys : seen.hi;
    Vec<A> part[NV] = {};
    for (int j = lo; j < hi; ++j) {
      unroll<NV>([&](auto v) __attribute__((always_inline)) {
        const Vec<A> p = exp2((load(s + (j * NV + v) * w) - m[v]) * factor);
        store(s + (j * NV + v) * w, p);
        part[v] += p;
      });
    }
    unroll<NV>([&](auto v) __attribute__((always_inline)) { sum[v] += part[v]; });
  }
  for (int v = 0; v < NV; ++v) tile.l[v] += sum[v];
}

}  // namespace qkv::inline QKV_LEVEL
