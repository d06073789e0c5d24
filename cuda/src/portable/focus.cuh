// SPDX-License-Identifier: Apache-2.0
// The Gaussian around a centre of each row (local_p of Luong, Pham & Manning 2015), as in cpp/src/cpu/focus-inl.h: a
// mask, and a factor of the weights after their sum. With the centre cut into a whole number and a rest, j - centre
// keeps its digits wherever the centre lies.
#pragma once

#include "portable/scores.cuh"
#include "portable/visible.cuh"

namespace qkv::inline QKV_LEVEL {

struct FocusRange {  // in shared memory: keys outside are in the focus of no row
  int64_t first, last;
};

// All threads call it, after fill_lanes.
template <int R>
QKV_DEVICE void find_focus(const Problem& p, const Task& task, const Lanes<R>& lanes, FocusRange& range) {
  constexpr double kMost = 0x1p60;
  const int i = thread_index();
  if (i == 0) range = {INT64_MAX, INT64_MIN};
  sync_block();
  if (i < R && lanes.alive[i]) {
    const double centre = focus_centre(p, task.batch, lanes.head[i], lanes.query[i]);
    const double low = centre - p.focus.reach, high = centre + p.focus.reach;
    // A centre that is not a number sees all: the comparisons are true for it.
    atomic_min(&range.first, !(low > -kMost) ? INT64_MIN : static_cast<int64_t>(low < kMost ? low : kMost) - 1);
    atomic_max(&range.last, !(high < kMost) ? INT64_MAX : static_cast<int64_t>(high > -kMost ? high : -kMost) + 1);
  }
  sync_block();
}

// Takes what is out of focus out of what look() found, by the same threads.
template <int Keys, int Threads, int R>
QKV_DEVICE void look_at_focus(const Problem& p, const Task& task, const Lanes<R>& lanes, int64_t j0,
                              uint32_t (&bits)[R][mask_words(Keys)]) {
  QKV_ROLLED
  for (int i = thread_index(); i < R * mask_words(Keys); i += Threads) {
    const int row = i % R, word = i / R;
    if (!bits[row][word]) continue;
    const double centre = focus_centre(p, task.batch, lanes.head[row], lanes.query[row]);
    bits[row][word] &= focus_bits(p.focus.reach, centre, j0 + word * 32);
  }
}

template <class A>
struct FocusTerms {
  A c, from, rest;  // key j0 + t lies from + t - rest from the centre
};

template <class A, int R>
QKV_DEVICE FocusTerms<A> focus_terms(const Problem& p, const Task& task, const Lanes<R>& lanes, int row, int64_t j0) {
  const double centre = focus_centre(p, task.batch, lanes.head[row], lanes.query[row]), nearest = floor(centre + 0.5);
  return {static_cast<A>(-2 * kLog2e / (p.focus.reach * p.focus.reach)),
          static_cast<A>(static_cast<double>(j0) - nearest), static_cast<A>(centre - nearest)};
}

template <class A>
QKV_DEVICE A focus_factor(const FocusTerms<A>& terms, int t) {
  const A x = terms.from + static_cast<A>(t) - terms.rest;
  return power_of_two(x * x * terms.c);
}

}  // namespace qkv::inline QKV_LEVEL
