// SPDX-License-Identifier: Apache-2.0
// The Gaussian around a centre of each row (local_p of Luong, Pham & Manning 2015): a factor of the weights, after the
// normalizer and its sums. With the centre cut into a whole number and a rest, j - centre keeps its digits wherever the
// centre lies.
#pragma once

#include <math.h>

#include "cpu/math-inl.h"
#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class A, int NV>
inline void focus_weights(const Problem& p, int64_t batch, const TileLanes& lanes, const Visible& seen, int64_t j0,
                          A* s) {
  constexpr int w = kLanes<A>, L = NV * w;
  const Vec<A> c = splat(static_cast<A>(-2 * 1.44269504088896340736 / (p.focus.reach * p.focus.reach)));
  A whole[L] = {}, rest[L] = {};
  for (int i = 0; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    const double centre = focus_centre(p, batch, lanes.head[i], lanes.query[i]), nearest = ::floor(centre + 0.5);
    whole[i] = static_cast<A>(static_cast<double>(j0) - nearest);
    rest[i] = static_cast<A>(centre - nearest);
  }
  for (int v = 0; v < NV; ++v) {
    const Vec<A> from = load(whole + v * w), part = load(rest + v * w);
    for (int j = seen.lo; j < seen.hi; ++j) {
      A* const at = s + (j * NV + v) * w;
      const Vec<A> x = from + splat(static_cast<A>(j)) - part, weight = load(at);
      store(at, weight == Vec<A>{} ? weight : weight * exp2(mutant(64) ? x * c : x * x * c));
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
