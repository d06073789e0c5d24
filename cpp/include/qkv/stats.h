// SPDX-License-Identifier: Apache-2.0
// What attention_stats keeps of a row, its weights taken in turn: keys rise, and of equal weights the first counts.
#pragma once

#include <math.h>

#include "qkv/problem.h"

namespace qkv::inline QKV_LEVEL {

QKV_HD inline bool has_stats(const Problem& p) {
  const StatsOut& s = p.stats;
  return s.entropy || s.max || s.argmax || s.received || s.distance || s.top_p;
}

template <class A>
struct RowStats {
  double entropy = 0, distance = 0;
  A most = 0;
  int64_t argmax = -1;

  // Of a row at `position`: its weight w of key j, which it sees.
  QKV_HD QKV_INLINE void add(const StatsOut& asked, int64_t position, int64_t j, A w) {
    if (asked.entropy && w != 0) entropy -= static_cast<double>(w) * log(static_cast<double>(w));
    if (asked.distance) {
      const int64_t d = position - j;
      distance += static_cast<double>(w) * static_cast<double>(d < 0 ? -d : d);
    }
    if (asked.argmax && (argmax < 0 || w > most)) {
      argmax = j;
      most = w;
    }
  }
};

// Keeps the k_top largest weights of row `at`, falling; on ties the lower key comes first.
template <class A>
QKV_HD QKV_INLINE void insert_top(const StatsOut& out, int64_t at, int64_t j, A w) {
  A* const top_p = static_cast<A*>(out.top_p) + at * out.k_top;
  int64_t *const top_j = out.top_j + at * out.k_top, k = out.k_top, place = k;
  while (place > 0 && (top_j[place - 1] < 0 || w > top_p[place - 1] || (mutant(21) && w == top_p[place - 1]))) --place;
  if (place == k) return;
  for (int64_t i = k - 1; i > place; --i) {
    top_p[i] = top_p[i - 1];
    top_j[i] = top_j[i - 1];
  }
  top_p[place] = w;
  top_j[place] = j;
}

}  // namespace qkv::inline QKV_LEVEL
