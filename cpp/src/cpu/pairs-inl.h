// SPDX-License-Identifier: Apache-2.0
// bfloat16 products at full rate: two neighbours along the summed index at a time, accumulated in float.
//
//     S^T = K Q^T,  o += V^T P^T      C[R rows][L] (+)= A[R rows][n pairs] B[n pairs][L], A row-major in both
//     o += P V      by dots for one vector of rows: A is P^T, B pairs of rows of V
//
// Operands   pair-operands-inl.h has their layouts and what is odd.
// Processors with a dot instruction use the micro-kernel (12 rows x 2 vectors); those with tile registers multiply
//            32 x 32 blocks: 2 x 2 tiles of C, so that each operand that is loaded is used twice.
//            A single vector of rows leaves V as it lies: a pair of keys is two shuffles of their rows, which serve all
//            rows of O (output_by_rows).
// Few tiles  of one vector of rows (up to kPartRows rows, by tile registers): pair-rows-inl.h.
// Numerics   The products are exact in float, sums round to nearest, subnormal operands count as 0.
#pragma once

#include "cpu/microkernel-inl.h"
#include "cpu/pair-rows-inl.h"

namespace qkv::inline QKV_LEVEL {

// top[lane] = max(top, scores of keys lo ... hi - 1).
template <int NV>
inline void find_top(const float* s, int lo, int hi, F (&top)[NV]) {
  constexpr int w = kLanes<float>;
  constexpr int kChains = 4;  // of maxima, each waiting for itself alone
  F best[kChains][NV];
  unroll<kChains>([&](auto c) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) { best[c][v] = top[v]; });
  });
  for (int j = lo; j < hi; j += kChains) {
    unroll<kChains>([&](auto c) __attribute__((always_inline)) {
      const float* row = s + (j + c < hi ? j + c : hi - 1) * NV * w;
      unroll<NV>([&](auto v) __attribute__((always_inline)) { best[c][v] = maximum(best[c][v], load(row + v * w)); });
    });
  }
  unroll<NV>([&](auto v) __attribute__((always_inline)) {
    top[v] = maximum(maximum(best[0][v], best[1][v]), maximum(best[2][v], best[3][v]));
  });
}

// Scores of keys lo ... hi - 1; top[lane] = max(top, s), unless keys have fewer lanes than a vector.
template <int NV>
inline void score_pairs(const Block<float>& k, const float* q, int64_t D, const Visible& seen, int lanes, float* s,
                        F (&top)[NV], Ahead& next) {
  constexpr int w = kLanes<float>, L = NV * w;
  const int lo = seen.lo, hi = seen.hi;
  if constexpr (kTileUnit && NV == 1) {
    score_pairs_by_rows(k, q, D, lo, hi, lanes, s, next);
    if (lanes == w) find_top<NV>(s, lo, hi, top);
  } else if constexpr (kTileUnit) {
    constexpr int64_t row = L * 4;
    for (int j = lo / 32 * 32; j < hi; j += 32) {
      fetch(next);
      unroll<4>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
      const Pair* key = k.pairs + j * k.ld;
      for (int64_t d = 0; d < pair_count(D); d += 16) {
        tile_load_once<4>(key + d, k.ld * 4);
        tile_load<6>(q + d * L, row);
        tile_dot<0, 4, 6>();
        tile_load<7>(q + d * L + 16, row);
        tile_dot<1, 4, 7>();
        tile_load_once<5>(key + 16 * k.ld + d, k.ld * 4);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
      tile_store<0>(s + j * L, row);
      tile_store<1>(s + j * L + 16, row);
      tile_store<2>(s + (j + 16) * L, row);
      tile_store<3>(s + (j + 16) * L + 16, row);
    }
    find_top<NV>(s, lo, hi, top);
  } else {
    for_rows<kMaxRows>(hi - lo, [&](auto R, int64_t j) __attribute__((always_inline)) {
      fetch_beside(next);
      score_rows<R.value, NV>(k.pairs + (lo + j) * k.ld, k.ld, q, pair_count(D), s + (lo + j) * L, top, next);
    });
  }
}

// o += V^T P^T over the keys around lo ... hi - 1 that pack_weights packed. O has Dv rows, rounded up to 16.
template <int NV>
inline void output_pairs(const Pair* v, int64_t Dv, int lo, int hi, float* p, float* o, Ahead& next) {
  constexpr int L = NV * kLanes<float>;
  const int64_t first = lo / kPairKeys * kPairKeys / 2, end = round_up(hi, kPairKeys) / 2;
  if constexpr (kTileUnit) {
    constexpr int64_t row = L * 4;
    for (int64_t d = 0; d < Dv; d += 32) {
      fetch(next);
      const bool both = Dv - d > 16;
      unroll<4>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
      for (int64_t j = first; j < end; j += 16) {
        tile_load_once<4>(v + value_pairs_at(d, 2 * j), kTileBytes);
        tile_load<6>(p + j * L, row);
        tile_dot<0, 4, 6>();
        tile_load<7>(p + j * L + 16, row);
        tile_dot<1, 4, 7>();
        if (!both) continue;
        tile_load_once<5>(v + value_pairs_at(d + 16, 2 * j), kTileBytes);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
      alignas(kVectorBytes) float sum[32 * L];  // o itself may be subnormal, which the registers take for 0
      tile_store<0>(sum, row);
      tile_store<1>(sum + 16, row);
      tile_store<2>(sum + 16 * L, row);
      tile_store<3>(sum + 16 * L + 16, row);
      for (int64_t i = 0; i < (Dv - d < 32 ? Dv - d : 32) * L; i += kLanes<float>) {
        store(o + d * L + i, load(o + d * L + i) + load(sum + i));
      }
    }
  } else {
    for_rows<kMaxRows>(Dv, [&](auto R, int64_t d) __attribute__((always_inline)) {
      constexpr int64_t ld = kKeys / 2;
      fetch_beside(next);
      output_rows<Layout::RowMajor, R.value, NV>(v + d * ld + first, ld, p + first * L, end - first, o + d * L, next);
    });
  }
}

// --- one vector of rows, by dots -----------------------------------------------------------------------------

// Rows of V as B: 32 columns of two keys are two vectors of pairs, kShares products share what they ask for.
template <int kShares>
struct PairedRows {
  const uint16_t* data;
  int64_t ld;
  static constexpr int64_t kBytes = 2 * kVectorBytes / kShares;
  QKV_INLINE F at(int64_t k, int v) const {
    const F even = load(reinterpret_cast<const float*>(data + 2 * k * ld));
    const F odd = load(reinterpret_cast<const float*>(data + (2 * k + 1) * ld));
    return v == 0 ? low_pairs(even, odd) : high_pairs(even, odd);
  }
  QKV_INLINE void on(int64_t pairs) { data += 2 * pairs * ld; }
};

// Rows r0 ... r0 + R - 1 of O += P V, 32 columns of it from d on.
template <int R, int kShares>
QKV_INLINE void output_pairs_by_rows(Rows<const uint16_t> v, const Pair* p, int64_t pairs, int64_t d, int r0,
                                     const Output& o, Ahead& next) {
  constexpr int w = kLanes<float>;
  Accumulators<float, R, 2> acc;
  clear<R, 2, float>(acc);
  multiply<Layout::Transposed, R, 2, float>(p + r0, w, PairedRows<kShares>{v.data + d, v.ld}, pairs, acc, next);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    float* const to = o.data + (r0 + r) * o.ld + d;
    if (r0 + r >= o.rows) return;
    store(to, load(to) + in_turn<float, false, 4>(acc[r][0], acc[r][1]));
    if (d + w < o.ld) store(to + w, load(to + w) + in_turn<float, true, 4>(acc[r][0], acc[r][1]));
  });
}

// o += P V over the keys around lo ... hi - 1 that pack_weights packed.
inline void output_by_rows(Rows<const uint16_t> v, int64_t Dv, int lo, int hi, const float* p, const Output& o,
                           Ahead& next) {
  const int first = lo / kPairKeys, pairs = static_cast<int>(round_up(hi, kPairKeys) / kPairKeys) - first;
  const auto* const weights = reinterpret_cast<const Pair*>(p) + first * kLanes<float>;
  const Rows<const uint16_t> rows{v.data + first * kPairKeys * v.ld, v.ld};
  for (int64_t d = 0; d < Dv; d += kManyHalves) {
    fetch_beside(next);
    if (o.rows <= kMaxRows) {
      output_pairs_by_rows<kMaxRows, 1>(rows, weights, pairs, d, 0, o, next);
    } else {
      for (int r = 0; r < o.rows; r += 8) output_pairs_by_rows<8, 2>(rows, weights, pairs, d, r, o, next);
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
