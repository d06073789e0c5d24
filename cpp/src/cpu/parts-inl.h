// SPDX-License-Identifier: Apache-2.0
// Few queries against long keys: the keys are cut into parts for threads to share, and the parts are merged.
//
// Cut        by the lengths of a sequence alone: a row's result must not depend on threads or on its neighbours. A part
//            leaves m, l and O of its rows behind; at most kMaxParts of them, whatever the length.
// Task       a run of parts of one kv head, or of several where the heads of a token lie next to each other in memory
//            (BSHD): block by block for all of them, so that the cache is read along memory.
// Merge      m = max m_i, l = sum l_i 2^(c (m_i - m)), o likewise, in the order of the parts (Dao et al. 2023,
//            Flash-Decoding). A sequence of one part is written at once.
#pragma once

#include "cpu/tokens-inl.h"

namespace qkv::inline QKV_LEVEL {

// --- the cut -------------------------------------------------------------------------------------------------

template <class A>
struct Cut {  // of the keys of one sequence
  int64_t parts = 0;
  int64_t keys = 0;   // of a part, a multiple of kKeys
  int64_t lanes = 0;  // of all tiles of its rows
};

// No parts where there are many rows, or nothing to cut; the chunks of rows do these.
template <class A>
inline Cut<A> cut(const Problem& p, const Plan& plan, const Sequence& seq) {
  const int64_t rows = own_rows(p, seq) * plan.group_size;
  if (rows == 0 || rows > kPartRows || seq.Sk == 0 || p.lse_in || p.weights || has_stats(p) ||
      two_walks(p.normalizer)) {
    return {};
  }
  const bool few = few_rows(p, rows);
  const int64_t least = few ? kPartKeys : 2 * kPartKeys, even = round_up((seq.Sk + kMaxParts - 1) / kMaxParts, kKeys);
  Cut<A> c;
  c.keys = even > least ? even : least;
  c.parts = (seq.Sk + c.keys - 1) / c.keys;
  c.lanes = round_up(rows, tile_vectors<A>(p, rows) * kLanes<A>);
  return few || c.parts > 1 ? c : Cut<A>{};
}

// --- what a part leaves behind -------------------------------------------------------------------------------

// m, l and O of so many lanes.
template <class A>
inline int64_t partial_size(const Problem& p, int64_t lanes) {
  return lanes * (round_up(p.Dv, kLanes<A>) + 2);
}

template <class A, int NV>
inline void save_partial(const Problem& p, const Tile<A, NV>& tile, A* to) {
  constexpr int w = kLanes<A>;
  for (int v = 0; v < NV; ++v) {
    store(to + v * w, tile.m[v]);
    store(to + (NV + v) * w, tile.l[v]);
  }
  const int64_t n = output_size(p, tile);
  for (int64_t i = 0; i < n; i += w) store(to + 2 * NV * w + i, load(tile.o + i));
}

// The tile as it would be after all parts; theirs lie `step` apart.
template <class A, int NV>
inline void merge_partials(const Problem& p, const ScoreRule<A>& rule, const A* from, int64_t step, int64_t count,
                           Tile<A, NV>& tile) {
  constexpr int w = kLanes<A>;
  clear(p, tile);
  const int64_t n = output_size(p, tile), ld = round_up(p.Dv, w);
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < NV; ++v) tile.m[v] = maximum(tile.m[v], load(from + i * step + v * w));
  }
  for (int64_t i = 0; i < count; ++i) {
    const A *m = from + i * step, *l = m + NV * w, *o = l + NV * w;
    Vec<A> factor[NV];
    for (int v = 0; v < NV; ++v) {
      // A part that saw nothing has l = 0; one that only saw NaN has m = -inf and l = NaN, which must stay.
      const Vec<A> own = load(m + v * w), one = splat(static_cast<A>(1));
      factor[v] = own == splat(-kInf<A>) ? one : exp2((own - tile.m[v]) * splat(rule.c));
      tile.l[v] += load(l + v * w) * factor[v];
    }
    for (int64_t r = 0, at = 0; tile.by_rows && r < tile.rows; ++r) {
      const Vec<A> f = splat(static_cast<A>(factor[0][r]));
      for (int64_t d = 0; d < ld; d += w, at += w) store(tile.o + at, fma(load(o + at), f, load(tile.o + at)));
    }
    for (int64_t at = 0; !tile.by_rows && at < n; at += NV * w) {
      for (int v = 0; v < NV; ++v) {
        A* to = tile.o + at + v * w;
        store(to, fma(load(o + at + v * w), factor[v], load(to)));
      }
    }
  }
}

template <class A, int NV>
inline void write_tile(const Problem& p, int64_t batch, const Sequence& seq, const ScoreRule<A>& rule,
                       const Scratch<A>& scratch, const Tile<A, NV>& tile) {
  Normaliser<A> norm;
  normalise<A, NV>(p, batch, rule, tile, norm);
  write_rows<A, NV>(p, batch, seq, scratch, tile, norm);
}

// --- tasks ---------------------------------------------------------------------------------------------------

struct PartRun {
  int64_t batch;
  int64_t group, groups;  // the first, how many
  int64_t first, end;     // parts
};

// Where the heads of a token lie next to each other, K and V of a block are asked for in that order, all heads of it
// while those before work: along memory the cache helps to read. Blocks of 768 KiB are 1.5 times as fast that way, with
// an L2 of 1 MiB; much larger ones would leave it before their turn, and are asked for head by head.
constexpr int64_t kMostRunBytes = int64_t{1} << 20;

template <class A, int NV>
inline void run_parts(const Problem& p, const Plan& plan, const PartRun& run, A* partials, const Scratch<A>& scratch,
                      int worker) {
  constexpr int L = NV * kLanes<A>, kTiles = kTaskRows / L;
  const Sequence seq = sequence(p, run.batch);
  const ScoreRule<A> rule = score_rule<A>(p, plan);
  const Cut<A> c = cut<A>(p, plan, seq);
  const int tiles = static_cast<int>(c.lanes / L), all = tiles * static_cast<int>(run.groups);
  [[maybe_unused]] const TileUnit unit(reads_tiles<A>(p));
  Tile<A, NV> tile[kTiles];
  for (int i = 0; i < all; ++i) {
    place_tile<A, NV>(p, plan, seq, run.group + i / tiles, i % tiles * L, i, scratch, tile[i]);
    load_tile<A, NV>(p, run.batch, seq, rule, scratch, tile[i]);
  }
  const int64_t last = run.end < c.parts ? run.end * c.keys : seq.Sk;
  const int64_t stride = run.groups > 1 ? kBlockKeys<NV> : c.keys;  // of one head, before the next one's turn
  const bool tokens = run.groups > 1 && !p.heads && is_one_run(p.k, p.D, run.groups) &&
                      is_one_run(p.v, p.Dv, run.groups) &&
                      (p.k.s + p.v.s) * itemsize(p.dtype) * kBlockKeys<NV> <= kMostRunBytes;
  [[maybe_unused]] bool by_tokens = false;
  if constexpr (NV == 1) by_tokens = tiles == 1 && goes_by_tokens<A>(p, tile[0], run.groups);
  const auto keys = [&](int64_t first, int64_t g) {
    return Keys{first, first + stride < last ? first + stride : last, kv_head(p, run.group + g)};
  };
  for (int64_t part = run.first; part < run.end; ++part) {
    for (int i = 0; i < all && part > run.first; ++i) {
      if (tile[i].used) clear(p, tile[i]);
    }
    const int64_t end = part + 1 < c.parts ? (part + 1) * c.keys : seq.Sk;
    for (int64_t j0 = part * c.keys; j0 < end; j0 += stride) {
      if constexpr (NV == 1) {
        if (by_tokens && !stopped(p)) {
          const int n = static_cast<int>(end - j0 < stride ? end - j0 : stride), heads = static_cast<int>(run.groups);
          if (j0 / stride % 8 == 7) poll(p, worker);
          if (accumulate_tokens<A>(p, run.batch, seq, j0, n, last, kv_head(p, run.group), heads, tile, rule, scratch)) {
            continue;
          }
        }
      }
      for (int64_t g = 0; g < run.groups && !stopped(p); ++g) {
        Keys after = tokens || g + 1 == run.groups ? keys(j0 + stride, 0) : keys(j0, g + 1);
        if (tokens) after.turn = g;
        if (tokens) after.turns = run.groups;
        accumulate<A, NV>(p, run.batch, seq, keys(j0, g), after, tiles, tile + g * tiles, rule, scratch, worker);
      }
    }
    for (int i = 0; i < all; ++i) {
      join_sums(tile[i]);
      const Keys own{part * c.keys, end, kv_head(p, run.group + i / tiles)};
      recover_small_sums<A, NV>(p, run.batch, seq, own, rule, scratch, worker, tile[i]);
      if (c.parts == 1) {
        write_tile<A, NV>(p, run.batch, seq, rule, scratch, tile[i]);
      } else if (tile[i].used) {
        A* const own = partials + (i / tiles * plan.parts + part) * plan.partial_size;
        save_partial<A, NV>(p, tile[i], own + i % tiles * partial_size<A>(p, L));
      }
    }
  }
}

template <class A, int NV>
inline void merge_parts(const Problem& p, const Plan& plan, int64_t batch, int64_t group, const A* partials,
                        const Scratch<A>& scratch) {
  constexpr int L = NV * kLanes<A>;
  const Sequence seq = sequence(p, batch);
  const ScoreRule<A> rule = score_rule<A>(p, plan);
  const Cut<A> c = cut<A>(p, plan, seq);
  for (int i = 0; i < c.lanes / L; ++i) {
    Tile<A, NV> tile;
    place_tile<A, NV>(p, plan, seq, group, i * L, 0, scratch, tile);
    load_tile<A, NV>(p, batch, seq, rule, scratch, tile);
    const A* const from = partials + i * partial_size<A>(p, L);
    if (tile.used) merge_partials<A, NV>(p, rule, from, plan.partial_size, c.parts, tile);
    write_tile<A, NV>(p, batch, seq, rule, scratch, tile);
  }
}

}  // namespace qkv::inline QKV_LEVEL
