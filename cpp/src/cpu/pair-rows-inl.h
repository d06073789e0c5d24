// SPDX-License-Identifier: Apache-2.0
// bfloat16 products for up to kPartRows rows, in tile registers: K and V keep the order they have in memory.
//
//     S^T = K Q^T,  o += P V
//
// A tile of B wants pairs along the summed index, and for P V that is the keys: V would have to be interleaved, which
// takes longer than the products. But the halves of its words can be taken one at a time: a row of B is then one key
// with 16 words of two columns, and P has 0 beside each weight. (p, 0) sums the even columns, (0, p) the odd ones:
// twice the products of pairs, and none of the work of making them.
//
// Layouts    P (16 rows, 16 keys) [32 keys][even or odd ones of them][for even, for odd columns], a tile each;
//            V (keys, Dv) where it lies if it is plain and whole (takes_in_place), else a copy, odd keys as zeros;
//            O (rows, Dv).
// Registers  Sums of 16 rows and 64 columns (4), two of P, V.
// Memory     V is looked over for odd keys just before its products, which brings it into L1. Few rows wait for memory
//            more than they work, so the next block (768 lines at D = 128) is asked for in all stages of this one.
#pragma once

#include "cpu/pair-operands-inl.h"

namespace qkv::inline QKV_LEVEL {

constexpr int64_t kTileBytes = 64;  // of a row
constexpr int kRowTile = 16 * 16;   // words

// --- scores --------------------------------------------------------------------------------------------------

// Scores of 16 kTiles keys for one vector of lanes.
template <int kTiles>
QKV_INLINE void score_pairs_of_tiles(const Pair* key, int64_t ld, const float* q, int64_t D, float* s, Ahead& next) {
  unroll<kTiles>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
  for (int64_t d = 0; d < pair_count(D); d += 16) {
    fetch_beside(next);
    tile_load<7>(q + d * 16, kTileBytes);
    unroll<kTiles>([&](auto c) __attribute__((always_inline)) {
      fetch_lines<kAskForTile>(next);
      tile_load_once<6>(key + c * 16 * ld + d, ld * 4);
      tile_dot<c.value, 6, 7>();
    });
  }
  unroll<kTiles>([&](auto c) __attribute__((always_inline)) { tile_store<c.value>(s + c * 16 * 16, kTileBytes); });
}

// Scores of the keys around lo ... hi - 1.
inline void score_pairs_by_rows(const Block<float>& k, const float* q, int64_t D, int lo, int hi, float* s,
                                Ahead& next) {
  int j = lo / 32 * 32;
  for (; j + 64 < hi; j += 96) score_pairs_of_tiles<6>(k.pairs + j * k.ld, k.ld, q, D, s + j * 16, next);
  for (; j < hi; j += 32) score_pairs_of_tiles<2>(k.pairs + j * k.ld, k.ld, q, D, s + j * 16, next);
}

// --- V -------------------------------------------------------------------------------------------------------

// Rows 0 ... n - 1 of a block for so many tiles, and zeros up to a multiple of 32 rows and of 32 columns.
inline void load_value_rows(const View& view, const char* first, int n, int64_t Dv, int tiles, float* scratch,
                            PairValues& out, Ahead& next) {
  constexpr int w = kLanes<float>;
  const auto* x = reinterpret_cast<const uint16_t*>(first);
  auto* const copy = reinterpret_cast<uint16_t*>(scratch);
  if (view.d == 1 && Dv % kManyHalves == 0 && n % 32 == 0) {  // most likely all are plain
    HalfSizes sizes;
    const auto look_over = [&](const auto& visit) __attribute__((always_inline)) {
      for (int j = 0; j < n; ++j) {
        const auto* row = reinterpret_cast<const float*>(x + j * view.s);
        int64_t i = 0;
        for (; i + 2 * w <= Dv / 2; i += 2 * w) {
          fetch_lines<kAskForValues>(next);
          visit(j, i, load(row + i));
          visit(j, i + w, load(row + i + w));
        }
        if (i < Dv / 2) visit(j, i, load(row + i));
      }
    };
    const bool in_place = takes_in_place(view, first, tiles);
    if (in_place) {
      look_over([&](int, int64_t, F two) __attribute__((always_inline)) { sizes.add((Halves)two); });
    } else {
      look_over([&](int j, int64_t i, F two) __attribute__((always_inline)) {
        sizes.add((Halves)two);
        store(scratch + j * (Dv / 2) + i, two);
      });
    }
    for (uint32_t& bits : out.odd) bits = 0;
    out.any_plain = true;
    out.row = {in_place ? x : copy, in_place ? view.s : Dv};
    if (sizes.plain()) return;
  }
  find_odd_halves(view, x, n, Dv, out.odd, out.any_plain);
  out.row = {copy, round_up(Dv, kManyHalves)};
  for (int j = 0; j < round_up(n, 32); ++j) {
    const bool there = j < n && !is_odd(out.odd, j);
    for (int64_t d = 0; d < Dv; d += kManyHalves) {
      const Halves row = there ? load_halves(x + j * view.s + d * view.d, view.d, Dv - d) : Halves{};
      __builtin_memcpy(copy + j * out.row.ld + d, &row, sizeof(row));
    }
  }
}

// --- P -------------------------------------------------------------------------------------------------------

// Pairs of weights (keys / 2, 16 lanes) of so many groups of 32 keys become tiles.
inline void weight_tiles(const float* pairs, int groups, float* tiles) {
  constexpr int w = kLanes<float>;
  for (int g = 0; g < groups; ++g, pairs += w * w, tiles += 4 * w * w) {
    F x[w];
    unroll<w>([&](auto i) __attribute__((always_inline)) { x[i] = load(pairs + i * w); });
    transpose<float>(x);
    unroll<w>([&](auto i) __attribute__((always_inline)) {
      const F even = low_half(x[i]), odd = mutant(82) ? even : high_half(x[i]);  // as floats, whose halves are (0, p)
      store(tiles + i * w, pair_of(even, F{}));
      store(tiles + (w + i) * w, even);
      store(tiles + (2 * w + i) * w, pair_of(odd, F{}));
      store(tiles + (3 * w + i) * w, odd);
    });
  }
}

// --- output --------------------------------------------------------------------------------------------------

// 32 C columns of O += P V, from column d0 on, over groups of 32 keys.
template <int C>
QKV_INLINE void output_columns_of_tiles(Rows<const uint16_t> v, const float* p, int groups, int64_t d0, const Output& o,
                                        Ahead& next) {
  constexpr int w = kLanes<float>;
  unroll<2 * C>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
  for (int g = 0; g < groups; ++g) {
    unroll<2>([&](auto h) __attribute__((always_inline)) {
      tile_load<4>(p + (g * 4 + 2 * h) * kRowTile, kTileBytes);
      tile_load<5>(p + (g * 4 + 2 * h + 1) * kRowTile, kTileBytes);
      unroll<C>([&](auto c) __attribute__((always_inline)) {
        fetch_lines<kAskForOutput>(next);
        tile_load<6>(v.data + (g * 32 + h) * v.ld + d0 + c * 32, 4 * v.ld);
        tile_dot<2 * c.value, 4, 6>();
        tile_dot<2 * c.value + 1, 5, 6>();
      });
    });
  }
  alignas(kVectorBytes) float sum[2 * C * kRowTile];
  unroll<2 * C>([&](auto c) __attribute__((always_inline)) { tile_store<c.value>(sum + c * kRowTile, kTileBytes); });
  for (int r = 0; r < o.rows; ++r) {
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      const F even = load(sum + 2 * c * kRowTile + r * w), odd = load(sum + (2 * c + 1) * kRowTile + r * w);
      const int64_t d = d0 + c * 32;
      float* const to = o.data + r * o.ld + d;
      store(to, load(to) + in_turn<float, false>(even, odd));
      if (d + w < o.ld) store(to + w, load(to + w) + in_turn<float, true>(even, odd));
    });
  }
}

// o += P V over the keys around lo ... hi - 1, whose weights pack_weights packed; the tiles follow those of a block.
inline void output_pairs_by_rows(const PairValues& v, int lo, int hi, float* p, const Output& o, Ahead& next) {
  constexpr int w = kLanes<float>;
  static_assert(kBlockKeys<1> * w + kBlockKeys<1> / 32 * 4 * kRowTile <= kKeys * kMaxLanes || !kTileUnit);
  const int first = lo / 32, groups = (hi + 31) / 32 - first;
  float* const tiles = p + kBlockKeys<1> * w;
  weight_tiles(p + first * w * w, groups, tiles);
  const auto some = [&](auto C, int64_t d) __attribute__((always_inline)) {
    fetch_beside(next);
    output_columns_of_tiles<C.value>({v.row.data + first * 32 * v.row.ld, v.row.ld}, tiles, groups, d, o, next);
  };
  int64_t d = 0;
  for (; d + 32 < o.ld; d += 64) some(Constant<2>{}, d);
  if (d < o.ld) some(Constant<1>{}, d);
}

}  // namespace qkv::inline QKV_LEVEL
