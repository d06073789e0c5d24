// SPDX-License-Identifier: Apache-2.0
// Dropout of a tile of weights, between the sums that lse needs and the product with V. One Philox call per lane gives
// the words of four keys; the loops over lanes are plain, for the compiler to vectorise.
#pragma once

#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class A, int NV>
inline void drop_weights(const Problem& p, int64_t batch, const TileLanes& lanes, int key_lanes, const Visible& seen,
                         int64_t j0, A* s) {
  constexpr int L = NV * kLanes<A>;
  const int step = NV * key_lanes;
  const auto seed_low = static_cast<uint32_t>(p.dropout.seed), seed_high = static_cast<uint32_t>(p.dropout.seed >> 32);
  const auto b = static_cast<uint32_t>(batch);
  const uint32_t threshold = p.dropout.threshold;
  const A scale = static_cast<A>(mutant(45) ? 1 : p.dropout.scale);
  uint32_t query[L] = {}, head[L] = {}, word[4][L];
  for (int i = 0; i < lanes.live; ++i) {
    query[i] = static_cast<uint32_t>(lanes.query[i]);
    head[i] = static_cast<uint32_t>(mutant(46) ? 0 : lanes.head[i]);
  }
  for (int first = seen.lo & ~3; first < seen.hi; first += 4) {  // blocks start at multiples of 4
    const auto group = static_cast<uint32_t>((j0 + first) >> 2);
    for (int i = 0; i < L; ++i) {
      const Philox words = philox(group, query[i], head[i], b, seed_low, seed_high);
      for (int t = 0; t < 4; ++t) word[t][i] = words.word[t];
    }
    for (int t = 0; t < 4; ++t) {
      if (first + t < seen.lo || first + t >= seen.hi) continue;
      A* row = s + (first + t) * step;
      for (int i = 0; i < step; ++i) row[i] = word[t][i] < threshold ? A{0} : row[i] * scale;
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
