// SPDX-License-Identifier: Apache-2.0
// float products in tile registers: a value is the sum of three bfloat16, x = h + m + l, exactly.
//
//     x y = h h' + (h m' + m h') + (m m' + h l' + l h') + what is dropped: below 2^-24 |x y| where both are rounded to
//                                                         h and m, below 3 2^-24 |x y| where one is cut off
//
// Six products of bfloat16, exact in float, at 16 times the rate of fma: a product in fma's accuracy, 2.5 times as
// fast.
//
// Layouts    A tile is 16 rows of 16 pairs, 1 KiB, and a group the 32 summed elements i, i + 16 of its pairs.
//            Q, P (summed, 32 lanes)   [group][h m l][half of the lanes], a tile each
//            K, V^T (rows, summed)     [16 rows][group][h m l], V transposed on the way
//            Q is cut once per task, K and V once per block and task, P once per tile and block.
// Registers  2 x 2 tiles of C, two of A and two of B: of the six products two neighbours share A or B, so 24 products
//            take 14 loads.
// Numerics   Subnormal operands and sums count as 0. The largest of a row of Q or K is therefore from kLeastSize to
//            kMostSize, or 0: what its products lose is far below their rounding. Elements of V are at most kMostSize;
//            they are multiplied by kLift, and O is divided by it, so that no small one is lost. Keys and queries that
//            are odd (not such, or not finite) are multiplied in float and selected. The sums of 16 pairs are rounded
//            like a chain of 16 fma, and added.
// References Dekker 1971 (doi 10.1007/BF01397083), the sum of pieces; Henry, Tang & Heinecke 2019 (arXiv 1904.06376),
//            the pieces as bfloat16.
#pragma once

#include "cpu/pairs-inl.h"

namespace qkv::inline QKV_LEVEL {

constexpr int kPieces = 3;
constexpr int kGroup = 32;              // summed elements of a tile
constexpr int64_t kTileSize = 16 * 16;  // pairs

constexpr float kLeastSize = 0x1p-46f, kMostSize = 0x1p40f;
constexpr float kLift = 0x1p60f;  // 2^60 2^40, weights of 2^8 2^10 (dropout) and 2^8 keys stay below 2^127
constexpr double kMostDropoutScale = 1024;

// Cutting K and V pays from so many rows on, that have so many elements, and where so many rows of a task meet a key.
constexpr int64_t kLeastSplitRows = 128;
constexpr int64_t kLeastSplitElements = 128 * 64;
constexpr double kLeastRowsPerKey = 96;

// Keys of a pass of P V: their pieces of P (18 KiB) stay in L1 while V^T runs through from L2.
constexpr int kPassKeys = 96;
static_assert(kPassKeys % kGroup == 0);

constexpr int64_t split_groups(int64_t summed) { return round_up(summed, kGroup) / kGroup; }
constexpr bool mostly_whole(int64_t summed) { return 4 * summed >= 3 * kGroup * split_groups(summed); }  // not padding
constexpr int64_t split_lane_size(int64_t summed) { return split_groups(summed) * kPieces * 16; }        // of B
constexpr int64_t split_size(int64_t rows, int64_t summed) {
  return round_up(rows, 2 * 16) / 16 * split_groups(summed) * kPieces * kTileSize;
}

// --- pieces --------------------------------------------------------------------------------------------------

// The pieces of low and high as pairs, `step` apart. Rounding to the nearest, of ties to the larger, halves what is
// left and lets its sign vary; the third piece is exact, but where it is subnormal. Of a product's two factors one may
// be cut off instead, for less work.
template <bool kRound>
QKV_INLINE void split_pair(F low, F high, float* to, int64_t step) {
  constexpr int32_t kHalf = kRound ? 0x8000 : 0, kUpper = static_cast<int32_t>(0xffff0000u);
  unroll<kPieces>([&](auto piece) __attribute__((always_inline)) {
    constexpr bool kLast = piece.value == kPieces - 1;
    const F a = kLast ? low : (F)(((IntVec<float>)low + kHalf) & kUpper);
    const F b = kLast ? high : (F)(((IntVec<float>)high + kHalf) & kUpper);
    store(to + piece * step, mutant(76) && kLast ? F{} : pair_of(a, b));
    low -= a;
    high -= b;
  });
}

// Rows lo ... hi - 1 of so many, with NV vectors of lanes each, as tiles of B; the others of their groups count as 0.
template <bool kRound, int NV>
inline void split_lanes(const float* x, int lo, int hi, float* to) {
  constexpr int w = kLanes<float>;
  for (int first = lo / kGroup * kGroup; first < hi; first += kGroup) {
    float* const group = to + first / kGroup * kPieces * NV * kTileSize;
    for (int i = 0; i < 16; ++i) {
      const int low = first + i, high = low + 16;
      unroll<NV>([&](auto v) __attribute__((always_inline)) {
        const F a = low >= lo && low < hi ? load(x + (low * NV + v) * w) : F{};
        const F b = high >= lo && high < hi ? load(x + (high * NV + v) * w) : F{};
        split_pair<kRound>(a, b, group + v * kTileSize + i * 16, NV * kTileSize);
      });
    }
  }
}

// x[0 ... w - 1], of which n <= w are there; the others count as 0.
QKV_INLINE F load_some(const float* x, int64_t n) {
  if (n >= kLanes<float>) return load(x);
  F some{};
  if (n > 0) __builtin_memcpy(&some, x, static_cast<size_t>(n) * sizeof(float));
  return some;
}

// --- what is odd ---------------------------------------------------------------------------------------------

QKV_INLINE IntVec<float> size_of(F x) { return (IntVec<float>)x & 0x7fffffff; }  // in the order of |x|, NaN largest
QKV_INLINE IntVec<float> size_bits(float x) { return (IntVec<float>)splat(x); }

// Is the largest |x| of a row 0 or from kLeastSize to kMostSize?
inline bool plain_size(const float* x, int64_t n) {
  IntVec<float> most{};
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const IntVec<float> size = size_of(load_some(x + i, n - i));
    most = size > most ? size : most;
  }
  if (any(most > size_bits(kMostSize))) return false;
  return any(most >= size_bits(kLeastSize)) || !any(most != 0);
}

// Is no |x| of a row above kMostSize? Small ones are lifted.
inline bool plain_sizes(const float* x, int64_t n) {
  IntVec<float> odd{};
  for (int64_t i = 0; i < n; i += kLanes<float>) odd |= size_of(load_some(x + i, n - i)) > size_bits(kMostSize);
  return mutant(78) || !any(odd);
}

template <class Plain>
inline void find_odd(const Block<float>& block, int n, int64_t columns, const Plain& plain, uint32_t* odd) {
  for (int word = 0; word < kMaskWords; ++word) odd[word] = 0;
  for (int j = 0; j < n; ++j) {
    odd[j / 32] |= static_cast<uint32_t>(!plain(block.data + j * block.ld, columns)) << j % 32;
  }
}

// --- operands ------------------------------------------------------------------------------------------------

struct SplitBlock {  // of K or V
  const float* data;
  uint32_t odd[kMaskWords];  // rows that count as 0 in it
};

template <int NV>
struct SplitQueries {  // of a tile
  float* data;
  const float* exact;     // Q^T (D, L)
  IntVec<float> odd[NV];  // lanes
};

template <int NV>
inline void split_queries(int64_t D, SplitQueries<NV>& q) {
  constexpr int w = kLanes<float>;
  for (int v = 0; v < NV; ++v) {
    IntVec<float> most{};
    for (int64_t d = 0; d < D; ++d) {
      const IntVec<float> size = size_of(load(q.exact + (d * NV + v) * w));
      most = size > most ? size : most;
    }
    q.odd[v] = (most > size_bits(kMostSize)) | ((most < size_bits(kLeastSize)) & (most != 0));
  }
  split_lanes<true, NV>(q.exact, 0, static_cast<int>(D), q.data);
}

inline void split_keys(const Block<float>& k, int n, int64_t D, float* to, SplitBlock& out) {
  find_odd(k, n, D, plain_size, out.odd);
  out.data = to;
  const int64_t groups = split_groups(D);
  for (int j = 0; j < round_up(n, kGroup); ++j) {
    const bool there = j < n && !is_odd(out.odd, j);
    const float* const row = k.data + j * k.ld;
    for (int64_t g = 0; g < groups; ++g) {
      const F low = there ? load_some(row + g * kGroup, D - g * kGroup) : F{};
      const F high = there ? load_some(row + g * kGroup + 16, D - g * kGroup - 16) : F{};
      split_pair<true>(low, high, to + (j / 16 * groups + g) * kPieces * kTileSize + j % 16 * 16, kTileSize);
    }
  }
}

inline void split_values(const Block<float>& v, int n, int64_t Dv, float* to, SplitBlock& out) {
  constexpr int w = kLanes<float>;
  find_odd(v, n, Dv, plain_sizes, out.odd);
  out.data = to;
  for (int64_t d0 = 0; d0 < round_up(Dv, kGroup); d0 += w) {
    for (int j0 = 0; j0 < n; j0 += kGroup) {
      alignas(kVectorBytes) float first[w * w];
      F x[w];
      const auto columns = [&](int j) __attribute__((always_inline)) {
        unroll<w>([&](auto i) __attribute__((always_inline)) {
          const bool there = j + i < n && !is_odd(out.odd, j + i);
          x[i] = there ? load_some(v.data + (j + i) * v.ld + d0, Dv - d0) * splat(kLift) : F{};
        });
        transpose<float>(x);
      };
      columns(j0);
      unroll<w>([&](auto i) __attribute__((always_inline)) { store(first + i * w, x[i]); });
      columns(j0 + w);
      float* const tile = to + (d0 / w * (kKeys / kGroup) + j0 / kGroup) * kPieces * kTileSize;
      unroll<w>([&](auto i) __attribute__((always_inline)) {
        split_pair<true>(load(first + i * w), x[i], tile + i * 16, kTileSize);
      });
    }
  }
}

// --- products ------------------------------------------------------------------------------------------------

// Tiles 0 ... 3 = (a, below) B over so many groups; `below` has the 16 rows after a's.
QKV_INLINE void multiply_split(const float* a, const float* below, const float* b, int64_t groups, Ahead& next) {
  constexpr int64_t kRow = 64;  // bytes
  constexpr int kH = 0, kM = 1, kL = 2;
  unroll<4>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
  for (int64_t g = 0; g < groups; ++g) {
    fetch(next);
    const auto load_a = [&](int piece) __attribute__((always_inline)) {
      tile_load_once<4>(a + (g * kPieces + piece) * kTileSize, kRow);
      tile_load_once<5>(below + (g * kPieces + piece) * kTileSize, kRow);
    };
    const auto load_b = [&](int piece) __attribute__((always_inline)) {
      tile_load<6>(b + (g * kPieces + piece) * 2 * kTileSize, kRow);
      tile_load<7>(b + ((g * kPieces + piece) * 2 + 1) * kTileSize, kRow);
    };
    const auto dots = [&]() __attribute__((always_inline)) {
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    };
    load_a(kL);
    load_b(kH);
    dots();
    load_a(kM);
    dots();
    load_b(mutant(79) ? kH : kM);
    dots();
    load_a(kH);
    dots();
    load_b(kL);
    dots();
    load_b(kH);
    dots();
  }
}

// The four tiles as 32 rows of 32 lanes.
QKV_INLINE void store_split(float* to) {
  constexpr int64_t kRow = 128;
  tile_store<0>(to, kRow);
  tile_store<1>(to + 16, kRow);
  tile_store<2>(to + 16 * 32, kRow);
  tile_store<3>(to + 16 * 32 + 16, kRow);
}

// The scores of odd keys, and of the lanes of odd queries, in float.
template <int NV>
inline void score_odd(const Block<float>& k, const uint32_t* odd, const IntVec<float> (&lanes)[NV], const float* q,
                      int64_t D, const Visible& seen, float* s) {
  constexpr int w = kLanes<float>, L = NV * w;
  bool any_lane = false;
  for (int v = 0; v < NV; ++v) any_lane = any_lane || any(lanes[v]);
  for_rows<kMaxRows>(seen.hi - seen.lo, [&](auto R, int64_t row) __attribute__((always_inline)) {
    const int first = seen.lo + static_cast<int>(row);
    bool needed = any_lane;
    for (int r = 0; r < R; ++r) needed = needed || is_odd(odd, first + r);
    if (!needed) return;
    alignas(kVectorBytes) float exact[kMaxRows * L];
    F unused[NV] = {};
    Ahead nothing;
    score_rows<R.value, NV>(k.data + first * k.ld, k.ld, q, D, exact, unused, nothing);
    for (int r = 0; r < R; ++r) {
      const IntVec<float> key = IntVec<float>{} - is_odd(odd, first + r);
      for (int v = 0; v < NV; ++v) {
        float* const at = s + (first + r) * L + v * w;
        store(at, (key | (mutant(77) ? IntVec<float>{} : lanes[v])) != 0 ? load(exact + r * L + v * w) : load(at));
      }
    }
  });
}

// Scores of the keys that are seen.
template <int NV>
inline void score_split(const SplitBlock& k, const Block<float>& exact, const SplitQueries<NV>& q, int64_t D,
                        const Visible& seen, float* s, Ahead& next) {
  constexpr int L = NV * kLanes<float>;
  const int64_t groups = split_groups(D), rows = groups * kPieces * kTileSize;
  for (int j = seen.lo / 32 * 32; j < seen.hi; j += 32) {
    const float* const a = k.data + j / 16 * rows;
    multiply_split(a, a + rows, q.data, groups, next);
    store_split(s + j * L);
  }
  score_odd<NV>(exact, k.odd, q.odd, q.exact, D, seen, s);
}

// o += V^T P^T over the keys that are seen; `pieces` has room for those of kPassKeys weights a lane.
template <int NV>
inline void output_split(const float* v, int64_t Dv, const Visible& seen, const float* p, float* pieces, float* o,
                         Ahead& next) {
  constexpr int w = kLanes<float>, L = NV * w;
  constexpr int64_t kRows = kKeys / kGroup * kPieces * kTileSize;
  alignas(kVectorBytes) float sum[32 * L];
  for (int from = seen.lo / kPassKeys * kPassKeys; from < seen.hi; from += kPassKeys) {
    const int lo = from > seen.lo ? from : seen.lo, hi = from + kPassKeys < seen.hi ? from + kPassKeys : seen.hi;
    const int first = lo / kGroup, end = static_cast<int>(split_groups(hi));
    split_lanes<false, NV>(p + from * L, lo - from, hi - from, pieces);
    for (int64_t d = 0; d < Dv; d += 32) {
      const float* const a = v + d / 16 * kRows + first * kPieces * kTileSize;
      multiply_split(a, a + kRows, pieces + (first - from / kGroup) * kPieces * NV * kTileSize, end - first, next);
      store_split(sum);
      for (int64_t r = 0; r < (Dv - d < 32 ? Dv - d : 32); ++r) {
        unroll<NV>([&](auto i) __attribute__((always_inline)) {
          float* const at = o + (d + r) * L + i * w;
          // Not an fma: +0 and what vanishes stay +0, whether more keys follow or not.
          store(at, load(at) + load(sum + r * L + i * w) * splat(1 / kLift));
        });
      }
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
