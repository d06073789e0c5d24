// SPDX-License-Identifier: Apache-2.0
// The first walk of a normalizer that needs one: the maximum of each row and, for sparsemax and entmax15, the
// threshold. The second walk computes the same scores again, bit for bit, so that no array of scores need be kept.
//
// Memory     sparsemax and entmax15 keep, for one tile at a time, the keys that could be above the threshold of one of
//            its rows: z > -1 against the maximum so far. At most Sk rows of L lanes per worker (16 MiB for 131072 keys
//            and 32 lanes of float); pages that are never written to are never there.
// Cost       Q K^T twice, and some passes over the keys that were kept: 1.5 to 3 times a softmax.
#pragma once

#include "cpu/walk-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class A, int NV>
inline void find_threshold(const Problem& p, int64_t batch, const Sequence& seq, const Keys& keys, Tile<A, NV>& tile,
                           const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker) {
  constexpr int w = kLanes<A>, L = NV * w;
  const bool keeps = has_threshold(p.normalizer);
  const Vec<A> h = splat(z_scale<A>(p.normalizer, rule.natural)), least = splat(A{-1});
  Vec<A> m[NV];
  IntVec<A> odd[NV] = {};         // saw a NaN or +inf
  for (int v = 0; v < NV; ++v) {  // lanes without a row: nothing reaches their maximum
    for (int i = 0; i < w; ++i) {
      const int lane = v * w + i;
      m[v][i] = lane < tile.lanes.live && tile.lanes.alive[lane] ? -kInf<A> : kInf<A>;
    }
  }
  int64_t kept = 0;
  const auto keep = [&](int64_t row, const Vec<A>(&x)[NV]) __attribute__((always_inline)) {
    IntVec<A> needed{};
    for (int v = 0; v < NV; ++v) needed |= (x[v] - m[v]) * h > least;
    if (any(needed)) {
      for (int v = 0; v < NV; ++v) store(scratch.kept + row * L + v * w, x[v]);
    }
    return any(needed);
  };
  const auto visit = [&](Tile<A, NV>&, const Visible& seen, int64_t, int, const Next&, const Vec<A>(&)[NV]) {
    for (int j = seen.lo; j < seen.hi; ++j) {
      for (int v = 0; v < NV; ++v) {
        const Vec<A> x = load(scratch.s + (j * NV + v) * w);
        odd[v] |= mutant(47) ? IntVec<A>{} : ~(x < splat(kInf<A>));
        m[v] = maximum(m[v], x);
      }
    }
    for (int j = seen.lo; keeps && j < seen.hi; ++j) {
      Vec<A> x[NV];
      for (int v = 0; v < NV; ++v) x[v] = load(scratch.s + (j * NV + v) * w);
      kept += keep(kept, x);
    }
  };
  for_blocks<A, NV>(p, batch, seq, keys, {}, 1, &tile, rule, scratch, worker, visit);

  bool searched[L];
  for (int i = 0; i < L; ++i) {
    const A top = m[i / w][i % w];
    const bool bad = odd[i / w][i % w] != 0;
    searched[i] = !bad && top - top == 0;
    tile.l[i / w][i % w] = bad ? static_cast<A>(NAN) : (top == -kInf<A> ? A{0} : A{1});
  }
  for (int v = 0; v < NV; ++v) tile.m[v] = m[v];
  if (!keeps) return;
  const int64_t rows = kept;
  kept = 0;
  for (int64_t row = 0; row < rows; ++row) {  // again, now that the maximum is known
    Vec<A> x[NV];
    for (int v = 0; v < NV; ++v) x[v] = load(scratch.kept + row * L + v * w);
    if (!keep(kept, x)) continue;
    for (int v = 0; v < NV; ++v) store(scratch.kept + kept * L + v * w, x[v] - m[v]);
    ++kept;
  }
  threshold<A, NV>(p.normalizer, scratch.kept, kept, h[0], searched, tile.threshold);
}

// Before a walk that applies the normalizer; `walk` 0 is the one that meets V.
template <class A, int NV>
inline void prepare_walk(const Problem& p, int64_t batch, const Sequence& seq, const Keys& keys, int walk, int tiles,
                         Tile<A, NV>* tile, const ScoreRule<A>& rule, const Scratch<A>& scratch, int worker) {
  for (int i = 0; two_walks(p.normalizer) && i < tiles; ++i) {
    if (!tile[i].used) continue;
    if (walk == 0) find_threshold<A, NV>(p, batch, seq, keys, tile[i], rule, scratch, worker);
    for (int v = 0; v < NV && p.normalizer == Normalizer::hardmax; ++v) tile[i].threshold.rest[v] = splat(A{1});
  }
}

}  // namespace qkv::inline QKV_LEVEL
