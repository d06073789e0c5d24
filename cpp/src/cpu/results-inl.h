// SPDX-License-Identifier: Apache-2.0
// What a task leaves behind: out and lse from its tiles, and, in a second walk over the keys with the normaliser
// known, the weights or their statistics.
#pragma once

#include <string.h>

#include "cpu/closing-inl.h"
#include "cpu/threshold-inl.h"
#include "qkv/softmax.h"
#include "qkv/stats.h"

namespace qkv::inline QKV_LEVEL {

template <class A>
struct Normaliser {  // p = 2^(c (s - m) - shift) factor
  A m[kMaxLanes], shift[kMaxLanes], factor[kMaxLanes];
  double lse[kMaxLanes];
};

// m and l of the tile, the sink included, as the factors of its rows.
template <class A, int NV>
inline void normalise(const Problem& p, int64_t batch, const ScoreRule<A>& rule, const Tile<A, NV>& tile,
                      Normaliser<A>& out) {
  constexpr int w = kLanes<A>;
  A l[NV * w];
  for (int v = 0; v < NV; ++v) {
    store(out.m + v * w, tile.m[v]);
    store(l + v * w, tile.l[v]);
  }
  const bool wants_lse = p.lse || p.sinks;
  if (p.normalizer == Normalizer::softmax && !wants_lse && !p.lse_in && tile.lanes.living == tile.lanes.live) {
    for (int v = 0; v < NV; ++v) {  // the usual: all lanes at once
      const Vec<A> sum = tile.l[v], top = tile.m[v];
      store(out.m + v * w, top == splat(-kInf<A>) ? Vec<A>{} : top);
      store(out.shift + v * w, Vec<A>{});
      store(out.factor + v * w, inverse<A>(sum));
    }
    for (int i = tile.lanes.live; i < NV * w; ++i) out.factor[i] = 0;
    return;
  }
  for (int i = tile.lanes.live; i < NV * w; ++i) out.factor[i] = 0;
  for (int i = 0; i < tile.lanes.live; ++i) {
    out.shift[i] = 0;
    if (!tile.lanes.alive[i]) {
      out.m[i] = 0;
      out.factor[i] = 0;
      out.lse[i] = -HUGE_VAL;
      continue;
    }
    if (p.lse_in) {
      const int64_t at = result_index(p, batch, tile.lanes.result_head[i], tile.lanes.row[i]);
      const double lse = load_as_double(p.lse_in, kDType<A>, at);
      out.m[i] = 0;
      out.shift[i] = static_cast<A>(lse == -HUGE_VAL ? HUGE_VAL : lse * kLog2e);
      out.factor[i] = 1;
      out.lse[i] = lse;
      continue;
    }
    // Other normalizers leave in l whether anything was seen, and NaN.
    out.factor[i] = l[i] == 0 ? 0 : (p.normalizer == Normalizer::softmax ? 1 : l[i]) / l[i];
    if (wants_lse) {
      SoftmaxState state{out.m[i] * (mutant(19) ? rule.natural * kLog2e : rule.natural), l[i]};
      if (p.sinks && !mutant(18)) {
        const Rescale r = state.merge({p.sinks[tile.lanes.head[i]], 1});
        out.factor[i] = l[i] == 0 ? 0 : static_cast<A>(r.self / state.l);
      }
      out.lse[i] = state.lse();
    }
    if (out.m[i] == -kInf<A>) out.m[i] = 0;
  }
}

template <class A, int NV>
inline void write_rows(const Problem& p, int64_t batch, const Sequence& seq, const Scratch<A>& scratch,
                       const Tile<A, NV>& tile, const Normaliser<A>& norm) {
  const int64_t ld = Scratch<A>::ld(p);
  if (p.lse) {
    for (int i = 0; i < tile.lanes.live; ++i) {
      const int64_t at = result_index(p, batch, tile.lanes.result_head[i], tile.lanes.row[i]);
      static_cast<A*>(p.lse)[at] = static_cast<A>(norm.lse[i]);
    }
  }
  if (!p.out.data || tile.at_once) return;
  constexpr int w = kLanes<A>, L = NV * w;
  A factor[L];
  for (int v = 0; v < NV; ++v) store(factor + v * w, load(norm.factor + v * w));
  if (p.gate.data) {
    const int64_t lead = lead_offset(p, p.gate, batch);
    for (int i = 0; i < tile.lanes.live; ++i) {
      if (norm.factor[i] == 0) continue;
      const int64_t at = lead + tile.lanes.head[i] * p.gate.h + (mutant(20) ? 0 : tile.lanes.query[i]) * p.gate.s;
      factor[i] *= static_cast<A>(reinterpret_cast<const double*>(p.gate.data)[at]);
    }
  }
  const bool in_place = whole_vectors<A>(p.out, p.Dv);
  const bool rounds = !in_place && p.dtype == DType::bf16 && p.out.d == 1 && p.Dv % w == 0 && !tile.by_rows;
  const int64_t size = itemsize(p.dtype), step = p.out.s * size, head_step = p.out.h * size;
  char* const first = p.out.data + lead_offset(p, p.out, batch) * size + seq.q_row * step;
  char* target[L];
  A* row[L];
  for (int i = 0; i < L; ++i) {
    row[i] = scratch.rows + i * ld;
    if (i >= tile.lanes.live) continue;
    target[i] = first + tile.lanes.result_head[i] * head_step + tile.lanes.row[i] * step;
    if (in_place) row[i] = reinterpret_cast<A*>(target[i]);
  }
  if (tile.by_rows && tile.used) {
    const int64_t n = round_up(p.Dv, kLanes<A>);
    for (int i = 0; i < tile.lanes.live; ++i) {
      const bool dead = i >= tile.rows || norm.factor[i] == 0;
      const A* const from = tile.o + i * n;
      A* const to = row[i];
      const Vec<A> f = splat(factor[i]);
      if (dead) {
        for (int64_t d = 0; d < n; d += kLanes<A>) store(to + d, Vec<A>{});
      } else {
        for (int64_t d = 0; d < n; d += kLanes<A>) store(to + d, load(from + d) * f);
      }
    }
  } else if (tile.used && rounds) {
    if constexpr (sizeof(A) == 4) {
      uint16_t* half_row[L];
      for (int i = 0; i < L; ++i) {
        half_row[i] = reinterpret_cast<uint16_t*>(i < tile.lanes.live ? target[i] : reinterpret_cast<char*>(row[i]));
      }
      return lanes_to_rows<A, NV>(tile.o, p.Dv, factor, norm.factor, half_row);
    }
  } else if (tile.used) {
    lanes_to_rows<A, NV>(tile.o, p.Dv, factor, norm.factor, row);
  } else {
    for (int i = 0; i < tile.lanes.live; ++i) memset(row[i], 0, static_cast<size_t>(p.Dv) * sizeof(A));
  }
  for (int i = 0; i < tile.lanes.live && !in_place; ++i) store_row(row[i], p.Dv, target[i], p.dtype, p.out.d);
}

// --- the second walk -----------------------------------------------------------------------------------------

// Scores become normalised weights, exactly 0 where masked.
template <class A, int NV>
inline void weigh(const Visible& seen, A c, const Normaliser<A>& norm, A* s) {
  constexpr int w = kLanes<A>;
  for (int v = 0; v < NV; ++v) {
    const Vec<A> m = load(norm.m + v * w), shift = load(norm.shift + v * w), factor = load(norm.factor + v * w);
    for (int j = seen.lo; j < seen.hi; ++j) {
      A* at = s + (j * NV + v) * w;
      const Vec<A> x = load(at);
      const Vec<A> p = exp2(fma(x - m, splat(c), -shift)) * factor;
      store(at, x == splat(-kInf<A>) ? Vec<A>{} : p);
    }
  }
}

template <class A, int NV>
inline void write_weights(const Problem& p, int64_t batch, const TileLanes& lanes, const Visible& seen, int64_t j0,
                          const A* weights) {
  constexpr int L = NV * kLanes<A>;
  for (int i = 0; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    A* row = static_cast<A*>(p.weights) + result_index(p, batch, lanes.result_head[i], lanes.row[i]) * p.Sk + j0;
    for (int j = seen.lo; j < seen.hi; ++j) row[j] = weights[j * L + i];
  }
}

template <class A, int NV>
inline void add_stats(const Problem& p, int64_t batch, const TileLanes& lanes, const Visible& seen, int64_t j0,
                      const A* weights) {
  constexpr int L = NV * kLanes<A>;
  const StatsOut& out = p.stats;
  for (int i = 0; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    const int64_t at = result_index(p, batch, lanes.result_head[i], lanes.row[i]);
    RowStats<A> row;
    if (out.argmax) row.argmax = out.argmax[at];
    if (out.argmax) row.most = static_cast<A*>(out.max)[at];
    for (int j = seen.lo; j < seen.hi; ++j) {
      if (seen.partial && !(seen.bits[j] >> i & 1)) continue;
      const A w = weights[j * L + i];
      row.add(out, lanes.position[i], j0 + j, w);
      if (out.received) {
        A* received = static_cast<A*>(out.received);
        received[(batch * result_heads(p) + lanes.result_head[i]) * p.Sk + j0 + j] += w;
      }
      if (out.top_p) insert_top(out, at, j0 + j, w);
    }
    if (out.argmax) out.argmax[at] = row.argmax;
    if (out.argmax) static_cast<A*>(out.max)[at] = row.most;
    if (out.entropy) static_cast<A*>(out.entropy)[at] += static_cast<A>(row.entropy);
    if (out.distance) static_cast<A*>(out.distance)[at] += static_cast<A>(row.distance);
  }
}

template <class A, int NV>
inline void second_walk(const Problem& p, int64_t batch, const Sequence& seq, const Keys& keys, int tiles,
                        Tile<A, NV>* tile, const Normaliser<A>* norm, const ScoreRule<A>& rule,
                        const Scratch<A>& scratch, int worker) {
  const bool stats = has_stats(p);
  for (int i = 0; i < tiles; ++i) tile[i].key_lanes = kLanes<A>;  // weights are read key by key
  prepare_walk<A, NV>(p, batch, seq, keys, 1, tiles, tile, rule, scratch, worker);
  const auto visit = [&](Tile<A, NV>& t, const Visible& seen, int64_t j0, int, const Next&, const Vec<A>(&)[NV]) {
    const A* const factor = norm[&t - tile].factor;
    if (p.normalizer == Normalizer::softmax) weigh<A, NV>(seen, rule.c, norm[&t - tile], scratch.s);
    else apply_normalizer<A, NV>(p, rule.natural, rule.c, seen, t.m, factor, t.threshold, t.l, scratch.s);
    if (p.focus.centre.data) focus_weights<A, NV>(p, batch, t.lanes, seen, j0, scratch.s);
    if (p.weights) write_weights<A, NV>(p, batch, t.lanes, seen, j0, scratch.s);
    if (stats) add_stats<A, NV>(p, batch, t.lanes, seen, j0, scratch.s);
  };
  for_blocks<A, NV>(p, batch, seq, keys, {}, tiles, tile, rule, scratch, worker, visit);
}

// --- one task ------------------------------------------------------------------------------------------------

// Lays out the tile of rows first_row ... of a group, the index-th of a worker.
template <class A, int NV>
inline void place_tile(const Problem& p, const Plan& plan, const Sequence& seq, int64_t group, int64_t first_row,
                       int index, const Scratch<A>& scratch, Tile<A, NV>& t) {
  constexpr int L = NV * kLanes<A>;
  const int64_t own = own_rows(p, seq) * plan.group_size;
  t.q = scratch.q + index * L * query_columns<A>(p);
  t.o = scratch.o + index * L * round_up(p.Dv, kLanes<A>);
  fill_lanes<A, NV>(p, plan, seq, group, p.cu_q ? seq.Sq : result_rows(p), first_row, t);
  t.few = NV == 1 && few_rows(p, own);
  t.pairs = reads_pairs<A>(p, plan) && !t.few;
  t.dots = multiplies_pairs<A>(plan) && t.few;
  t.key_lanes = key_lanes<A, NV>(p, t.few, own);
  t.split = reads_split<A, NV>(p, plan, seq);
  t.weighs = t.weighed = false;
  t.at_once = false;
  t.by_rows = t.few || (t.pairs && NV == 1);
  t.o_row = t.by_rows ? round_up(p.Dv, kLanes<A>) : 1;
  t.o_column = t.by_rows ? 1 : L;
  if constexpr (Tile<A, NV>::kCanSplit) {
    t.pieces.data = scratch.split_q + index * L * split_lane_size(p.D);
    t.pieces.exact = t.q;
  }
  t.rows = static_cast<int>(own - first_row < t.lanes.live ? (own < first_row ? 0 : own - first_row) : t.lanes.live);
  t.lazy = dots_values(p, t) ? 0 : kLazyLog2;
}

inline int64_t kv_head(const Problem& p, int64_t group) {
  return p.heads ? p.heads[group] / (p.Hq / p.Hkv) : (mutant(17) ? p.Hkv - 1 - group : group);
}

// Are rows done after a single block of keys, but for their factor 1 / l, and can vectors be written to out?
template <class A, int NV>
inline bool ends_at_once(const Problem& p, const Sequence& seq, const Tile<A, NV>& t) {
  const bool whole = p.Dv > 0 && whole_vectors<A>(p.v, p.Dv) && whole_vectors<A>(p.out, p.Dv);
  const bool plain = p.normalizer == Normalizer::softmax && !p.sinks && !p.gate.data && !p.lse_in;
  const bool one_run = t.lanes.consecutive && t.lanes.living == t.lanes.live;
  return seq.Sk <= kBlockKeys<NV> && whole && plain && one_run && !t.few && !t.pairs && !t.split;
}

template <class A, int NV>
inline void load_tile(const Problem& p, int64_t batch, const Sequence& seq, const ScoreRule<A>& rule,
                      const Scratch<A>& scratch, Tile<A, NV>& t) {
  if (t.used) {
    t.at_once = ends_at_once<A, NV>(p, seq, t);
    if (t.at_once) {
      const int64_t at =
          lead_offset(p, p.out, batch) + t.lanes.head[0] * p.out.h + (seq.q_row + t.lanes.row[0]) * p.out.s;
      t.o = reinterpret_cast<A*>(p.out.data) + at;
      t.o_row = p.out.s;
      t.o_column = 1;
    }
    load_queries<A, NV>(p, batch, seq, rule, scratch, t);
  } else {
    for (int v = 0; v < NV; ++v) t.m[v] = t.l[v] = Vec<A>{};
  }
}

template <class A, int NV>
inline bool has_weights(const Tile<A, NV>& tile) {
  bool has = false;
  for (int v = 0; v < NV; ++v) has = has || any(tile.l[v] != Vec<A>{});
  return has;
}

// All keys for the rows of a chunk, from row `first` of the group on.
template <class A, int NV>
inline void run_chunk(const Problem& p, const Plan& plan, int64_t batch, int64_t group, int64_t chunk, int64_t first,
                      const Scratch<A>& scratch, int worker) {
  constexpr int L = NV * kLanes<A>, kTiles = kTaskRows / L;
  const Sequence seq = sequence(p, batch);
  const ScoreRule<A> rule = score_rule<A>(p, plan);
  [[maybe_unused]] const TileUnit unit(reads_tiles<A>(p) || reads_split<A, NV>(p, plan, seq));
  const int64_t rows = (p.cu_q ? seq.Sq : result_rows(p)) * plan.group_size;
  const int64_t end = (chunk + 1) * plan.task_rows < rows ? (chunk + 1) * plan.task_rows : rows;
  Tile<A, NV> tile[kTiles];
  int tiles = 0;
  for (int64_t row = chunk * plan.task_rows > first ? chunk * plan.task_rows : first; row < end; row += L, ++tiles) {
    place_tile<A, NV>(p, plan, seq, group, row, tiles, scratch, tile[tiles]);
    load_tile<A, NV>(p, batch, seq, rule, scratch, tile[tiles]);
  }
  if (tiles == 0) return;
  const Keys keys{0, seq.Sk, kv_head(p, group)};
  prepare_walk<A, NV>(p, batch, seq, keys, 0, tiles, tile, rule, scratch, worker);
  if (!p.lse_in && p.normalizer != Normalizer::none) {
    const Keys seen = trim(p, batch, keys, tiles, tile);
    const auto walk = [&](Ahead* closing) {
      accumulate<A, NV>(p, batch, seq, seen, {}, tiles, tile, rule, scratch, worker, closing);
    };
    if (tiles < kLeastClosingTiles) {
      walk(nullptr);
    } else {
      Closing closing;
      find_closing(p, plan, batch * plan.groups + group, chunk, seen, tiles, tile, closing);
      walk(closing.first());
    }
    for (int i = 0; i < tiles; ++i) {
      join_sums(tile[i]);
      recover_small_sums<A, NV>(p, batch, seq, seen, rule, scratch, worker, tile[i]);
    }
  }
  Normaliser<A> norm[kTiles];
  const bool twice = p.weights || has_stats(p);
  for (int i = 0; i < tiles; ++i) {
    if (tile[i].at_once && !has_weights(tile[i]) && !mutant(89)) clear_output(p, tile[i]);
    if (tile[i].at_once && !p.lse && !twice) continue;
    normalise<A, NV>(p, batch, rule, tile[i], norm[i]);
    write_rows<A, NV>(p, batch, seq, scratch, tile[i], norm[i]);
  }
  if (twice) {
    second_walk<A, NV>(p, batch, seq, keys, tiles, tile, norm, rule, scratch, worker);
  }
}

}  // namespace qkv::inline QKV_LEVEL
