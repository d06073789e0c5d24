// SPDX-License-Identifier: Apache-2.0
// Sums that pairs of bfloat16 have lost.
//
// A dot takes products below 2^-126 for 0. There may be as many as keys, so an element of O, relative to the largest
// weight, lacks up to Sk 2^-126: of one that is not below 2^-85 no more than 2^-24, for 2^17 keys. When all keys are
// done, smaller ones are looked for, and replaced by those of a tile of the same rows that multiplies in float; but for
// columns that are 0 in all of V. So an element depends on what its row sees, and on nothing else.
#pragma once

#include "cpu/walk-inl.h"

namespace qkv::inline QKV_LEVEL {

// Which lanes belong to rows that see something.
template <class A, int NV>
inline void find_living(const Tile<A, NV>& tile, IntVec<A> (&living)[NV]) {
  constexpr int w = kLanes<A>;
  for (int v = 0; v < NV; ++v) {
    for (int i = 0; i < w; ++i) {
      const int lane = v * w + i;
      living[v][i] = lane < tile.lanes.live && tile.lanes.alive[lane] && tile.l[v][i] != 0 ? -1 : 0;
    }
  }
}

// small[d] is not 0 where column d of O has an element of a living row below kSmallSum; are there any?
template <int NV>
inline bool find_small(const Problem& p, const Tile<float, NV>& tile, const IntVec<float> (&living)[NV], float* small) {
  constexpr int w = kLanes<float>;
  IntVec<float> all{};
  if (tile.by_rows) {
    for (int64_t d = 0; d < p.Dv; d += w) {
      IntVec<float> column{};
      for (int r = 0; r < tile.rows; ++r) {
        const IntVec<float> is_small = sizes_of_sums(load(tile.o + r * tile.o_row + d)) < kSmallSum;
        if (living[0][r]) column |= is_small;
      }
      for (int64_t i = p.Dv - d; i < w; ++i) column[i] = 0;
      store(small + d, (F)column);
      all |= column;
    }
    return any(all);
  }
  for (int64_t d = 0; d < p.Dv; ++d) {
    IntVec<float> column{};
    for (int v = 0; v < NV; ++v) column |= (sizes_of_sums(load(tile.o + (d * NV + v) * w)) < kSmallSum) & living[v];
    all |= column;
    reinterpret_cast<int32_t*>(small)[d] = any(column);
  }
  return any(all);
}

// Has V anything but 0 in these columns? `first` is its row of the first of n keys.
inline bool holds_values(const Problem& p, const char* first, int64_t n, const float* small) {
  const auto* const x = reinterpret_cast<const uint16_t*>(first);
  const auto* const wanted = reinterpret_cast<const int32_t*>(small);
  for (int64_t d = 0; d < p.Dv; d += kManyHalves) {
    const int64_t left = p.Dv - d < kManyHalves ? p.Dv - d : kManyHalves;
    bool look = false;
    for (int64_t i = 0; i < left; ++i) look = look || wanted[d + i];
    if (!look) continue;
    Halves held{};
    for (int64_t j = 0; j < n; ++j) held |= load_halves(x + j * p.v.s + d * p.v.d, p.v.d, left) & 0x7fff;
    for (int64_t i = 0; i < left; ++i) {
      if (wanted[d + i] && held[i] != 0) return true;
    }
  }
  return false;
}

// After these keys, all that the tile sees.
template <class A, int NV>
inline void recover_small_sums(const Problem& p, int64_t batch, const Sequence& seq, const Keys& keys,
                               const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker, Tile<A, NV>& tile) {
  if constexpr (Tile<A, NV>::kCanPair) {
    constexpr int w = kLanes<A>, L = NV * w;
    const bool ones = p.normalizer == Normalizer::hardmax;  // no weight is small
    if (!tile.pairs || !tile.used || ones || p.Dv == 0 || keys.first >= keys.end) return;
    IntVec<A> living[NV];
    find_living(tile, living);
    if (!find_small(p, tile, living, scratch.packed) || mutant(87)) return;
    const int64_t at = lead_offset(p, p.v, batch) + (seq.k_row + keys.first) * p.v.s + keys.head * p.v.h;
    if (!holds_values(p, p.v.data + at * itemsize(p.v.dtype), keys.end - keys.first, scratch.packed)) return;

    Tile<A, NV> exact = tile;
    exact.pairs = exact.by_rows = false;
    exact.key_lanes = w;
    exact.q = scratch.exact_q;
    exact.o = scratch.exact_o;
    exact.o_row = 1;
    exact.o_column = L;
    load_queries<A, NV>(p, batch, seq, rule, scratch, exact);
    const bool sums = p.normalizer == Normalizer::softmax;  // else m and the thresholds are known
    for (int v = 0; v < NV && !sums; ++v) exact.m[v] = tile.m[v];
    accumulate<A, NV>(p, batch, seq, keys, {}, 1, &exact, rule, scratch, worker);
    join_sums(exact);
    A factor[L];  // O is relative to m, and so is l
    for (int v = 0; v < NV; ++v) {
      const Vec<A> one = splat(static_cast<A>(1));
      store(factor + v * w, sums ? tile.l[v] / exact.l[v] : one);
    }
    for (int r = 0; r < tile.lanes.live; ++r) {
      if (!living[r / w][r % w]) continue;
      for (int64_t d = 0; d < p.Dv; ++d) {
        A& x = tile.o[r * tile.o_row + d * tile.o_column];
        if (sizes_of_sums(splat(x))[0] < kSmallSum) x = exact.o[d * L + r] * factor[r];
      }
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
