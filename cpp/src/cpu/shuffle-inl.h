// SPDX-License-Identifier: Apache-2.0
// Shuffles of two vectors, by the lane that each lane of the result comes from, and the square transposes made of them.
#pragma once

#include "cpu/simd.h"

namespace qkv::inline QKV_LEVEL {

// --- shuffles ------------------------------------------------------------------------------------------------
// Lane t is lane Order::at(t) of a and b, one after the other.
template <class Order, class A, int... T>
QKV_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b, Ints<T...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Order::at(T)...);
#else
  return __builtin_shuffle(a, b, IntVec<A>{Order::at(T)...});
#endif
}
template <class A, template <int, int, bool> class Order, int S, bool kHigh>
QKV_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b) {
  return shuffle<Order<kLanes<A>, S, kHigh>, A>(a, b, typename UpTo<kLanes<A>>::All{});
}

// Runs 0, 2, 4, ... of S elements of two vectors, or 1, 3, 5, ...; and the way back, S elements from each in turn, to
// the first of them or the second.
template <int N, int S, bool kOdd>
struct EveryOther {
  static constexpr int at(int t) { return (t / S * 2 + kOdd) * S + t % S; }
};
template <int N, int S, bool kSecond>
struct InTurn {
  static constexpr int at(int t) { return t / S % 2 * N + t / (2 * S) * S + t % S + (kSecond ? N / 2 : 0); }
};
template <class A, bool kOdd, int S = 1>
QKV_INLINE Vec<A> every_other(Vec<A> a, Vec<A> b) {
  return shuffle<A, EveryOther, S, kOdd>(a, b);
}
template <class A, bool kSecond, int S = 1>
QKV_INLINE Vec<A> in_turn(Vec<A> even, Vec<A> odd) {
  return shuffle<A, InTurn, S, kSecond>(even, odd);
}

// --- square transposes ---------------------------------------------------------------------------------------
// Stage s exchanges the off-diagonal s x s blocks of every 2s x 2s block; log2(lanes) stages transpose.
template <int N, int S, bool kHigh>
struct Exchange {
  static constexpr int at(int t) { return kHigh ? (t & S ? N + t : t + S) : (t & S ? N + t - S : t); }
};
template <class A, int S, bool kHigh>
QKV_INLINE Vec<A> exchange_lanes(Vec<A> a, Vec<A> b) {
  return shuffle<A, Exchange, S, kHigh>(a, b);
}
template <class A, int S>
QKV_INLINE void exchange_both(Vec<A>& a, Vec<A>& b) {
  const Vec<A> x = a;
  a = exchange_lanes<A, S, false>(x, b);
  b = exchange_lanes<A, S, true>(x, b);
}
template <class A, int S = 1, int kEnd = kLanes<A>, int kVectors = kLanes<A>>
QKV_INLINE void transpose(Vec<A> (&x)[kLanes<A>]) {
  if constexpr (S < kEnd) {
    unroll<kVectors>([&](auto i) __attribute__((always_inline)) {
      if constexpr ((i.value & S) == 0) exchange_both<A, S>(x[i], x[i + S]);
    });
    transpose<A, S * 2, kEnd, kVectors>(x);
  }
}

// Vectors of R rows each of the same keys become vectors of all rows, key by key: P keys, or those at even places
// first.
template <class A, int R, int S = 1, int P>
QKV_INLINE void join_rows(Vec<A> (&x)[P]) {
  if constexpr (S < P) {
    unroll<P>([&](auto i) __attribute__((always_inline)) {
      if constexpr ((i.value & S) == 0) exchange_both<A, R * S>(x[i], x[i + S]);
    });
    join_rows<A, R, 2 * S>(x);
  }
}

// Vectors x[0 ... R - 1] of kLanes / R keys each, one after the other, R rows of a key: x[r] becomes row r of all of
// them. The last stage brings the keys into their order.
template <int N, int S, bool kHigh>
struct LastExchange {
  static constexpr int kKeys = N / (2 * S);
  static constexpr int at(int t) { return Exchange<N, S, kHigh>::at(t % kKeys * (2 * S) + t / kKeys); }
};
template <int R, class A>
QKV_INLINE void keys_to_rows(Vec<A> (&x)[kLanes<A>]) {
  transpose<A, 1, R / 2, R>(x);
  unroll<R / 2>([&](auto i) __attribute__((always_inline)) {
    const Vec<A> a = x[i], b = x[i + R / 2];
    x[i] = shuffle<A, LastExchange, R / 2, false>(a, b);
    x[i + R / 2] = shuffle<A, LastExchange, R / 2, true>(a, b);
  });
}

// x[0 ... kLanes - 1] -> the vector of their sums: lane i is the sum of the lanes of x[i].
template <class A, int N = kLanes<A>, int S = 1>
QKV_INLINE Vec<A> sum_lanes(Vec<A> (&x)[kLanes<A>]) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    unroll<N / 2>([&](auto i) __attribute__((always_inline)) {
      const Vec<A> a = x[2 * i], b = x[2 * i + 1];
      x[i] = exchange_lanes<A, S, false>(a, b) + exchange_lanes<A, S, true>(a, b);
    });
    return sum_lanes<A, N / 2, S * 2>(x);
  }
}

}  // namespace qkv::inline QKV_LEVEL
