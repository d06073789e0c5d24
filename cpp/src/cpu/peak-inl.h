// SPDX-License-Identifier: Apache-2.0
// The two limits every figure is a ratio of, measured on the machine at hand with this level's instructions.
#pragma once

#include "cpu/tile-unit-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class A>
inline double fma_steps(int64_t steps) {
  constexpr int kChains = kVectorRegisters == 32 ? 24 : 12;  // enough to hide the latency of every fma unit
  Vec<A> x[kChains], factor = splat(static_cast<A>(0.5));
  unroll<kChains>([&](auto i) __attribute__((always_inline)) { x[i] = splat(static_cast<A>(i.value)); });
  asm volatile("" : "+m"(factor));  // not a constant, or the loop would be folded
  for (int64_t s = 0; s < steps; ++s) {
    unroll<kChains>([&](auto i) __attribute__((always_inline)) { x[i] = fma(x[i], factor, factor); });
  }
  Vec<A> sum{};
  unroll<kChains>([&](auto i) __attribute__((always_inline)) { sum += x[i]; });
  asm volatile("" : : "m"(sum));
  return 2.0 * kChains * kLanes<A> * static_cast<double>(steps);
}

// The limit of bfloat16 products: the tile unit's, or the dot instruction's.
inline double pair_steps(int64_t steps) {
  if constexpr (kTileUnit) {
    const TileUnit unit(true);
    unroll<8>([&](auto i) __attribute__((always_inline)) { tile_zero<i.value>(); });
    for (int64_t s = 0; s < steps; ++s) {
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(steps);
  }
  constexpr int kChains = 24;
  F x[kChains], factor{};
  asm volatile("" : "+m"(factor));
  unroll<kChains>([&](auto i) __attribute__((always_inline)) { x[i] = F{}; });
  for (int64_t s = 0; s < steps; ++s) {
    unroll<kChains>([&](auto i) __attribute__((always_inline)) { x[i] = dot_into(factor, factor, x[i]); });
  }
  F sum{};
  unroll<kChains>([&](auto i) __attribute__((always_inline)) { sum += x[i]; });
  asm volatile("" : : "m"(sum));
  return 4.0 * kChains * kLanes<float> * static_cast<double>(steps);
}

inline double fma_loop(DType t, int64_t steps, bool dots) {
  if constexpr (kPairs) {
    if (dots && t == DType::bf16) return pair_steps(steps);
  }
  return t == DType::f64 ? fma_steps<double>(steps) : fma_steps<float>(steps);
}

inline double read_loop(const char* data, int64_t bytes) {
  constexpr int64_t kStep = 8 * kVectorBytes;
  IntVec<double> x[8] = {};
  for (int64_t at = 0; at + kStep <= bytes; at += kStep) {
    unroll<8>([&](auto i) __attribute__((always_inline)) {
      IntVec<double> v;
      __builtin_memcpy(&v, data + at + i * kVectorBytes, sizeof(v));
      x[i] ^= v;
    });
  }
  for (int i = 1; i < 8; ++i) x[0] ^= x[i];
  return static_cast<double>(x[0][0]);
}

}  // namespace qkv::inline QKV_LEVEL
