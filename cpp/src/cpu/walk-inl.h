// SPDX-License-Identifier: Apache-2.0
// The walk over the keys: for each block, for each tile of a task, look -> scores -> softmax -> output, while what
// comes next is asked for. forward-inl.h has the formula, the layouts and the stages.
#pragma once

#include "cpu/few-inl.h"
#include "cpu/few-pairs-inl.h"
#include "cpu/weigh-inl.h"

namespace qkv::inline QKV_LEVEL {

// --- scores --------------------------------------------------------------------------------------------------

// Scores of one tile against the keys it sees in a block of n, masked: seen.lo ... seen.hi - 1 of scratch.s. A function
// of its own: within the walk, what that keeps would take registers from the products.
template <class A, int NV>
__attribute__((noinline)) void tile_scores(const Problem& p, const ScoreRule<A>& rule, int64_t batch, Tile<A, NV>& tile,
                                           int64_t j0, int n, const Block<A>& k, const SplitBlock& pieces,
                                           BiasRows<A>& bias, const Scratch<A>& scratch, Visible& seen,
                                           Vec<A> (&top)[NV], Ahead& next) {
  constexpr int L = NV * kLanes<A>;
  if constexpr (sizeof(A) == 4 && NV > 1) {
    const bool whole = seen.lo == 0 && seen.hi == kBlockKeys<NV> && !seen.partial;
    tile.weighed = false;
    if (tile.weighs && whole) {
      if constexpr (kPairs && !kTileUnit) {
        if (tile.pairs) tile.weighed = weigh_block<NV>(k.pairs, k.ld, pair_count(p.D), rule.c, scratch.s, tile, next);
      }
      if (!tile.pairs) tile.weighed = weigh_block<NV>(k.data, k.ld, p.D, rule.c, scratch.s, tile, next);
      if (tile.weighed) return;
    }
  }
  for (int v = 0; v < NV; ++v) top[v] = splat(-kInf<A>);
  const bool dot = p.score == Score::dot;
  if (!dot) score_additive<A, NV>(p.D, tile.few, tile.rows, seen, k, tile.q, {scratch.terms, p.D}, scratch.s, top);
  if constexpr (NV == 1) {
    if (tile.few && dot) {
      score_few(k, tile.q, round_up(p.D, kLanes<A>), tile.rows, tile.dots, tile.key_lanes, seen.lo, seen.hi, scratch.s,
                top[0], next);
    }
  }
  if constexpr (Tile<A, NV>::kCanPair) {
    if (tile.pairs) score_pairs<NV>(k, tile.q, p.D, seen, tile.key_lanes, scratch.s, top, next);
  }
  if constexpr (Tile<A, NV>::kCanSplit) {
    if (tile.split) {
      score_split<NV>(pieces, k, tile.pieces, p.D, seen, scratch.s, next);
      if (!rule.modified && !seen.partial) find_top<NV>(scratch.s, seen.lo, seen.hi, top);  // else it is found below
    }
  }
  if (!tile.few && !tile.pairs && !tile.split && dot) {
    for_rows<kProductRows<NV>>(seen.hi - seen.lo, [&](auto R, int64_t row) __attribute__((always_inline)) {
      fetch_beside(next);
      score_rows<R.value, NV>(k.data + (seen.lo + row) * k.ld, k.ld, tile.q, p.D, scratch.s + (seen.lo + row) * L, top,
                              next);
    });
  }
  const bool plain = bias.plain;
  if (rule.modified) modify_scores<A, NV>(p, rule, tile.lanes, j0, seen, bias, scratch.s, top);
  const bool late = plain && !bias.plain;  // met as it was added, what may hide
  if (late) look<A>(p, batch, tile.lanes, j0, n, bias.row, seen);
  if constexpr (NV == 1) {
    if (tile.key_lanes < kLanes<A>) return mask_narrow<A>(seen, tile.key_lanes, scratch.s, top[0]);
  }
  if (late || seen.partial) mask_scores<A, NV>(seen, scratch.s, top);
}

// --- blocks --------------------------------------------------------------------------------------------------

inline void poll(const Problem& p, int worker) {
  if (worker == 0 && p.control && p.control->poll) p.control->poll(*p.control);
}

struct Keys {  // a range of them, from a multiple of the blocks'; of one kv head
  int64_t first, end, head;
  int64_t turn = 0, turns = 0;  // of so many heads from this one on, which lie next to each other: a share of them
};

// Where the keys go on after a range, for the cache.
template <class A, int NV>
inline Keys if_seen(const Problem& p, int64_t batch, const Keys& keys, int tiles, const Tile<A, NV>* tile) {
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
  if (tile.few) return kFewTurns;
  const bool by_columns = !kTileUnit && NV == 1 && !scores;  // output_by_rows
  const int at_once = tile.pairs ? (by_columns ? kManyHalves : kPairRows) : (tile.split ? 32 : kProductRows<NV>);
  const int64_t groups = tile.split ? (scores ? split_groups(p.D) : kKeys / kGroup) : 1;
  return tiles * (((scores ? kBlockKeys<NV> : p.Dv) + at_once - 1) / at_once) * groups;
}

// What to ask for while all tiles work on a block of K or V; `rows` is row 0 of head 0.
template <class A, int NV>
inline void follow(const Problem& p, const View& view, const char* rows, const Tile<A, NV>& tile, int tiles,
                   const RowRange& block, const Keys& keys, Ahead& to) {
  to = {};
  if (keys.first >= keys.end && !tile.few) return;
  const bool scores = &view == &p.k;
  const int64_t columns = scores ? p.D : p.Dv, often = turns(p, tile, tiles, scores), size = itemsize(view.dtype);
  RowRange next{rows + (keys.head * view.h + keys.first * view.s) * size, keys.end - keys.first};
  if (keys.turns == 0) {
    to = tile.few ? ahead_few(view, columns, tile.rows, block, next) : ahead(view, next, {}, columns, often);
    return;
  }
  View run = view;  // of memory
  run.s = columns;
  next.first += keys.turn * next.n * columns * size;
  to = tile.few ? rows_ahead(run, next, {}, columns) : ahead(run, next, {}, columns, often);
}

// The rows of the bias that the tile after this one will read, where they are evenly apart.
template <class A, int NV>
inline Ahead follow_bias(const Problem& p, int64_t batch, const Tile<A, NV>* tile, int now, int tiles,
                         const Keys& keys) {
  const int next = now + 1 < tiles ? now + 1 : 0;
  const TileLanes& lanes = tile[next].lanes;
  const int64_t from = next == 0 ? keys.first + kBlockKeys<NV> : keys.first;
  const int64_t n = keys.end - from < kBlockKeys<NV> ? keys.end - from : kBlockKeys<NV>;
  if (!lanes.consecutive || lanes.living == 0 || n <= 0 || p.distances.n) return {};
  const int64_t at = lead_offset(p, p.bias, batch) + lanes.head[0] * p.bias.h + lanes.query[0] * p.bias.s;
  const char* const first = p.bias.data + (at + from * p.bias.d) * itemsize(p.bias.dtype);
  return ahead(p.bias, {first, lanes.living}, {}, n, turns(p, tile[now], 1, true) + turns(p, tile[now], 1, false));
}

struct Next {  // what will be read after a tile's products
  Keys keys{0, 0, 0};
  Ahead k;                  // what is left of them to ask for
  Ahead* beside = nullptr;  // rows of a bias
};

// What a walk does with the scores of a tile that sees some of a block: visit(tile, seen, j0, n, next, top). A
// reference to it, so that the walk is compiled once for all visits.
template <class A, int NV>
struct Visit {
  const void* self;
  void (*call)(const void*, Tile<A, NV>&, const Visible&, int64_t j0, int n, Next&, const Vec<A> (&top)[NV]);
  template <class F>
  Visit(const F& f)
      : self(&f),
        call([](const void* to, Tile<A, NV>& tile, const Visible& seen, int64_t j0, int n, Next& next,
                const Vec<A> (&top)[NV]) { (*static_cast<const F*>(to))(tile, seen, j0, n, next, top); }) {}
};

// Walks the blocks of keys. `after` are the keys that will be walked next, none if that is not known.
template <class A, int NV>
inline void for_blocks(const Problem& p, int64_t batch, const Sequence& seq, const Keys& keys, const Keys& after,
                       int tiles, Tile<A, NV>* tile, const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker,
                       Visit<A, NV> visit) {
  constexpr int kStep = kBlockKeys<NV>;
  const int64_t size = itemsize(p.k.dtype);
  const char* k_rows = p.k.data + (lead_offset(p, p.k, batch) + seq.k_row * p.k.s) * size;
  const char* k0 = k_rows + keys.head * p.k.h * size;
  Visible seen;
  BiasRows<A> bias;
  Next next;
  Ahead bias_ahead;
  for (int64_t j0 = keys.first; j0 < keys.end; j0 += kStep) {
    const int n = static_cast<int>(keys.end - j0 < kStep ? keys.end - j0 - (mutant(15) && j0 > 0) : kStep);
    Block<A> k{nullptr, 0};
    SplitBlock pieces;
    bool loaded = false;
    for (int i = 0; i < tiles; ++i) {
      if (!tile[i].used) continue;
      const TileLanes& lanes = tile[i].lanes;
      const bool rows = reads_bias_rows(p, lanes) &&
                        mask_cover(p.program, batch, {lanes.first, lanes.last, j0, j0 + n - 1}) != Cover::None;
      if (rows) load_bias<A, NV>(p, batch, lanes, j0, n, scratch.bias, bias);
      look<A>(p, batch, lanes, j0, n, rows && !bias.plain ? bias.row : nullptr, seen);
      if (seen.lo == seen.hi) continue;
      if (!loaded) {
        const char* const first = k0 + j0 * p.k.s * size;
        const Keys block{j0 + kStep, j0 + 2 * kStep < keys.end ? j0 + 2 * kStep : keys.end, keys.head};
        next.keys = if_seen(p, batch, block.first < block.end ? block : after, tiles, tile);
        follow(p, p.k, k_rows, tile[0], tiles, {first, n}, next.keys, next.k);
        if constexpr (Tile<A, NV>::kCanPair) {
          if (tile[0].pairs) load_keys(p.k, first, n, p.D, tiles, scratch.k, k);
        }
        if (p.score == Score::additive)
          load_additive_keys<A>(p.k, first, n, p.D, tile[0].few, scratch.k, {scratch.terms, p.D}, k);
        else if (!tile[0].pairs) k = load_block(p.k, first, n, p.D, tile[0].few ? tile[0].rows : 0, scratch.k);
        if constexpr (Tile<A, NV>::kCanSplit) {
          if (tile[0].split) split_keys(k, n, p.D, scratch.split_k, pieces);
        }
        loaded = true;
      }
      if (rows) bias_ahead = follow_bias(p, batch, tile, i, tiles, {j0, keys.end, keys.head});
      next.k.beside = next.beside = rows ? &bias_ahead : nullptr;
      Vec<A> top[NV];
      tile_scores<A, NV>(p, rule, batch, tile[i], j0, n, k, pieces, bias, scratch, seen, top, next.k);
      if (seen.lo == seen.hi) continue;
      visit.call(visit.self, tile[i], seen, j0, n, next, top);
    }
    if (j0 / kStep % 8 == 7) poll(p, worker);
    if (stopped(p)) return;
  }
}

// --- accumulate ----------------------------------------------------------------------------------------------

// For a tile that is done with this block: rows of out, each times its factor; `onto` what they hold. One text for
// tiles of any width, whose weights are rows as far apart.
template <class A>
inline void output_at_once(Rows<const A> weights, const A* factor, Rows<const A> v, int keys, int64_t Dv, int rows,
                           Rows<A> o, bool onto, Ahead& next) {
  constexpr int w = kLanes<A>;
  const auto columns = [&](auto C, int64_t d) __attribute__((always_inline)) {
    for_rows<kMaxRows>(rows, [&](auto R, int64_t row) __attribute__((always_inline)) {
      fetch_beside(next);
      finish_rows<R.value, C.value>(Rows{weights.data + row, weights.ld}, Rows{v.data + d, v.ld}, keys, factor + row,
                                    Rows{o.data + row * o.ld + d, o.ld}, onto, next);
    });
  };
  int64_t d = 0;
  for (; d + 2 * w <= Dv; d += 2 * w) columns(Constant<2>{}, d);
  if (d < Dv) columns(Constant<1>{}, d);
}

// closing: what else to ask for in the last blocks; nullptr for nothing.
template <class A, int NV>
inline void accumulate(const Problem& p, int64_t batch, const Sequence& seq, const Keys& keys, const Keys& after,
                       int tiles, Tile<A, NV>* tile, const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker,
                       Ahead* closing = nullptr) {
  constexpr int L = NV * kLanes<A>;
  const char* v_rows = p.v.data;
  const int64_t size = itemsize(p.dtype);
  if (v_rows) v_rows += (lead_offset(p, p.v, batch) + seq.k_row * p.v.s) * size;
  const auto v_row = [&](int64_t head, int64_t j) { return v_rows + (head * p.v.h + j * p.v.s) * size; };
  Block<A> v{nullptr, 0};
  PairValues pairs;
  SplitBlock pieces;
  Ahead v_ahead;
  uint32_t odd[kMaskWords];
  int64_t loaded = -1, packed = -1, checked = -1;  // the blocks in v, in scratch.packed and of odd
  const auto visit = [&](Tile<A, NV>& t, const Visible& seen, int64_t j0, int n, Next& next, const Vec<A>(&top)[NV]) {
    const Range vectors = vectors_of<A>(seen, t.key_lanes);
    if (t.weighed) void();
    else if (p.normalizer == Normalizer::softmax) softmax<A, NV>(vectors, rule.c, top, p.Dv, scratch.s, t);
    else apply_normalizer<A, NV>(p, rule.natural, rule.c, seen, t.m, nullptr, t.threshold, t.l, scratch.s);
    if (p.focus.centre.data) focus_weights<A, NV>(p, batch, t.lanes, seen, j0, scratch.s);
    if (p.dropout.threshold) drop_weights<A, NV>(p, batch, t.lanes, t.key_lanes, seen, j0, scratch.s);
    if (p.Dv == 0) return;
    if (loaded != j0) {
      const char* const first = v_row(keys.head, j0);
      follow(p, p.v, v_rows, t, tiles, {first, n}, next.keys, v_ahead);
      if constexpr (Tile<A, NV>::kCanPair) {
        if (t.pairs && NV == 1) find_value_rows(p.v, first, n, p.Dv, tiles, t.key_lanes, scratch.v, pairs, v_ahead);
        else if (t.pairs) load_values(p.v, first, n, p.Dv, scratch.v, pairs);
      }
      if (!t.pairs) v = load_block(p.v, first, n, p.Dv, t.few ? t.rows : 0, scratch.v);
      if constexpr (Tile<A, NV>::kCanSplit) {
        if (t.split) split_values(v, n, p.Dv, scratch.split_v, pieces);
      }
    }
    Ahead* const last = keys.end - j0 <= int64_t{kClosingBlocks} * kBlockKeys<NV> ? closing : nullptr;
    v_ahead.beside = next.beside ? next.beside : last;
    if (next.beside) next.beside->beside = last;
    loaded = j0;
    if constexpr (Tile<A, NV>::kCanPair) {
      if (t.pairs) {
        const auto* const first = reinterpret_cast<const uint16_t*>(v_row(keys.head, j0));
        const Output o{t.o, t.rows, t.o_row};
        if constexpr (kTileUnit && NV == 1) {
          pack_weight_tiles(seen, t.key_lanes, scratch.s);
          if (pairs.unseen) {
            if (output_unseen(pairs, seen, t.key_lanes, scratch.s, scratch.k, o, v_ahead)) return;
            load_value_rows(p.v, v_row(keys.head, j0), n, p.Dv, scratch.v, pairs, v_ahead);
            loaded = -1;
          }
        }
        const auto value = [&](int64_t j, int64_t d) { return bf16_to_float(first[j * p.v.s + d * p.v.d]); };
        if constexpr (kTileUnit && NV == 1) {
          add_odd_values<NV>(pairs.odd, seen, p.Dv, o, value,
                             [&](int j, int) { return load(scratch.s + j * t.key_lanes); });
        } else {
          if (!t.weighed) pack_weights<NV>(seen.lo, seen.hi, scratch.s);
          add_odd_values<NV>(pairs.odd, seen, p.Dv, o, value, [&](int j, int v) {
            const F pair = load(scratch.s + (j / 2 * NV + v) * kLanes<A>);
            return j % 2 == 0 ? low_half(pair) : high_half(pair);
          });
        }
        if (!pairs.any_plain) return;
        if constexpr (NV > 1) output_pairs<NV>(pairs.data, p.Dv, seen.lo, seen.hi, scratch.s, t.o, v_ahead);
        else if constexpr (kTileUnit)
          output_tiles<Look::Never>(pairs, seen, t.key_lanes, scratch.s, nullptr, o, v_ahead);
        else output_by_rows(pairs.row, p.Dv, seen.lo, seen.hi, scratch.s, o, v_ahead);
        return;
      }
    }
    if constexpr (Tile<A, NV>::kCanSplit) {
      if (t.split) {
        add_odd_values<NV>(
            pieces.odd, seen, p.Dv, {t.o, t.rows, t.o_row}, [&](int64_t j, int64_t d) { return v.data[j * v.ld + d]; },
            [&](int j, int v) { return load(scratch.s + j * L + v * kLanes<A>); });
        output_split<NV>(pieces.data, p.Dv, seen, scratch.s, scratch.split_p, t.o, v_ahead);
        return;
      }
    }
    if constexpr (Tile<A, NV>::kCanPair && NV == 1) {
      if (dots_values(p, t)) {
        const char* const first = v_row(keys.head, j0);
        const Output o{t.o, t.rows, t.o_row};
        const FewPairs state{scratch.s, t.key_lanes, scratch.few_pairs, scratch.few_sums};
        begin_few_pairs(seen, o, state);
        add_few_pairs(p.v, first, p.Dv, seen.lo, seen.hi, state, o, scratch.v, v_ahead);
        return end_few_pairs(p.v, first, n, p.Dv, seen, state, o, scratch.v);
      }
    }
    Block<A> values = v;
    bool onto = false;
    if (seen.partial && !mutant(2)) {
      if (!v.data) {  // few rows: the guard wants them all
        convert_rows(p.v, v.first, n, p.Dv, scratch.v);
        v = {scratch.v, v.ld};
      }
      if (checked != j0) find_odd_rows(v, n, p.Dv, odd);
      checked = j0;
      onto = t.at_once && any_odd(odd) && !mutant(88);
      if (onto) clear_output(p, t);
      values = guard_values<A, NV>(seen, v, odd, p.Dv, scratch.v, scratch.s, t);
      if (v.data == scratch.v && values.data == scratch.v) loaded = -1;  // rows were zeroed: convert again
    }
    if constexpr (NV == 1) {
      if (t.few) {
        output_few(values, scratch.s, t.key_lanes, t.rows, seen.lo, seen.hi, t.o, round_up(p.Dv, kLanes<A>), v_ahead);
        return;
      }
    }
    if (t.at_once) {
      A factor[L];
      for (int i = 0; i < NV; ++i) store(factor + i * kLanes<A>, inverse<A>(t.l[i]));
      return output_at_once<A>({scratch.s + seen.lo * L, L}, factor, {values.data + seen.lo * values.ld, values.ld},
                               seen.hi - seen.lo, p.Dv, t.rows, {t.o, t.o_row}, onto, v_ahead);
    }
    // Worth a copy where the rows collide in the cache, not for one that guard_values has just made, nor where a scalar
    // serves four vectors: then L2 can be read as often as that; nor at AVX2 for one tile (1.1 times as fast without).
    const bool once = kVectorBytes == 32 && tiles == 1;
    const bool as_is = NV > 2 || once || !collides(v) || values.data != v.data || loaded < 0;
    if (!as_is && packed != j0) pack_columns(v.data, v.ld, n, p.Dv, scratch.packed);
    if (!as_is) packed = j0;
    const int count = seen.hi - seen.lo;
    for_rows<kProductRows<NV>>(p.Dv, [&](auto R, int64_t d) __attribute__((always_inline)) {
      fetch_beside(v_ahead);
      const A* column = as_is ? values.data + seen.lo * values.ld + d : scratch.packed + packed_index<A>(d, seen.lo);
      output_rows<Layout::Transposed, R.value, NV>(column, as_is ? values.ld : kPitch<A>, scratch.s + seen.lo * L,
                                                   count, t.o + d * L, v_ahead);
    });
  };
  const bool plain = p.normalizer == Normalizer::softmax && p.score == Score::dot && !rule.modified &&
                     !p.focus.centre.data && !p.dropout.threshold;
  for (int i = 0; i < tiles; ++i) {
    tile[i].weighs = plain && !tile[i].few && !tile[i].split && !(kTileUnit && tile[i].pairs);
    tile[i].weighed = false;
  }
  for_blocks<A, NV>(p, batch, seq, keys, after, tiles, tile, rule, scratch, worker, visit);
  for (int i = 0; i < tiles; ++i) tile[i].weighs = false;
}

// Once the walk is over, not where it pauses: a sum must not depend on who took turns with it.
template <class A, int NV>
inline void join_sums(Tile<A, NV>& tile) {
  if constexpr (NV == 1) join_keys<A>(tile.key_lanes, tile.l[0]);
}

}  // namespace qkv::inline QKV_LEVEL
