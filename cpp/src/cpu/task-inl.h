// SPDX-License-Identifier: Apache-2.0
// What a task works on: how q.k becomes an exponent, which product its tiles take, a worker's memory, and which rows
// lie in the lanes of a tile. forward-inl.h has the formula and the stages.
#pragma once

#include <math.h>

#include "cpu/additive-inl.h"
#include "cpu/few-operands-inl.h"
#include "cpu/kernel_table.h"
#include "cpu/normalizers-inl.h"
#include "cpu/pairs-inl.h"
#include "cpu/relative-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/split-inl.h"
#include "cpu/tiles.h"
#include "cpu/visible-inl.h"
#include "qkv/stats.h"

namespace qkv::inline QKV_LEVEL {

constexpr double kLog2e = 1.44269504088896340736;

template <class A>
struct ScoreRule {   // how q.k becomes the exponent c (s - m)
  A fold;            // exact factor of Q: the scale's sign, and its power of two where that is above 1
  A c;               // from the units of s to log2
  A scale, softcap;  // modified scores only: their s is in natural units
  double natural;    // natural units per unit of s
  bool modified;
};

inline void plan_scale(const Problem& p, Plan& plan) {
  int exponent = 0;
  const double mantissa = frexp(p.softcap ? p.scale / p.softcap : p.scale, &exponent);
  plan.fold = mantissa < 0 ? -1 : 1;
  plan.rest = mantissa < 0 ? -mantissa : mantissa;
  if (exponent > 1) plan.fold = ldexp(plan.fold, exponent - 1);  // q.k stays below the score: no early overflow
  plan.rest = ldexp(plan.rest, exponent > 1 ? 1 : exponent);
}

template <class A>
inline ScoreRule<A> score_rule(const Problem& p, const Plan& plan) {
  double rest = plan.rest;
  ScoreRule<A> r;
  r.modified = p.softcap != 0 || p.bias.data || p.alibi;
  r.fold = static_cast<A>(plan.fold);
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

// --- which product -------------------------------------------------------------------------------------------

inline int64_t own_rows(const Problem& p, const Sequence& seq) { return p.rows ? p.n_rows : seq.Sq; }

template <class A>
inline bool multiplies_pairs(const Plan& plan) {
  return kPairs && sizeof(A) == 4 && plan.pairs;
}
template <class A>
inline bool reads_pairs(const Problem& p, const Plan& plan) {  // Q and K as well
  return multiplies_pairs<A>(plan) && p.score == Score::dot;
}
template <class A>
inline bool reads_tiles(const Problem& p) {  // and in tile registers
  return kTileUnit && sizeof(A) == 4 && p.dtype == DType::bf16 && p.score == Score::dot;
}

// How many lanes of a score tile has a key? All of a vector; but few rows have as many as they are, and up to eight in
// tile registers eight, if they are plain: what else is done to scores wants a vector for each key, but a softmax need
// not be of lanes without a row.
template <class A, int NV>
inline int key_lanes(const Problem& p, bool few, int64_t rows) {
  const bool plain = p.score == Score::dot && p.normalizer == Normalizer::softmax && !p.softcap && !p.bias.data &&
                     !p.alibi && !p.focus.centre.data;
  if (NV > 1 || !plain) return kLanes<A>;
  if (few) return few_lanes<A>(static_cast<int>(rows));
  return reads_tiles<A>(p) && rows <= 8 ? 8 : kLanes<A>;
}

// How many vectors of lanes have the tiles of a sequence with so many rows? One wastes less when it holds every row;
// and tile registers take 16 lanes at a time anyway. Four take a twentieth less time than two, for up to as much
// padding.
template <class A>
inline int tile_vectors(const Problem& p, int64_t rows) {
  if (rows <= (reads_tiles<A>(p) ? kPartRows : kLanes<A>)) return 1;
  const int64_t narrow = round_up(rows, 2 * kLanes<A>), wide = round_up(rows, kTileVectors<A> * kLanes<A>);
  return wide * 20 > narrow * 21 ? 2 : kTileVectors<A>;
}

inline KeysSeen keys_seen(const MaskProgram& mask) {
  KeysSeen seen{kUnbounded, kUnbounded, kUnbounded, 1};
  for (int i = 0; i < mask.n; ++i) {
    const MaskNode& m = mask.nodes[i];
    int64_t count = 0;
    switch (m.op) {
      case MaskOp::Band:
        seen.before = m.a < seen.before ? m.a : seen.before;
        seen.after = m.b < seen.after ? m.b : seen.after;
        break;
      case MaskOp::Document:
        for (int64_t j = 0; j < m.n; ++j) count += j == 0 || m.data[j] != m.data[j - 1];
        if (count > 0 && m.n / count < seen.document) seen.document = m.n / count;
        break;
      case MaskOp::BlockSparse:
        for (int64_t j = 0; j < m.n; ++j) count += m.data[j] != 0;
        seen.share *= m.n > 0 ? static_cast<double>(count) / static_cast<double>(m.n) : 0;
        break;
      case MaskOp::All:
      case MaskOp::Prefix:
      case MaskOp::Lengths:
      case MaskOp::And: break;
      default: seen.share = 0;
    }
  }
  return seen;
}

// How many rows of a task meet a key that any of them sees, on average: the last of so many keys.
inline double rows_per_key(const KeysSeen& seen, int64_t rows, int64_t group_size, int64_t keys) {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t queries = rows / group_size, half = seen.document / 2;
  const int64_t behind = least(least(seen.before, half), keys - least(queries, keys) / 2);
  const int64_t ahead = least(least(seen.after, half), least(queries, keys) / 2);
  const int64_t mean = (behind < 0 ? 0 : behind) + (ahead < 0 ? 0 : ahead) + 1, own = least(rows, kTaskRows);
  const int64_t walked = least(keys, mean + own / group_size);
  return walked > 0 ? seen.share * static_cast<double>(own * mean) / static_cast<double>(walked) : 0;
}

template <class A, int NV>
inline bool may_split(const Problem& p) {
  return kTileUnit && NV == 2 && sizeof(A) == 4 && p.dtype != DType::bf16 && p.score == Score::dot && p.D > 0 &&
         mostly_whole(p.D) && mostly_whole(p.Dv) && !(p.dropout.scale > kMostDropoutScale);
}

template <class A, int NV>
inline bool reads_split(const Problem& p, const Plan& plan, const Sequence& seq) {
  const int64_t rows = own_rows(p, seq) * plan.group_size;
  return may_split<A, NV>(p) && rows >= kLeastSplitRows && rows * p.D >= kLeastSplitElements &&
         rows_per_key(plan.keys_seen, rows, plan.group_size, seq.Sk) >= kLeastRowsPerKey;
}

// --- memory --------------------------------------------------------------------------------------------------

template <class A>
struct Scratch {  // one worker's memory, as plan_scratch cuts it
  A *q, *o, *s, *k, *v, *packed, *rows, *bias, *kept, *terms;
  A *split_q, *split_k, *split_v, *split_p;  // split-inl.h
  A *few_pairs, *few_sums;                   // few-pairs-inl.h
  A *exact_q, *exact_o;                      // small-sums-inl.h

  Scratch(const Plan& plan, void* memory) {
    const int64_t* at = plan.scratch_at;
    const auto take = [&] { return static_cast<A*>(memory) + *at++; };
    q = take(), o = take(), s = take(), k = take(), v = take(), packed = take(), rows = take(), bias = take();
    kept = take(), terms = take(), split_q = take(), split_k = take(), split_v = take(), split_p = take();
    few_pairs = take(), few_sums = take(), exact_q = take(), exact_o = take();
  }
  static int64_t ld(const Problem& p) { return round_up(p.D > p.Dv ? p.D : p.Dv, kLanes<A>); }
};

template <class A>
inline void plan_scratch(const Problem& p, Plan& plan) {
  constexpr int64_t w = kLanes<A>;
  const bool split = may_split<A, 2>(p);
  const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t few = most(plan.part_heads, 1) * kFewRows<A>;  // rows of several heads at once (tokens-inl.h)
  const int64_t sizes[kScratchArrays] = {plan.worker_rows * query_columns<A>(p),
                                         plan.worker_rows * round_up(p.Dv, w),
                                         most(int64_t{kKeys} * kMaxLanes, kBlockKeys<1> * few),
                                         kKeys * round_up(p.D, w),
                                         kKeys * round_up(p.Dv, w),
                                         packed_size<A>(p.Dv),
                                         kMaxLanes * Scratch<A>::ld(p),
                                         p.bias.data ? int64_t{kMaxLanes} * kKeys : 0,
                                         has_threshold(p.normalizer) ? longest_keys(p) * kMaxLanes : 0,
                                         AdditiveTerms<A>::size(p),
                                         split ? plan.worker_rows * split_lane_size(p.D) : 0,
                                         split ? split_size(kKeys, p.D) : 0,
                                         split ? split_size(p.Dv, kKeys) : 0,
                                         split ? kMaxLanes * split_lane_size(kPassKeys) : 0,
                                         multiplies_pairs<A>(plan) ? few * kBlockKeys<1> / 2 + w : 0,
                                         multiplies_pairs<A>(plan) ? few * round_up(p.Dv, w) : 0,
                                         reads_pairs<A>(p, plan) ? kMaxLanes * query_columns<A>(p) : 0,
                                         reads_pairs<A>(p, plan) ? kMaxLanes * round_up(p.Dv, w) : 0};
  int64_t used = 0;
  for (int i = 0; i < kScratchArrays; ++i) {
    plan.scratch_at[i] = used;
    used += round_up(sizes[i], 64 / static_cast<int64_t>(sizeof(A)));
  }
  plan.scratch_bytes = used * static_cast<int64_t>(sizeof(A));
}

template <class A, int NV>
struct Tile {  // state of L rows
  TileLanes lanes;
  A *q, *o;  // Q^T (D, L), O^T (Dv, L); few rows: Q (rows, D), by rows: O (rows, Dv), D and Dv rounded up to the vector
  Vec<A> m[NV], l[NV];
  Threshold<A, NV> threshold;
  bool used;                // holds a living row
  bool few;                 // at most kFewRows rows: head_dim in the lanes
  bool by_rows;             // O is not transposed
  int rows;                 // of so many lanes; the others are padding
  int lazy;                 // log2 units that a score may be above m: kLazyLog2, or 0 where P of few rows is rounded
  bool weighs, weighed;     // its scores may become weights at once, and did so for this block
  bool at_once;             // O is the rows of out, made by the product of a single block: no time to transpose it
  int64_t o_row, o_column;  // its strides
  // bfloat16 where the processor multiplies it at full rate: Q and P are pairs.
  static constexpr bool kCanPair = kPairs && sizeof(A) == 4;
  bool pairs;
  bool dots;      // in products of few rows, which do not read pairs
  int key_lanes;  // of the score tile; if not all of a vector, m is the same in all so many
  // float cut into bfloat16 where the level has tile registers.
  static constexpr bool kCanSplit = kTileUnit && NV == 2 && sizeof(A) == 4;
  bool split;
  SplitQueries<NV> pieces;
};

// --- rows ----------------------------------------------------------------------------------------------------

inline bool few_rows(const Problem& p, int64_t rows) {
  if (p.dtype == DType::f64) return rows <= kFewRows<double>;
  return rows <= (reads_tiles<float>(p) ? kFewTileRows : kFewRows<float>);
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

}  // namespace qkv::inline QKV_LEVEL
