// SPDX-License-Identifier: Apache-2.0
// O += P V for few rows by dots of bfloat16, with head_dim in the lanes.
//
//     o[row][d] += sum over pairs of keys of p[2 m][row] v[2 m][d] + p[2 m + 1][row] v[2 m + 1][d]
//
// V is read where it lies; the pairs of two of its rows are two shuffles of a vector each, which serve all rows of O.
// So a value takes half an fma and half a shuffle a row or less, where float takes a conversion and an fma.
//
// Layouts    P (pairs of keys, N rows) words, N the lanes that a key has for so many rows (few_lanes); V (keys, Dv).
// Registers  N rows x 16 / N vectors of sums, N weights, two pairs and the two orders of the shuffles.
// Numerics   P is rounded to bfloat16. The maximum moves whenever it rises (Tile::lazy), so that the largest weight is
//            1 and not rounded, and none is above. Dots take numbers and products below 2^-126 for 0, and what is not
//            finite meets the weights 0 of those that may not see it. Neither is looked for in V, which would take as
//            long as the dots: the sums of a block show it. One that is finite and not below 2^-85 has lost less than
//            2^-34 of what it holds, since 96 keys lose less than 2^-119. Those below are summed again in float, each
//            by itself; keys that are not finite are left out, and then added for the rows that see them. So no bit of
//            a row depends on what it does not see, nor on other rows.
#pragma once

#include "cpu/few-inl.h"
#include "cpu/pair-operands-inl.h"

namespace qkv::inline QKV_LEVEL {

// Are V's products dots? The scores may be of any kind.
template <class T>
inline bool dots_values(const Problem& p, const T& tile) {
  return tile.dots && tile.rows > 1 && reads_stored<float, Bf16>(p.Dv);
}

// --- P -------------------------------------------------------------------------------------------------------

// Weights of keys lo ... hi - 1, so many lanes each, become pairs of keys that begin at even ones.
template <int N>
inline void pack_few_weights(const Visible& seen, int lanes, const float* p, float* pairs) {
  constexpr int w = kLanes<float>;
  const auto pack = [&](F even, F odd, float* to) __attribute__((always_inline)) { store(to, round_pair(even, odd)); };
  if (lanes == w) {  // N of a pair's words count; the next one overwrites the others
    for (int j = seen.lo & ~1; j < seen.hi; j += 2) {
      pack(j >= seen.lo ? load(p + j * w) : F{}, j + 1 < seen.hi ? load(p + (j + 1) * w) : F{}, pairs + j / 2 * N);
    }
    return;
  }
  const Range range = vectors_of<float>(seen, N);
  for (int i = range.lo & ~1; i < range.hi; i += 2) {
    const F a = i >= range.lo ? load(p + i * w) : F{}, b = i + 1 < range.hi ? load(p + (i + 1) * w) : F{};
    pack(every_other<float, false, N>(a, b), every_other<float, true, N>(a, b), pairs + i / 2 * w);
  }
}

// --- output --------------------------------------------------------------------------------------------------

// Word t: element t of even and of odd, or element kLanes + t.
template <bool kHigh, int... T>
QKV_INLINE F pair_columns(F even, F odd, Ints<T...>) {
  constexpr int kFirst = kHigh ? kManyHalves / 2 : 0;
#if defined(__clang__)
  return (F)__builtin_shufflevector((Halves)even, (Halves)odd, (T % 2 * kManyHalves + T / 2 + kFirst)...);
#else
  return (F)__builtin_shuffle((Halves)even, (Halves)odd, Halves{(T % 2 * kManyHalves + T / 2 + kFirst)...});
#endif
}

// Sums are in registers for so many keys: to add them to memory takes as long as two keys do. For more of them rows of
// V would be read in pieces.
constexpr int kKeysAtOnce = 32;

// 32 C columns of N rows of O, over keys lo ... hi - 1 of a group, whose first one that is even v begins with.
template <int N, int C>
QKV_INLINE void output_columns_of_pairs(const Rows<const Bf16>& v, Range keys, const Pair* p, float* o, int64_t ldo,
                                        int64_t d, const Soon& soon) {
  constexpr int w = kLanes<float>;
  F sum[N][2 * C];
  unroll<N>([&](auto r) __attribute__((always_inline)) {
    unroll<2 * C>([&](auto c) __attribute__((always_inline)) { sum[r][c] = zero<float>(); });
  });
  const Bf16* row = v.data + d;
  const char* turn = soon.at + d * soon.size;
  for (int j = keys.lo & ~1; j < keys.hi; j += 2, row += 2 * v.ld, turn += 2 * soon.step, p += N) {
    const Bf16* const first = row + (j < keys.lo ? v.ld : 0);  // a missing key is its neighbour, with weight 0
    const Bf16* const second = row + (j + 1 < keys.hi ? v.ld : 0);
    const char *line = turn, *line_after = turn + soon.step;
    F x[N];
    unroll<N>([&](auto r) __attribute__((always_inline)) { x[r] = splat(p[r]); });
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      ask<kAsks<float, Bf16, N>>(line, soon.bytes, soon.again);
      const F even = load(reinterpret_cast<const float*>(first + c * kManyHalves));
      ask<kAsks<float, Bf16, N>>(line_after, soon.bytes, soon.again);
      const F odd = load(reinterpret_cast<const float*>(second + c * kManyHalves));
      const F low = pair_columns<false>(even, odd, typename UpTo<kManyHalves>::All{});
      const F high = pair_columns<true>(even, odd, typename UpTo<kManyHalves>::All{});
      unroll<N>([&](auto r) __attribute__((always_inline)) {
        sum[r][2 * c] = dot_into(x[r], low, sum[r][2 * c]);
        sum[r][2 * c + 1] = dot_into(x[r], high, sum[r][2 * c + 1]);
      });
    });
  }
  unroll<N>([&](auto r) __attribute__((always_inline)) {
    unroll<2 * C>([&](auto c) __attribute__((always_inline)) {
      float* const to = o + r * ldo + d + c * w;
      store(to, load(to) + sum[r][c]);
    });
  });
}

constexpr int32_t kSmallSum = (127 - 85) << 23;  // 2^-85

QKV_INLINE IntVec<float> sizes_of_sums(F x) { return (IntVec<float>)x & 0x7fffffff; }

// Have n sums lost nothing that counts?
inline bool sums_are_sound(const float* sums, int64_t n) {
  constexpr int32_t kInfinity = 0x7f800000;
  IntVec<float> most{}, least = kInfinity - IntVec<float>{};
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const IntVec<float> size = sizes_of_sums(load(sums + i));
    most = size > most ? size : most;
    least = size < least ? size : least;
  }
  return mutant(84) || !any((most >= kInfinity) | (least < kSmallSum));
}

// The weights of a block, as they are and as pairs, and what their products with V sum to.
struct FewPairs {
  const float* p;
  int lanes;  // of a key in p
  float *pairs, *sums;
};

inline void clear_sums(const FewPairs& state, const Output& o) {
  for (int64_t i = 0; i < few_lanes<float>(o.rows) * o.ld; i += kLanes<float>) store(state.sums + i, F{});
}
inline void begin_few_pairs(const Visible& seen, const Output& o, const FewPairs& state) {
  clear_sums(state, o);
  with_few_lanes<float>(o.rows, [&](auto N) __attribute__((always_inline)) {
    if constexpr (N > 1) pack_few_weights<N.value>(seen, state.lanes, state.p, state.pairs);
  });
}

// Keys lo ... hi - 1 of the block whose first row is given. `copy`: room for kKeysAtOnce rows.
inline void add_few_pairs(const View& view, const char* first, int64_t Dv, int lo, int hi, const FewPairs& state,
                          const Output& o, void* copy, Ahead& next) {
  with_few_lanes<float>(o.rows, [&](auto N) __attribute__((always_inline)) {
    if constexpr (N > 1) {
      for (int j0 = lo / kKeysAtOnce * kKeysAtOnce; j0 < hi; j0 += kKeysAtOnce) {
        const Range keys{lo > j0 ? lo - j0 : 0, hi - j0 < kKeysAtOnce ? hi - j0 : kKeysAtOnce};
        const int begin = keys.lo & ~1;
        const char* const row = first + (j0 + begin) * view.s * int64_t{sizeof(Bf16)};
        const auto rows = stored_rows<Bf16>(view, row, keys.hi - begin, Dv, copy);
        const auto* const weights = reinterpret_cast<const Pair*>(state.pairs + (j0 + begin) / 2 * N);
        for (int i = 0; i < kKeysAtOnce / kGroupKeys; ++i) fetch_beside(next);
        const Soon soon = take_soon<float>(next, rows, kKeysAtOnce);
        int64_t d = 0;
        const auto columns = [&](auto C) __attribute__((always_inline)) {
          for (; d + C * kManyHalves <= Dv; d += C * kManyHalves) {
            output_columns_of_pairs<N.value, C.value>(rows, keys, weights, state.sums, o.ld, d, soon);
          }
        };
        columns(Constant<8 / N>{});
        if constexpr (N < 4) columns(Constant<2>{});
        if constexpr (N < 8) columns(Constant<1>{});
      }
    }
  });
}

QKV_INLINE float rounded_weight(const FewPairs& state, const Output& o, int j, int r) {
  const uint32_t bits = reinterpret_cast<const Pair*>(state.pairs)[j / 2 * few_lanes<float>(o.rows) + r].bits;
  return bf16_to_float(static_cast<uint16_t>(j % 2 == 0 ? bits : bits >> 16));
}

// Small sums again, in float, over the keys that are finite. Most are 0 because their column or all weights are.
inline void sum_small_ones(const View& view, const char* first, int n, int64_t Dv, const Visible& seen,
                           const FewPairs& state, const Output& o, const uint32_t* endless, float* copy) {
  constexpr int w = kLanes<float>;
  const auto* const x = reinterpret_cast<const uint16_t*>(first);
  for (int64_t d = 0; d < Dv; d += kManyHalves) {
    Halves held{};
    for (int j = 0; j < n; ++j) held |= load_halves(x + j * view.s + d * view.d, view.d, Dv - d) & 0x7fff;
    store(copy + d / 2, (F)held);
  }
  bool again[kFewRows<float>], any_again = false;
  for (int r = 0; r < o.rows; ++r) {
    bool weighs = false, small = false;
    for (int j = seen.lo; j < seen.hi && !weighs; ++j) weighs = rounded_weight(state, o, j, r) != 0;
    for (int64_t d = 0; weighs && d < Dv; d += 2 * w) {
      const F held = load(copy + d / 2), even = load(state.sums + r * o.ld + d),
              odd = load(state.sums + r * o.ld + d + w);
      const F columns = in_turn<float, false>(low_half(held), high_half(held));
      const F after = in_turn<float, true>(low_half(held), high_half(held));
      small = small || any(((sizes_of_sums(even) < kSmallSum) & (columns != 0)) |
                           ((sizes_of_sums(odd) < kSmallSum) & (after != 0)));
    }
    again[r] = small;
    any_again = any_again || small;
  }
  if (!any_again) return;
  convert_rows(view, first, n, Dv, copy);
  for (int r = 0; r < o.rows; ++r) {
    for (int64_t d = 0; again[r] && d < Dv; d += w) {
      F sum{};
      for (int j = seen.lo; j < seen.hi; ++j) {
        if (!is_odd(endless, j)) sum = fma(splat(rounded_weight(state, o, j, r)), load(copy + j * Dv + d), sum);
      }
      float* const at = state.sums + r * o.ld + d;
      store(at, sizes_of_sums(load(at)) < kSmallSum ? sum : load(at));
    }
  }
}

// O gains the sums of a block of n keys; copy: room for their V.
inline void end_few_pairs(const View& view, const char* first, int n, int64_t Dv, const Visible& seen,
                          const FewPairs& state, const Output& o, float* copy) {
  const auto* const x = reinterpret_cast<const uint16_t*>(first);
  uint32_t endless[kMaskWords] = {};
  if (!sums_are_sound(state.sums, o.rows * o.ld)) {
    find_keys(view, x, n, Dv, [](const HalfSizes& sizes) { return !sizes.finite(); }, endless);
    if (any_odd(endless)) {
      Ahead none;
      clear_sums(state, o);
      add_few_pairs(copy_other_rows(view, first, n, Dv, endless, copy), reinterpret_cast<const char*>(copy), Dv,
                    seen.lo, seen.hi, state, o, nullptr, none);
    }
    sum_small_ones(view, first, n, Dv, seen, state, o, endless, copy);
  }
  for (int64_t i = 0; i < o.rows * o.ld; i += kLanes<float>) store(o.data + i, load(o.data + i) + load(state.sums + i));
  add_odd_values<1>(
      endless, seen, Dv, o, [&](int64_t j, int64_t d) { return bf16_to_float(x[j * view.s + d * view.d]); },
      [&](int j, int) {
        F weights{};
        for (int r = 0; r < o.rows; ++r) weights[r] = rounded_weight(state, o, j, r);
        return weights;
      });
}

}  // namespace qkv::inline QKV_LEVEL
