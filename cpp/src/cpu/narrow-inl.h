// SPDX-License-Identifier: Apache-2.0
// Score tiles with several keys a vector: few rows, whose keys have as many lanes as there are rows (key_lanes). Lane t
// of the tile is row t % lanes and key t / lanes. A row's maximum is the same in all of its lanes; its sum is spread
// over them until the walk over the keys is over.
#pragma once

#include "cpu/shuffle-inl.h"
#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

// The vectors of a score tile with keys lo ... hi - 1, of so many lanes each.
template <class A>
inline Range vectors_of(const Visible& seen, int lanes) {
  constexpr int w = kLanes<A>;
  return {seen.lo * lanes / w, (seen.hi * lanes + w - 1) / w};
}

// What join makes of each row's lanes, in all of them.
template <class A, int N = kLanes<A> / 2, class Join>
QKV_INLINE Vec<A> join_rows(int lanes, Vec<A> x, const Join& join) {
  x = join(exchange_lanes<A, N, false>(x, x), exchange_lanes<A, N, true>(x, x));
  if constexpr (N > 1) {
    if (lanes < N) return join_rows<A, N / 2>(lanes, x, join);
  }
  return x;
}

// What the keys of a vector sum to, in its first lanes; the others become 0.
template <class A>
inline void join_keys(int lanes, Vec<A>& sum) {
  constexpr int w = kLanes<A>;
  if (lanes == w || mutant(85)) return;
  IntVec<A> first;
  for (int i = 0; i < w; ++i) first[i] = i < lanes ? -1 : 0;
  const Vec<A> x = join_rows<A>(lanes, sum, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return a + b; });
  sum = first != 0 ? x : Vec<A>{};
}

// -inf for keys that are not seen; top of each row, in all its lanes.
template <class A>
inline void mask_narrow(const Visible& seen, int lanes, A* s, Vec<A>& top) {
  constexpr int w = kLanes<A>;
  const int keys = w / lanes;
  IntVec<A> lane;
  for (int i = 0; i < w; ++i) lane[i] = 1 << i;
  const Range range = vectors_of<A>(seen, lanes);
  top = splat(-kInf<A>);
  for (int i = range.lo; i < range.hi; ++i) {
    const bool whole = !seen.partial && i * keys >= seen.lo && (i + 1) * keys <= seen.hi;
    Vec<A> x = load(s + i * w);
    if (!whole) {
      uint32_t bits = 0;
      for (int t = 0, j = i * keys; t < keys; ++t, ++j) {
        if (j >= seen.lo && j < seen.hi)
          bits |= ((seen.partial ? seen.bits[j] : ~0u) & ((1u << lanes) - 1)) << t * lanes;
      }
      const IntVec<A> sees = static_cast<typename Lane<A>::Int>(bits) - IntVec<A>{};
      x = (sees & lane) != IntVec<A>{} ? x : splat(mutant(14) ? A{-10000} : -kInf<A>);
      store(s + i * w, x);
    }
    top = maximum(top, x);
  }
  top = join_rows<A>(lanes, top, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return maximum(a, b); });
}

}  // namespace qkv::inline QKV_LEVEL
