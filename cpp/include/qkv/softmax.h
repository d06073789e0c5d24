// SPDX-License-Identifier: Apache-2.0
// Online softmax as a type.
//
// A set of keys seen so far is summarised by m = max s and l = sum exp(s - m); the sum of two sets is
//     m = max(m1, m2),   l = l1 exp(m1 - m) + l2 exp(m2 - m)
// which is associative and commutative, with (-inf, 0) as its neutral element: tiles, split keys and cached
// prefixes all merge this way. Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135).
#pragma once

#include <math.h>

#include "qkv/platform.h"

namespace qkv::inline QKV_LEVEL {

struct Rescale {  // factors for whatever was accumulated beside the two states
  double self, other;
};

struct SoftmaxState {
  double m = -HUGE_VAL;  // max of the scores, natural units
  double l = 0;          // sum of exp(s - m)

  QKV_HD QKV_INLINE Rescale merge(const SoftmaxState& o) {
    const double top = o.m > m || o.m != o.m ? o.m : m;  // a NaN wins, and stays
    if (top == -HUGE_VAL) return {1, 1};                 // both empty: exp(-inf + inf) is not a number
    const Rescale r{exp(m - top), exp(o.m - top)};
    m = top;
    l = l * r.self + o.l * (mutant(9) ? 1 : r.other);
    return r;
  }
  QKV_HD QKV_INLINE double lse() const { return l == 0 ? -HUGE_VAL : m + log(l); }
};

}  // namespace qkv::inline QKV_LEVEL
