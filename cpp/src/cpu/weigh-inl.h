// SPDX-License-Identifier: Apache-2.0
// Scores that become weights as they leave the product.
//
// Most blocks raise no row's maximum enough to move it (kLazyLog2): the one of the blocks before will do, and a score
// need not pass through memory to become a weight. The weights, their sum and so all bits are those of softmax
// (forward-inl.h), which takes over where some maximum moves. A twentieth of the time of bfloat16 at D = 64.
#pragma once

#include "cpu/forward-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class X>
constexpr bool kPacks = false;
template <>
constexpr bool kPacks<Pair> = true;

// Keys 0 ... R - 1 from k on: their weights, in pairs where K is, and what they sum to. False where some lane's
// maximum would have to move.
template <int R, int NV, class X>
QKV_INLINE bool weigh_rows(const X* k, int64_t ldk, const float* q, int64_t D, const F (&m)[NV], F factor, float* s,
                           F (&part)[NV], Ahead& next) {
  constexpr int w = kLanes<float>;
  Accumulators<float, R, NV> x;
  clear<R, NV, float>(x);
  multiply<Layout::RowMajor, R, NV, float>(k, ldk, Packed<float, NV>{q}, D, x, next);
  F top[NV];
  unroll<NV>([&](auto v) __attribute__((always_inline)) { top[v] = splat(-kInf<float>); });
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      x[r][v] = (x[r][v] - m[v]) * factor;
      top[v] = maximum(top[v], x[r][v]);
    });
  });
  IntVec<float> rises{};
  unroll<NV>([&](auto v) __attribute__((always_inline)) { rises |= top[v] > splat(float{kLazyLog2}); });
  if (any(rises)) return false;
  unroll<NV>([&](auto v) __attribute__((always_inline)) {
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      x[r][v] = exp2(x[r][v]);
      part[v] += x[r][v];
      if constexpr (!kPacks<X>) {
        store(s + (r * NV + v) * w, x[r][v]);
      } else if constexpr (r % 2 == 1) {
        store(s + (r / 2 * NV + v) * w, round_pair(x[r - 1][v], x[r][v]));
      }
    });
  });
  return true;
}

// All keys of a whole block; false, and the tile as it was, where a maximum moves.
template <int NV, class X>
inline bool weigh_block(const X* k, int64_t ldk, int64_t D, float c, float* s, Tile<float, NV>& tile, Ahead& next) {
  constexpr int R = kProductRows<NV>, kEach = NV * kLanes<float> * (kPacks<X> ? R / 2 : R);
  static_assert(kBlockKeys<NV> % R == 0 && kSumKeys % R == 0 && (R % 2 == 0 || !kPacks<X>));
  F m[NV], sum[NV], part[NV];
  for (int v = 0; v < NV; ++v) {
    if (any(tile.m[v] == splat(-kInf<float>))) return false;
    m[v] = tile.m[v];
    sum[v] = part[v] = F{};
  }
  for (int j = 0; j < kBlockKeys<NV>; j += R, s += kEach) {
    fetch_beside(next);
    if (!weigh_rows<R, NV>(k + j * ldk, ldk, tile.q, D, m, splat(c), s, part, next)) return false;
    if ((j + R) % kSumKeys > 0) continue;
    for (int v = 0; v < NV; ++v) {
      sum[v] += part[v];
      part[v] = F{};
    }
  }
  for (int v = 0; v < NV; ++v) tile.l[v] += sum[v];
  return true;
}

}  // namespace qkv::inline QKV_LEVEL
