// SPDX-License-Identifier: Apache-2.0
// Not seen, no influence: 0 times NaN is NaN, so values that are not finite must not meet the weights of lanes that may
// not see them.
#pragma once

#include "cpu/few-operands-inl.h"
#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class A, int NV>
struct Tile;

// Are all of n elements finite? x - x is +0 for finite x alone.
template <class A>
inline bool finite_row(const A* x, int64_t n) {
  constexpr int w = kLanes<A>;
  IntVec<A> odd{};
  int64_t i = 0;
  for (; i + w <= n; i += w) odd |= (IntVec<A>)(load(x + i) - load(x + i));
  bool tail_odd = false;
  for (; i < n; ++i) tail_odd |= x[i] - x[i] != 0;
  return !tail_odd && !any((IntVec<A>)(odd != 0));
}

// Bit j: row j of a block holds something that is not.
template <class A>
inline void find_odd_rows(const Block<A>& v, int n, int64_t Dv, uint32_t (&odd)[kMaskWords]) {
  for (uint32_t& word : odd) word = 0;
  for (int j = 0; j < n; ++j) odd[j / 32] |= static_cast<uint32_t>(!finite_row(v.data + j * v.ld, Dv)) << j % 32;
}

// 0 times NaN is NaN: what is not finite is added for the lanes that see it, and goes through the micro-kernel as 0.
template <class A, int NV>
inline Block<A> guard_values(const Visible& seen, Block<A> v, const uint32_t (&odd)[kMaskWords], int64_t Dv, A* copy,
                             const A* p, const Tile<A, NV>& tile) {
  const int L = NV * tile.key_lanes;
  bool copied = false;
  for (int j = seen.lo; j < seen.hi; ++j) {
    if (!(odd[j / 32] >> j % 32 & 1)) continue;
    if (!copied && v.data != copy) {
      const int64_t ld = round_up(Dv, kLanes<A>);
      for (int i = seen.lo; i < seen.hi; ++i) {
        for (int64_t d = 0; d < Dv; ++d) copy[i * ld + d] = v.data[i * v.ld + d];
        for (int64_t d = Dv; d < ld; ++d) copy[i * ld + d] = 0;
      }
      v = {copy, ld, {}};
    }
    copied = true;
    A* row = copy + j * v.ld;
    for (int64_t d = 0; d < Dv; ++d) {
      if (row[d] - row[d] == 0) continue;
      for (int i = 0; i < (tile.few ? tile.rows : tile.lanes.live); ++i) {
        if (seen.bits[j] >> i & 1) tile.o[i * tile.o_row + d * tile.o_column] += p[j * L + i] * row[d];
      }
      row[d] = 0;
    }
  }
  return v;
}

}  // namespace qkv::inline QKV_LEVEL
