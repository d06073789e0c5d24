// SPDX-License-Identifier: Apache-2.0
// Loops that the language unrolls.
#pragma once

#include "qkv/dtype.h"

namespace qkv::inline QKV_LEVEL {

// f(0), f(1), ..., f(N - 1), unrolled by the language rather than by a hint.
template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};
template <int N, int I = 0, class Fn>
QKV_INLINE void unroll(const Fn& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    unroll<N, I + 1>(f);
  }
}

}  // namespace qkv::inline QKV_LEVEL
