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
#include "cpu/rows-inl.h"
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

template <class A>
struct Scratch {  // one worker's memory
  A *q, *o, *s, *k, *v, *packed, *rows, *bias, *kept, *terms;

  static int64_t ld(const Problem& p) { return round_up(p.D > p.Dv ? p.D : p.Dv, kLanes<A>); }
  static int64_t carve(const Problem& p, const Plan& plan, A* base, Scratch* out) {
    constexpr int64_t w = kLanes<A>;
    const int64_t sizes[] = {plan.worker_rows * query_columns<A>(p),
                             plan.worker_rows * round_up(p.Dv, w),
                             int64_t{kKeys} * kMaxLanes,
                             kKeys * round_up(p.D, w),
                             kKeys * round_up(p.Dv, w),
                             kMaxLanes * ld(p),
                             p.bias.data ? int64_t{kMaxLanes} * kKeys : 0,
                             packed_size<A>(p.Dv),
                             has_threshold(p.normalizer) ? longest_keys(p) * kMaxLanes : 0,
                             AdditiveTerms<A>::size(p)};
    A** fields[] = {&out->q,    &out->o,    &out->s,      &out->k,    &out->v,
                    &out->rows, &out->bias, &out->packed, &out->kept, &out->terms};
    int64_t used = 0;
    for (int i = 0; i < 10; ++i) {
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
};

// --- tasks ---------------------------------------------------------------------------------------------------

inline bool has_stats(const Problem& p) {
  const StatsOut& s = p.stats;
  return s.entropy || s.max || s.argmax || s.received || s.distance || s.top_p;
}

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
    t.first = t.living > 0 ? t.position[0] : INT64_MAX;
    t.last = t.living > 0 ? t.position[t.living - 1] : INT64_MIN;
    tile.used = t.living > 0;
    return;
  }
  t.living = 0;
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

template <class A, int NV>
inline bool reads_pairs(const Problem& p) {
  return Tile<A, NV>::kCanPair && p.dtype == DType::bf16 && p.score == Score::dot;
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

template <class A>
inline void load_bias(const Problem& p, int64_t batch, const TileLanes& lanes, int64_t j0, int n, A* rows) {
  const int64_t lead = lead_offset(p, p.bias, batch), size = itemsize(p.bias.dtype);
  for (int i = 0; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    const int64_t at = lead + (mutant(16) ? 0 : lanes.head[i]) * p.bias.h + lanes.query[i] * p.bias.s + j0 * p.bias.d;
    load_row(p.bias.data + at * size, p.bias.dtype, p.bias.d, n, rows + i * kKeys);
  }
}

// --- scores --------------------------------------------------------------------------------------------------

// Softcap, bias and ALiBi: a pass over the score tile, in natural units. A finite sum is kept below A's range
// (2^127): two additive -FLT_MAX are not "masked".
template <class A, int NV>
inline void modify_scores(const Problem& p, const ScoreRule<A>& rule, const TileLanes& lanes, int64_t j0,
                          const Visible& seen, const Scratch<A>& scratch, Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>, L = NV * w;
  constexpr A kLimit = sizeof(A) == 4 ? static_cast<A>(0x1p127) : static_cast<A>(0x1p1023);
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
      if (p.bias.data) {
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
        if (p.bias.data) {
          const Vec<A> b = bias[j - jb];
          const Vec<A> sum = s + b, finite = b - b;  // 0, or NaN where the bias is not finite
          Vec<A> kept = sum < splat(-kLimit) ? splat(-kLimit) : sum;
          kept = kept > splat(kLimit) ? splat(kLimit) : kept;
          s = ((finite == Vec<A>{}) & (s - s == Vec<A>{})) ? (mutant(13) ? sum : kept) : sum;
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
  for (int j = seen.lo; j < seen.hi; ++j) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      const Vec<A> p = exp2((load(s + (j * NV + v) * w) - m[v]) * factor);
      store(s + (j * NV + v) * w, p);
      sum[v] += p;
    });
  }
  for (int v = 0; v < NV; ++v) tile.l[v] += sum[v];
}

// --- accumulate ----------------------------------------------------------------------------------------------

// After the last key: the weights that were multiplied with V, rounded to bfloat16, sum to l.
template <class A, int NV>
inline void settle(const Problem& p, Tile<A, NV>& tile) {
  if constexpr (Tile<A, NV>::kCanPair) {
    const bool sums_to_l = p.normalizer == Normalizer::softmax && !p.dropout.threshold && !p.focus.centre.data;
    if (!tile.pairs || !tile.used || !sums_to_l) return;
    Vec<A> alpha[NV];
    for (int v = 0; v < NV; ++v) {
      alpha[v] = tile.rounded[v] == Vec<A>{} ? splat(static_cast<A>(1)) : tile.l[v] / tile.rounded[v];
    }
    rescale<A, NV>(alpha, p.Dv, tile);
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

// Scores of one tile against the keys it sees in a block, masked: seen.lo ... seen.hi - 1 of scratch.s.
template <class A, int NV>
inline void tile_scores(const Problem& p, const ScoreRule<A>& rule, const Tile<A, NV>& tile, const Visible& seen,
                        int64_t j0, const Block<A>& k, const Scratch<A>& scratch, Vec<A> (&top)[NV], Ahead& next) {
  constexpr int L = NV * kLanes<A>;
  for (int v = 0; v < NV; ++v) top[v] = splat(-kInf<A>);
  const bool dot = p.score == Score::dot;
  if (!dot) score_additive<A, NV>(p.D, tile.few, tile.rows, seen, k, tile.q, {scratch.terms, p.D}, scratch.s, top);
  if constexpr (NV == 1) {
    if (tile.few && dot) {
      score_few(k, tile.q, round_up(p.D, kLanes<A>), tile.rows, seen.lo, seen.hi, scratch.s, top[0], next);
    }
  }
  if constexpr (Tile<A, NV>::kCanPair) {
    if (tile.pairs) score_pairs<NV>(k, tile.q, p.D, seen.lo, seen.hi, scratch.s, top, next);
  }
  if (!tile.few && !tile.pairs && dot) {
    for_rows(seen.hi - seen.lo, [&](auto R, int64_t row) __attribute__((always_inline)) {
      fetch(next);
      score_rows<R.value, NV>(k.data + (seen.lo + row) * k.ld, k.ld, tile.q, p.D, scratch.s + (seen.lo + row) * L, top);
    });
  }
  if (rule.modified) modify_scores<A, NV>(p, rule, tile.lanes, j0, seen, scratch, top);
  if (seen.partial) mask_scores<A, NV>(seen, scratch.s, top);
}

inline void poll(const Problem& p, int worker) {
  if (worker == 0 && p.control && p.control->poll) p.control->poll(*p.control);
}

struct Keys {  // a range of them, from a multiple of kKeys; of one kv head
  int64_t first, end, head;
};

// Where the keys go on after a range, for the cache.
template <class A, int NV>
inline Keys if_seen(const Problem& p, int64_t batch, Keys keys, int tiles, const Tile<A, NV>* tile) {
  if (keys.first >= keys.end) return {0, 0, 0};
  Rect rect{INT64_MAX, INT64_MIN, keys.first, keys.end - 1};
  for (int i = 0; i < tiles; ++i) {
    if (!tile[i].used) continue;
    rect.p0 = tile[i].lanes.first < rect.p0 ? tile[i].lanes.first : rect.p0;
    rect.p1 = tile[i].lanes.last > rect.p1 ? tile[i].lanes.last : rect.p1;
  }
  const bool seen = rect.p0 <= rect.p1 && mask_cover(p.program, batch, rect) != Cover::None;
  return seen ? keys : Keys{0, 0, 0};
}

// How often all tiles together call the product of so many rows.
template <class A, int NV>
inline int64_t turns(const Problem& p, const Tile<A, NV>& tile, int tiles, bool scores) {
  if (tile.few) return few_turns<A>(tile.rows, scores ? p.D : p.Dv, scores);
  const int at_once = tile.pairs ? kPairRows : kMaxRows;
  return tiles * (((scores ? kKeys : p.Dv) + at_once - 1) / at_once);
}

// What to ask for while all tiles work on a block of K or V.
template <class A, int NV>
inline Ahead follow(const Problem& p, const View& view, const Tile<A, NV>& tile, int tiles, RowRange block,
                    RowRange next) {
  const bool scores = &view == &p.k;
  const int64_t columns = scores ? p.D : p.Dv, often = turns(p, tile, tiles, scores);
  return tile.few ? ahead_few(view, columns, block, next, often) : ahead(view, next.first, next.n, columns, often);
}

// Walks the blocks of keys; visit(tile, seen, j0, n, next, top) runs for each tile that sees some of a block. `after`
// are the keys that will be walked next, none if that is not known.
template <class A, int NV, class Visit>
inline void for_blocks(const Problem& p, int64_t batch, const Sequence& seq, Keys keys, Keys after, int tiles,
                       Tile<A, NV>* tile, const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker,
                       const Visit& visit) {
  const int64_t size = itemsize(p.k.dtype);
  const char* k_rows = p.k.data + (lead_offset(p, p.k, batch) + seq.k_row * p.k.s) * size;
  const char* k0 = k_rows + keys.head * p.k.h * size;
  Visible seen;
  Keys next{0, 0, 0};
  Ahead k_ahead;
  for (int64_t j0 = keys.first; j0 < keys.end; j0 += kKeys) {
    const int n = static_cast<int>(keys.end - j0 < kKeys ? keys.end - j0 - (mutant(15) && j0 > 0) : kKeys);
    Block<A> k{nullptr, 0};
    bool loaded = false;
    for (int i = 0; i < tiles; ++i) {
      if (!tile[i].used) continue;
      if (p.bias.data) load_bias(p, batch, tile[i].lanes, j0, n, scratch.bias);
      look<A>(p, batch, tile[i].lanes, j0, n, p.bias.data ? scratch.bias : nullptr, seen);
      if (seen.lo == seen.hi) continue;
      if (!loaded) {
        const char* const first = k0 + j0 * p.k.s * size;
        if constexpr (Tile<A, NV>::kCanPair) {
          if (tile[0].pairs) load_keys(p.k, first, n, p.D, scratch.k, k);
        }
        if (p.score == Score::additive)
          load_additive_keys<A>(p.k, first, n, p.D, tile[0].few, scratch.k, {scratch.terms, p.D}, k);
        else if (!tile[0].pairs) k = load_block(p.k, first, n, p.D, tile[0].few ? tile[0].rows : 0, scratch.k);
        loaded = true;
        next = {j0 + kKeys, j0 + 2 * kKeys < keys.end ? j0 + 2 * kKeys : keys.end, keys.head};
        next = if_seen(p, batch, next.first < next.end ? next : after, tiles, tile);
        const char* const rows = k_rows + (next.head * p.k.h + next.first * p.k.s) * size;
        const RowRange following{rows, next.end - next.first};
        k_ahead = follow(p, p.k, tile[0], tiles, {first, n}, following);
      }
      Vec<A> top[NV];
      tile_scores<A, NV>(p, rule, tile[i], seen, j0, k, scratch, top, k_ahead);
      visit(tile[i], seen, j0, n, next, top);
    }
    if (j0 / kKeys % 8 == 7) poll(p, worker);
    if (stopped(p)) return;
  }
}

// closing: what else to ask for in the last blocks; nullptr for nothing.
template <class A, int NV>
inline void accumulate(const Problem& p, int64_t batch, const Sequence& seq, Keys keys, Keys after, int tiles,
                       Tile<A, NV>* tile, const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker,
                       Ahead* closing = nullptr) {
  constexpr int L = NV * kLanes<A>;
  const char* v_rows = p.v.data;
  const int64_t size = itemsize(p.dtype);
  if (v_rows) v_rows += (lead_offset(p, p.v, batch) + seq.k_row * p.v.s) * size;
  const auto v_row = [&](int64_t head, int64_t j) { return v_rows + (head * p.v.h + j * p.v.s) * size; };
  Block<A> v{nullptr, 0};
  PairValues pairs;
  Ahead v_ahead;
  uint32_t odd[kMaskWords];
  int64_t loaded = -1, packed = -1, checked = -1;  // the blocks in v, in scratch.packed and of odd
  const auto visit = [&](Tile<A, NV>& t, const Visible& seen, int64_t j0, int n, Keys next, const Vec<A>(&top)[NV]) {
    if (p.normalizer == Normalizer::softmax) softmax<A, NV>(seen, rule.c, top, p.Dv, scratch.s, t);
    else apply_normalizer<A, NV>(p, rule.natural, rule.c, seen, t.m, nullptr, t.threshold, t.l, scratch.s);
    if (p.focus.centre.data) focus_weights<A, NV>(p, batch, t.lanes, seen, j0, scratch.s);
    if (p.dropout.threshold) drop_weights<A, NV>(p, batch, t.lanes, seen, j0, scratch.s);
    if (p.Dv == 0) return;
    if (loaded != j0) {
      const char* const first = v_row(keys.head, j0);
      if constexpr (Tile<A, NV>::kCanPair) {
        if (t.pairs) load_values(p.v, first, n, p.Dv, scratch.v, pairs);
      }
      if (!t.pairs) v = load_block(p.v, first, n, p.Dv, t.few ? t.rows : 0, scratch.v);
      v_ahead = follow(p, p.v, t, tiles, {first, n}, {v_row(next.head, next.first), next.end - next.first});
      if (keys.end - j0 <= int64_t{kClosingBlocks} * kKeys) v_ahead.beside = closing;
    }
    loaded = j0;
    if constexpr (Tile<A, NV>::kCanPair) {
      if (t.pairs) {
        add_odd_values<NV>(pairs, p.v, v_row(keys.head, j0), seen, p.Dv, scratch.s, t.o);
        pack_weights<NV>(seen.lo, seen.hi, scratch.s, t.rounded);
        if (pairs.any_plain) output_pairs<NV>(pairs.data, p.Dv, seen.lo, seen.hi, scratch.s, t.o, v_ahead);
        return;
      }
    }
    Block<A> values = v;
    if (seen.partial && !mutant(2)) {
      if (!v.data) {  // few rows: the guard wants them all
        convert_rows(p.v, v.first, n, p.Dv, scratch.v);
        v = {scratch.v, v.ld};
      }
      if (checked != j0) find_odd_rows(v, n, p.Dv, odd);
      checked = j0;
      values = guard_values<A, NV>(seen, v, odd, p.Dv, scratch.v, scratch.s, t);
      if (v.data == scratch.v && values.data == scratch.v) loaded = -1;  // rows were zeroed: convert again
    }
    if constexpr (NV == 1) {
      if (t.few) {
        output_few(values, scratch.s, t.rows, seen.lo, seen.hi, t.o, round_up(p.Dv, kLanes<A>), v_ahead);
        return;
      }
    }
    // Worth a copy where the rows collide in the cache, not for one that guard_values has just made.
    const bool as_is = !collides(v) || values.data != v.data || loaded < 0;
    if (!as_is && packed != j0) pack_columns(v.data, v.ld, n, p.Dv, scratch.packed);
    if (!as_is) packed = j0;
    const int count = seen.hi - seen.lo;
    for_rows(p.Dv, [&](auto R, int64_t d) __attribute__((always_inline)) {
      fetch(v_ahead);
      const A* column = as_is ? values.data + seen.lo * values.ld + d : scratch.packed + packed_index<A>(d, seen.lo);
      output_rows<Layout::Transposed, R.value, NV>(column, as_is ? values.ld : kPitch<A>, scratch.s + seen.lo * L,
                                                   count, t.o + d * L);
    });
  };
  for_blocks<A, NV>(p, batch, seq, keys, after, tiles, tile, rule, scratch, worker, visit);
}

}  // namespace qkv::inline QKV_LEVEL
