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
template <int...>
struct Ints {};
template <int N, int... T>
struct UpTo : UpTo<N - 1, N - 1, T...> {};
template <int... T>
struct UpTo<0, T...> {
  using All = Ints<T...>;
};
template <class Fn, int... I>
QKV_INLINE void unroll(const Fn& f, Ints<I...>) {
  (f(Constant<I>{}), ...);
}
template <int N, class Fn>
QKV_INLINE void unroll(const Fn& f) {
  unroll(f, typename UpTo<N>::All{});
}

}  // namespace qkv::inline QKV_LEVEL
