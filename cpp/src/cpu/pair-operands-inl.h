// SPDX-License-Identifier: Apache-2.0
// What the products of bfloat16 (pairs-inl.h) read: pairs of neighbours along the summed index.
//
// Layouts    K (keys, D) as it lies in memory, or copied onto lines of the cache; Q pairs along D (D / 2, L); P pairs
//            along the keys (kKeys / 2, L), made of the score tile in place; V^T (Dv, kKeys), transposed once per block
//            and task (5 % of the time), for tile registers as tiles of 16 columns and 32 keys. Tiles of one vector
//            read V by rows.
// Numerics   P is rounded to bfloat16. O is divided by the sum of the exact weights: with that of the rounded ones a
//            large weight's rounding would move what all other keys add. Odd keys, whose value holds something not
//            finite or below 2^-64, are multiplied in float and selected: what a lane may not see must not reach it, as
//            0 times infinity would, and small products must not vanish: of those that are left, only weights below
//            2^-62 make such (small-sums-inl.h).
#pragma once

#include "cpu/few-operands-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/rows-inl.h"

namespace qkv::inline QKV_LEVEL {

// Lines that few tiles (pair-rows-inl.h) ask for at a tile of K and of V. One tile asks for as many as it copies.
constexpr int kAskForTile = 6, kAskForOutput = 8;

// Rows and summed elements come in multiples of these.
constexpr int kPairKeys = kTileUnit ? 32 : 2;
constexpr int kPairColumns = kTileUnit ? 32 : 2;
constexpr int kPairRows = kTileUnit ? 32 : kMaxRows;  // of C per product

inline int64_t pair_count(int64_t D) { return round_up(D, kPairColumns) / 2; }

// The Q^T tile (D, L) of bfloat16 values in float becomes pairs, in place.
template <int NV>
inline void pack_queries(int64_t D, float* q) {
  constexpr int w = kLanes<float>;
  for (int64_t d = 0; d < 2 * pair_count(D); d += 2) {
    for (int v = 0; v < NV; ++v) {
      const F low = d < D ? load(q + (d * NV + v) * w) : F{}, high = d + 1 < D ? load(q + ((d + 1) * NV + v) * w) : F{};
      store(q + (d / 2 * NV + v) * w, pair_of(low, high));
    }
  }
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
constexpr int kManyHalves = kVectorBytes / 2;

QKV_INLINE Halves load_halves(const uint16_t* x, int64_t stride, int64_t n) {
  if (stride == 1 && n >= kManyHalves) return (Halves)load(reinterpret_cast<const float*>(x));
  Halves row{};
  int64_t d = 0;
  if (kPairs && stride == 1) {
    row = (Halves)load_lanes((uint32_t{1} << n / 2) - 1, reinterpret_cast<const float*>(x));
    d = n / 2 * 2;
  }
  for (; d < n && d < kManyHalves; ++d) row[d] = x[d * stride];
  return row;
}

// Can rows be taken where they lie? A row of a tile register is a line of the cache: one that straddles two takes
// several times as long, and NumPy's large arrays begin 16 bytes into a line.
inline bool on_lines(const void* row, int64_t ld) {
  return ((reinterpret_cast<intptr_t>(row) | ld * 2) & (kLine - 1)) == 0;
}
inline bool takes_in_place(const View& view, const char* first) {
  return view.d == 1 && view.s % 2 == 0 && (!kTileUnit || on_lines(first, view.s));
}

// Rows of words that all straddle lines in the same way, read by whole lines.
struct Straddling {
  int before;      // words of a row's first line that are not its own
  uint32_t there;  // those that are
  IntVec<float> lane;
  explicit Straddling(const void* row) {
    before = static_cast<int>(reinterpret_cast<intptr_t>(row) & (kLine - 1)) / 4;
    there = ~uint32_t{0} << before;
    for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
    lane += before;
  }
  template <int C>
  QKV_INLINE void load_words(const uint16_t* row, F (&x)[C]) const {
    constexpr int w = kLanes<float>;
    const float* const line = reinterpret_cast<const float*>(row) - before;
    F all[C + 1];
    all[0] = load_lanes(there, line);
    unroll<C - 1>([&](auto c) __attribute__((always_inline)) { all[c + 1] = load(line + (c + 1) * w); });
    all[C] = load_lanes(~there, line + C * w);
    unroll<C>([&](auto c) __attribute__((always_inline)) { x[c] = choose_lanes(all[c], all[c + 1], lane); });
  }
};
inline bool straddles(const View& view, const char* first, int64_t columns) {
  const bool evenly = (reinterpret_cast<intptr_t>(first) & 3) == 0 && view.s * 2 % kLine == 0;
  return kTileUnit && view.d == 1 && evenly && columns % kManyHalves == 0;
}

// Words from row to row of a copy: an odd number of lines, since a tile whose rows are an even number of them apart
// takes a sixth longer. For no D is that more than D floats, for which there is room.
constexpr int64_t copy_ld(int64_t pairs) { return kLanes<float> * (pairs / kLanes<float> | 1); }

// Keys 0 ... n - 1 of a block for so many tiles, in place or as a padded copy. One tile copies what straddles lines
// itself, to `scratch`, some keys at a time just before it multiplies them.
inline void load_keys(const View& view, const char* first, int n, int64_t D, int tiles, float* scratch,
                      Block<float>& out) {
  const bool whole = D % kPairColumns == 0 && (!kTileUnit || n % kPairKeys == 0);
  const bool in_place = takes_in_place(view, first);
  if (whole && (in_place || (tiles == 1 && straddles(view, first, D)))) {
    out.pairs = reinterpret_cast<const Pair*>(first);
    out.ld = view.s / 2;
    out.scratch = in_place ? nullptr : scratch;
    return;
  }
  const auto* x = reinterpret_cast<const uint16_t*>(first);
  out.pairs = reinterpret_cast<const Pair*>(scratch);
  out.ld = kTileUnit ? copy_ld(pair_count(D)) : pair_count(D);
  for (int64_t j = 0; j < round_up(n, kPairKeys); ++j) {
    for (int64_t d = 0; d < D; d += kManyHalves) {  // in order: a last vector may reach into the row after
      const Halves row = j < n ? load_halves(x + j * view.s + d * view.d, view.d, D - d) : Halves{};
      store(scratch + j * out.ld + d / 2, (F)row);
    }
  }
}

// Bit j: row j of a block is one that the tile registers cannot take.
inline bool is_odd(const uint32_t* odd, int j) { return odd[j / 32] >> j % 32 & 1; }
inline bool any_odd(const uint32_t* odd) {
  uint32_t any = 0;
  for (int word = 0; word < kMaskWords; ++word) any |= odd[word];
  return any != 0;
}

// V of a block. Keys that are missing are zeros, and so are odd ones, with their bit set.
struct PairValues {
  const Pair* data;          // V^T, where value_pairs_at says
  Rows<const uint16_t> row;  // or V by rows
  uint32_t odd[kMaskWords];
  bool any_plain;  // else there is nothing to multiply
  bool unseen;     // V by rows where it lies, not looked over yet
};

struct HalfSizes {                     // of many halves
  Halves most = {}, least = most - 1;  // |x|; |x| - 1, which is the largest where x is 0
  QKV_INLINE void add(Halves x) {
    const Halves size = x & 0x7fff, below = size - 1;
    most = size > most ? size : most;
    least = below < least ? below : least;
  }
  static constexpr uint16_t kInfinity = 0x7f80, kSmall = 0x1f80;  // 2^-64
  bool finite() const {
    const auto odd = (IntVec<float>)(most >= kInfinity);
    return !any(odd | odd << 16);
  }
  bool plain() const {
    const auto odd = (IntVec<float>)((most >= kInfinity) | (least < kSmall - 1));
    return !any(odd | odd << 16);  // any looks at the sign of 32 bits
  }
};

// Bit j: is(sizes of row j). True where all rows are together, and most likely they are not.
template <class Is>
inline void find_keys(const View& view, const uint16_t* x, int n, int64_t Dv, const Is& is,
                      uint32_t (&keys)[kMaskWords]) {
  for (uint32_t& bits : keys) bits = 0;
  const auto look_at = [&](int j, HalfSizes& sizes) __attribute__((always_inline)) {
    for (int64_t d = 0; d < Dv; d += kManyHalves) {
      sizes.add(load_halves(x + j * view.s + d * view.d, view.d, Dv - d));
    }
  };
  HalfSizes all;
  for (int j = 0; j < n; ++j) look_at(j, all);
  for (int j = 0; is(all) && j < n; ++j) {
    HalfSizes sizes;
    look_at(j, sizes);
    keys[j / 32] |= static_cast<uint32_t>(is(sizes)) << j % 32;
  }
}

inline void find_odd_halves(const View& view, const uint16_t* x, int n, int64_t Dv, uint32_t (&odd)[kMaskWords],
                            bool& any_plain) {
  find_keys(view, x, n, Dv, [](const HalfSizes& sizes) { return !sizes.plain(); }, odd);
  any_plain = false;
  for (int j = 0; j < n && !any_plain; ++j) any_plain = !is_odd(odd, j);
}

// Rows of V, with zeros in place of some keys', and up to a multiple of 32 of them; columns up to one of kManyHalves.
inline View copy_other_rows(const View& view, const char* first, int n, int64_t Dv, const uint32_t* without,
                            float* copy) {
  const auto* const x = reinterpret_cast<const uint16_t*>(first);
  const int64_t ld = copy_ld(round_up(Dv, kManyHalves) / 2);
  for (int j = 0; j < round_up(n, 32); ++j) {
    const bool there = j < n && !is_odd(without, j);
    for (int64_t d = 0; d < Dv; d += kManyHalves) {
      store(copy + j * ld + d / 2, there ? (F)load_halves(x + j * view.s + d * view.d, view.d, Dv - d) : F{});
    }
  }
  View rows = view;
  rows.s = 2 * ld;
  rows.d = 1;
  return rows;
}

// Where V^T has the pairs of keys j0 ... j0 + 31 of column d.
inline int64_t value_pairs_at(int64_t d, int64_t j0) {
  constexpr int w = kLanes<float>;
  return kTileUnit ? (d / w * (kKeys / (2 * w)) + j0 / (2 * w)) * w * w + d % w * w : d * (kKeys / 2) + j0 / 2;
}

inline void load_values(const View& view, const char* first, int n, int64_t Dv, float* scratch, PairValues& out) {
  constexpr int w = kLanes<float>, kSome = 2 * w;  // keys at once
  static_assert(!kPairs || w == 16);
  const auto* x = reinterpret_cast<const uint16_t*>(first);
  out.data = reinterpret_cast<const Pair*>(scratch);
  find_odd_halves(view, x, n, Dv, out.odd, out.any_plain);
  for (int j0 = 0; j0 < n; j0 += kSome) {
    for (int64_t d0 = 0; d0 < Dv; d0 += w) {
      const uint16_t* row = x + j0 * view.s + d0 * view.d;
      int64_t step = view.s;
      uint16_t copy[kSome * w];
      if (view.d != 1 || Dv - d0 < w || n - j0 < kSome || out.odd[j0 / 32]) {
        for (int j = 0; j < kSome; ++j) {
          const bool there = j0 + j < n && !is_odd(out.odd, j0 + j);
          for (int d = 0; d < w; ++d) copy[j * w + d] = there && d0 + d < Dv ? row[j * step + d * view.d] : 0;
        }
        row = copy;
        step = w;
      }
      const auto keys = [&](int j) __attribute__((always_inline)) {  // j and j + w
        return load_halves(reinterpret_cast<const float*>(row + j * step),
                           reinterpret_cast<const float*>(row + (j + w) * step));
      };
      F pairs[w];
      unroll<w / 2>([&](auto i) __attribute__((always_inline)) {
        const F even = keys(2 * i), odd = keys(2 * i + 1);
        pairs[i] = low_pairs(even, odd);
        pairs[w / 2 + i] = high_pairs(even, odd);
      });
      transpose<float, 1, w / 2>(pairs);
      unroll<w>([&](auto i) __attribute__((always_inline)) {
        constexpr int kColumn = (i & 3) | (i & 4) << 1 | (i & 8) >> 1;  // low_pairs has 0 ... 3 and 8 ... 11
        store(scratch + value_pairs_at(d0 + kColumn, j0), pairs[i]);
      });
    }
  }
}

// P^T of keys lo ... hi - 1, a multiple of kPairKeys around them, becomes pairs in place.
template <int NV>
inline void pack_weights(int lo, int hi, float* s) {
  constexpr int w = kLanes<float>;
  const int first = lo / kPairKeys * kPairKeys, end = static_cast<int>(round_up(hi, kPairKeys));
  const int inside = lo + (lo & 1), outside = hi & ~1;  // from and up to which both keys of a pair are there
  const auto pack = [&](int j, const auto& weight) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      store(s + (j / 2 * NV + v) * w, round_pair(weight(j, v), weight(j + 1, v)));
    });
  };
  const auto any_key = [&](int j, int v) __attribute__((always_inline)) {
    return j >= lo && j < hi ? load(s + (j * NV + v) * w) : F{};
  };
  const auto seen_key = [&](int j, int v) __attribute__((always_inline)) { return load(s + (j * NV + v) * w); };
  for (int j = first; j < inside; j += 2) pack(j, any_key);
  for (int j = inside; j < outside; j += 2) pack(j, seen_key);
  for (int j = outside > inside ? outside : inside; j < end; j += 2) pack(j, any_key);
}

struct Output {  // O^T (Dv, L), or for tiles of one vector so many rows of O, ld apart
  float* data;
  int rows;
  int64_t ld;
};

// o[d][lane] += the sum of p v over the odd keys, for the lanes that see some; value(key, d) is v, weight(key, vector)
// p. The sum is added as a whole, as that of a block's other keys is, and several columns are summed at once, so that
// fma need not wait.
template <int NV, class Value, class Weight>
__attribute__((noinline)) void add_odd_values(const uint32_t* odd, const Visible& seen, int64_t Dv, const Output& o,
                                              const Value& value, const Weight& weight) {
  constexpr int w = kLanes<float>, kColumns = NV == 1 ? w : 8;
  if (!any_odd(odd)) return;
  int key[kKeys], n = 0;
  IntVec<float> sees[kKeys][NV], some[NV] = {};
  for (int j = seen.lo; j < seen.hi; ++j) {
    if (!is_odd(odd, j) || mutant(83)) continue;
    for (int v = 0; v < NV; ++v) {
      for (int i = 0; i < w; ++i)
        sees[n][v][i] = !seen.partial || mutant(81) || seen.bits[j] >> (v * w + i) & 1 ? -1 : 0;
      some[v] |= sees[n][v];
    }
    key[n++] = j;
  }
  for (int64_t d = 0; n > 0 && d < Dv; d += kColumns) {
    F sum[kColumns][NV] = {};
    for (int i = 0; i < n; ++i) {
      for (int t = 0; t < kColumns; ++t) {
        const F x = splat(value(key[i], d + t < Dv ? d + t : Dv - 1));
        for (int v = 0; v < NV; ++v) {
          const F more = fma(weight(key[i], v), x, sum[t][v]);
          sum[t][v] = sees[i][v] != 0 ? more : sum[t][v];
        }
      }
    }
    if constexpr (NV == 1) {
      F row[w];
      for (int t = 0; t < w; ++t) row[t] = sum[t][0];
      transpose<float>(row);
      for (int r = 0; r < o.rows; ++r) {
        float* const at = o.data + r * o.ld + d;  // ld is whole vectors
        if (some[0][r]) store(at, load(at) + row[r]);
      }
    } else {
      for (int t = 0; t < kColumns && d + t < Dv; ++t) {
        for (int v = 0; v < NV; ++v) {
          float* const at = o.data + ((d + t) * NV + v) * w;
          store(at, some[v] != 0 ? load(at) + sum[t][v] : load(at));
        }
      }
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
