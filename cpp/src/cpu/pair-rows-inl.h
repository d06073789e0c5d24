// SPDX-License-Identifier: Apache-2.0
// bfloat16 products for up to kPartRows rows, in tile registers: K and V keep the order they have in memory. Dots take
// their V from here as well (find_value_rows); what they do with it: pairs-inl.h.
//
//     S^T = K Q^T,  o += P V
//
// A tile of B wants pairs along the summed index, and for P V that is the keys: V would have to be interleaved, which
// takes longer than the products. But the halves of its words can be taken one at a time: a row of B is then one key
// with 16 words of two columns, and P has 0 beside each weight. (p, 0) sums the even columns, (0, p) the odd ones:
// twice the products of pairs, and none of the work of making them.
//
// Layouts    S^T and P^T (keys, 16 lanes); 8 for up to 8 rows where nothing else is done to the scores (key_lanes), so
//            that a vector holds two keys;
//            P (16 rows, 16 keys) [32 keys][first or second 16 of them][for even, for odd columns], a tile each; up to
//            8 rows share one, (p, 0) above (0, p), and a product sums even and odd columns;
//            K (keys, D) and V (keys, Dv) where they lie, on lines of the cache, else as copies; O (rows, Dv).
// Registers  Sums of 16 rows and 64 columns or of 8 rows and 128 (4), two or one of P, V.
// Memory     What is used once is copied 16 keys at a time (5 KiB at D = 128), in L1 just before its products, from
//            whole lines: reading a tile register across lines and copying a whole block both take twice as long.
//            V is looked over for odd keys on the way; if there are any, the block is done again with them apart.
#pragma once

#include "cpu/pair-operands-inl.h"

namespace qkv::inline QKV_LEVEL {

constexpr int64_t kTileBytes = 64;  // of a row
constexpr int kRowTile = 16 * 16;   // words
// Tiles of P for the even and the odd columns: with at most 8 rows, one holds those for both.
template <int R>
constexpr int kWeightTiles = R > 8 ? 2 : 1;

// --- scores --------------------------------------------------------------------------------------------------

// Scores of 16 kTiles keys. Their rows of 16 lanes are stored in order, `lanes` apart: each overwrites what the one
// before has too many.
template <int kTiles, int kAsk>
QKV_INLINE void score_pairs_of_tiles(Rows<const Pair> k, const float* q, int64_t D, int lanes, float* s, Ahead& next) {
  unroll<kTiles>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
  for (int64_t d = 0; d < pair_count(D); d += 16) {
    fetch_beside(next);
    tile_load<7>(q + d * 16, kTileBytes);
    unroll<kTiles>([&](auto c) __attribute__((always_inline)) {
      fetch_lines(next, kAsk);
      tile_load_once<6>(k.data + c * 16 * k.ld + d, k.ld * 4);
      tile_dot<c.value, 6, 7>();
    });
  }
  unroll<kTiles>([&](auto c) __attribute__((always_inline)) { tile_store<c.value>(s + c * 16 * lanes, 4 * lanes); });
}

template <int C>
QKV_INLINE void copy_rows(const Straddling& straddling, Rows<const Pair> from, int rows, int64_t D, float* to,
                          Ahead& next) {
  constexpr int w = kLanes<float>;
  const int64_t ld = copy_ld(D / 2);
  for (int i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < D / 2; d += C * w) {
      F x[C];
      fetch_lines(next, C);
      straddling.load_words<C>(reinterpret_cast<const uint16_t*>(from.data + i * from.ld + d), x);
      unroll<C>([&](auto c) __attribute__((always_inline)) { store(to + i * ld + d + c * w, x[c]); });
    }
  }
}

// Scores of the keys around lo ... hi - 1. Copies are of few keys at a time, which stay in L1.
inline void score_pairs_by_rows(const Block<float>& k, const float* q, int64_t D, int lo, int hi, int lanes, float* s,
                                Ahead& next) {
  int j = lo / 32 * 32;
  if (!k.scratch) {
    const auto some = [&](auto kTiles) __attribute__((always_inline)) {
      const Rows<const Pair> rows{k.pairs + j * k.ld, k.ld};
      score_pairs_of_tiles<kTiles.value, kAskForTile>(rows, q, D, lanes, s + j * lanes, next);
      j += 16 * kTiles;
    };
    while (j + 64 < hi) some(Constant<6>{});
    while (j < hi) some(Constant<2>{});
    return;
  }
  const Straddling straddling(k.pairs);
  const Rows<const Pair> copy{reinterpret_cast<const Pair*>(k.scratch), copy_ld(D / 2)};
  const auto some = [&](auto kTiles) __attribute__((always_inline)) {
    const Rows<const Pair> rows{k.pairs + j * k.ld, k.ld};
    if (D % 128 == 0) copy_rows<4>(straddling, rows, 16 * kTiles, D, k.scratch, next);
    else if (D % 64 == 0) copy_rows<2>(straddling, rows, 16 * kTiles, D, k.scratch, next);
    else copy_rows<1>(straddling, rows, 16 * kTiles, D, k.scratch, next);
    score_pairs_of_tiles<kTiles.value, 0>(copy, q, D, lanes, s + j * lanes, next);
    j += 16 * kTiles;
  };
  while (D <= 64 && j < hi) some(Constant<2>{});
  while (j < hi) some(Constant<1>{});
}

// --- V -------------------------------------------------------------------------------------------------------

// A copy of rows 0 ... n - 1 of a block, and zeros up to a multiple of 32 rows and of 32 columns.
inline void load_value_rows(const View& view, const char* first, int n, int64_t Dv, float* scratch, PairValues& out,
                            Ahead& next) {
  constexpr int w = kLanes<float>;
  const auto* x = reinterpret_cast<const uint16_t*>(first);
  const int64_t words = round_up(Dv, kManyHalves) / 2, ld = copy_ld(words);
  out.row = {reinterpret_cast<const uint16_t*>(scratch), 2 * ld};
  out.unseen = false;
  if (view.d == 1 && Dv % kManyHalves == 0 && n % 32 == 0) {  // most likely all are plain
    HalfSizes sizes;
    for (int j = 0; j < n; ++j) {
      for (int64_t i = 0; i < words; i += w) {
        if (i % (2 * w) == 0) fetch_lines(next, 1);
        const F two = load(reinterpret_cast<const float*>(x + j * view.s) + i);
        sizes.add((Halves)two);
        store(scratch + j * ld + i, two);
      }
    }
    for (uint32_t& bits : out.odd) bits = 0;
    out.any_plain = true;
    if (sizes.plain()) return;
  }
  find_odd_halves(view, x, n, Dv, out.odd, out.any_plain);
  copy_other_rows(view, first, n, Dv, out.odd, scratch);
}

// Columns of O whose sums the registers hold.
constexpr int64_t most_columns_of_tiles(int lanes) { return lanes > 8 ? 64 : 128; }

// One tile that needs V once looks it over while it multiplies: in several passes memory would be read in pieces. Dots
// read it where it lies if nothing is odd.
inline void find_value_rows(const View& view, const char* first, int n, int64_t Dv, int tiles, int lanes,
                            float* scratch, PairValues& out, Ahead& next) {
  if constexpr (!kTileUnit) {
    const auto* const x = reinterpret_cast<const uint16_t*>(first);
    out.unseen = false;
    if (view.d == 1 && n % kPairKeys == 0 && Dv % kManyHalves == 0) {
      out.row = {x, view.s};
      find_odd_halves(view, x, n, Dv, out.odd, out.any_plain);
      if (!any_odd(out.odd)) return;
    }
    return load_value_rows(view, first, n, Dv, scratch, out, next);
  }
  const bool whole = n % 32 == 0 && Dv % kManyHalves == 0 && Dv <= most_columns_of_tiles(lanes);
  out.unseen = tiles == 1 && whole && (takes_in_place(view, first) || straddles(view, first, Dv));
  if (out.unseen) out.row = {reinterpret_cast<const uint16_t*>(first), view.s};
  else load_value_rows(view, first, n, Dv, scratch, out, next);
}

// --- P -------------------------------------------------------------------------------------------------------

// Weights of 32 keys, R lanes each, become tiles. inside: the vectors that hold weights, relative to theirs; the others
// are zeros.
template <int R>
QKV_INLINE void weight_tiles(const float* p, Range inside, float* tiles) {
  constexpr int w = kLanes<float>;
  const auto weight = [&](int i) __attribute__((always_inline)) {
    return i >= inside.lo && i < inside.hi ? load(p + i * w) : F{};
  };
  F x[w];
  unroll<R>([&](auto i) __attribute__((always_inline)) {
    x[i] = round_pair(weight(i), weight(R + i));  // of keys 16 apart
  });
  keys_to_rows<R, float>(x);
  constexpr int kOdd = R > 8 ? kRowTile : 8 * w;  // from (p, 0) to (0, p)
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    const F low = low_half(x[r]), high = mutant(82) ? low : high_half(x[r]);  // as floats, whose halves are (0, p)
    float* const row = tiles + r * w;
    store(row, pair_of(low, F{}));
    store(row + kOdd, low);
    store(row + kWeightTiles<R> * kRowTile, pair_of(high, F{}));
    store(row + kWeightTiles<R> * kRowTile + kOdd, high);
  });
}

// --- output --------------------------------------------------------------------------------------------------

enum class Look { Never, InPlace, OnLines };  // at V before it is multiplied; OnLines: at a copy that straddles none

// 32 C columns of O += P V, from column d0 on, over groups of 32 keys; false, and nothing added, where V is looked at
// and not plain.
template <int R, int C, Look kLook>
QKV_INLINE bool output_columns_of_tiles(Rows<const uint16_t> v, const float* p, int groups, int64_t d0, float* copy,
                                        const Output& o, Ahead& next) {
  constexpr int w = kLanes<float>, kEach = kWeightTiles<R>;
  constexpr int kChains = kEach * C < 3 ? 2 : 1;  // of sums, for each half of the keys: products wait for those before
  HalfSizes sizes;
  const Straddling straddling(v.data);
  unroll<kChains * kEach * C>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
  for (int g = 0; g < groups; ++g) {
    unroll<2>([&](auto h) __attribute__((always_inline)) {
      constexpr int kSums = h % kChains * kEach * C;
      Rows<const uint16_t> some{v.data + (g * 32 + h * 16) * v.ld + d0, v.ld};
      for (int j = 0; kLook != Look::Never && j < 16; ++j) {
        const uint16_t* const row = some.data + j * some.ld;
        F x[C];
        fetch_lines(next, C);
        if constexpr (kLook == Look::OnLines) {
          straddling.load_words<C>(row, x);
        } else {
          unroll<C>([&](auto c)
                        __attribute__((always_inline)) { x[c] = load(reinterpret_cast<const float*>(row) + c * w); });
        }
        unroll<C>([&](auto c) __attribute__((always_inline)) {
          sizes.add((Halves)x[c]);
          if constexpr (kLook == Look::OnLines) store(copy + j * copy_ld(C * w) + c * w, x[c]);
        });
      }
      if constexpr (kLook == Look::OnLines) some = {reinterpret_cast<const uint16_t*>(copy), 2 * copy_ld(C * w)};
      unroll<kEach>([&](auto e) __attribute__((always_inline)) {
        tile_load<4 + e.value>(p + ((g * 2 + h) * kEach + e) * kRowTile, kTileBytes);
      });
      unroll<C>([&](auto c) __attribute__((always_inline)) {
        if constexpr (kLook == Look::Never) fetch_lines(next, kAskForOutput);
        tile_load<6>(some.data + c * 32, 2 * some.ld);
        unroll<kEach>([&](auto e)
                          __attribute__((always_inline)) { tile_dot<kSums + c * kEach + e, 4 + e.value, 6>(); });
      });
    });
  }
  if (kLook != Look::Never && !sizes.plain()) return false;
  alignas(kVectorBytes) float sum[4 * kRowTile];
  constexpr int kOdd = R > 8 ? kRowTile : 8 * w;
  unroll<kChains * kEach * C>(
      [&](auto c) __attribute__((always_inline)) { tile_store<c.value>(sum + c * kRowTile, kTileBytes); });
  for (int r = 0; r < o.rows; ++r) {
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      const float* const from = sum + c * kEach * kRowTile + r * w;
      F even = load(from), odd = load(from + kOdd);
      if constexpr (kChains == 2) {
        even += load(from + kEach * C * kRowTile);
        odd += load(from + kEach * C * kRowTile + kOdd);
      }
      const int64_t d = d0 + c * 32;
      float* const to = o.data + r * o.ld + d;
      store(to, load(to) + in_turn<float, false>(even, odd));
      if (d + w < o.ld) store(to + w, load(to + w) + in_turn<float, true>(even, odd));
    });
  }
  return true;
}

// use(R) with the number of lanes of a key.
template <class Use>
QKV_INLINE void with_key_lanes(int lanes, const Use& use) {
  if constexpr (kTileUnit) {
    if (lanes == 8) return use(Constant<8>{});
  }
  use(Constant<kLanes<float>>{});
}

// The tiles of P follow the weights of a block.
static_assert(kBlockKeys<1> * 16 + kBlockKeys<1> / 32 * 4 * kRowTile <= kKeys * kMaxLanes || !kTileUnit);
inline void pack_weight_tiles(const Visible& seen, int lanes, float* p) {
  constexpr int w = kLanes<float>;
  const Range range = vectors_of<float>(seen, lanes);
  with_key_lanes(lanes, [&](auto R) __attribute__((always_inline)) {
    float* tiles = p + kBlockKeys<1> * w;
    for (int g = seen.lo / 32; g * 32 < seen.hi; ++g, tiles += 2 * kWeightTiles<R> * kRowTile) {
      const int at = g * 2 * R;
      weight_tiles<R.value>(p + at * w, {range.lo - at, range.hi - at}, tiles);
    }
  });
}

// o += P V over the keys around those seen; false, and O as it was, where V is looked at, in one pass, and not plain.
template <Look kLook>
inline bool output_tiles(const PairValues& v, const Visible& seen, int lanes, const float* p, float* copy,
                         const Output& o, Ahead& next) {
  constexpr int w = kLanes<float>;
  bool plain = true;
  with_key_lanes(lanes, [&](auto R) __attribute__((always_inline)) {
    constexpr int kMost = most_columns_of_tiles(R) / 32;
    const int first = seen.lo / 32, groups = (seen.hi + 31) / 32 - first;
    const Rows<const uint16_t> rows{v.row.data + first * 32 * v.row.ld, v.row.ld};
    int64_t d = 0;
    const auto some = [&](auto C, int64_t least) __attribute__((always_inline)) {
      for (; plain && o.ld - d >= least; d += 32 * C) {
        fetch_beside(next);
        plain = output_columns_of_tiles<R.value, C.value, kLook>(rows, p + kBlockKeys<1> * w, groups, d, copy, o, next);
      }
    };
    some(Constant<kMost>{}, 32 * (kMost - 1) + 1);
    if constexpr (kMost > 2) {
      some(Constant<3>{}, 64 + 1);
      some(Constant<2>{}, 32 + 1);
    }
    some(Constant<1>{}, 1);
  });
  return plain;
}

// The same for V that nobody has looked at.
inline bool output_unseen(const PairValues& v, const Visible& seen, int lanes, const float* p, float* copy,
                          const Output& o, Ahead& next) {
  return on_lines(v.row.data, v.row.ld) ? output_tiles<Look::InPlace>(v, seen, lanes, p, copy, o, next)
                                        : output_tiles<Look::OnLines>(v, seen, lanes, p, copy, o, next);
}

}  // namespace qkv::inline QKV_LEVEL
