// SPDX-License-Identifier: Apache-2.0
// bfloat16 products at full rate: two neighbours along the summed index at a time, accumulated in float.
//
//     S^T = K Q^T,  o += V^T P^T      C[R rows][L] (+)= A[R rows][n pairs] B[n pairs][L], A row-major in both
//
// Layouts    K (keys, D) as it lies in memory; Q pairs along D (D / 2, L); P pairs along the keys (kKeys / 2, L), made
//            of the score tile in place; V^T (Dv, kKeys), transposed once per block and task (2 % of the products).
// Processors with a dot instruction use the micro-kernel (12 rows x 2 vectors); those with tile registers multiply
//            32 x 32 blocks: 2 x 2 tiles of C, so that each operand that is loaded is used twice.
// Numerics   The products are exact in float, sums round to nearest, subnormal operands count as 0. P is rounded to
//            bfloat16; O is divided by the sum of the rounded weights, so that they sum to 1, while the LSE comes from
//            the exact ones. Odd keys, whose value holds something not finite or below 2^-100, are multiplied in float
//            and selected: what a lane may not see must not reach it, as 0 times infinity would, and small products
//            must not vanish.
#pragma once

#include "cpu/few-inl.h"
#include "cpu/microkernel-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

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

// Keys 0 ... n - 1 of a block: in place where rows can be read as pairs, else a padded copy.
inline void load_keys(const View& view, const char* first, int n, int64_t D, float* scratch, Block<float>& out) {
  const bool whole = D % kPairColumns == 0 && (!kTileUnit || n % kPairKeys == 0);
  if (whole && view.d == 1 && view.s % 2 == 0) {
    out.pairs = reinterpret_cast<const Pair*>(first);
    out.ld = view.s / 2;
    return;
  }
  auto* copy = reinterpret_cast<uint16_t*>(scratch);
  const int64_t ld = 2 * pair_count(D);
  const auto* x = reinterpret_cast<const uint16_t*>(first);
  for (int64_t j = 0; j < round_up(n, kPairKeys); ++j) {
    for (int64_t d = 0; d < ld; ++d) copy[j * ld + d] = j < n && d < D ? x[j * view.s + d * view.d] : 0;
  }
  out.pairs = reinterpret_cast<const Pair*>(copy);
  out.ld = ld / 2;
}

// Bit j: row j of a block is one that the tile registers cannot take.
inline bool is_odd(const uint32_t* odd, int j) { return odd[j / 32] >> j % 32 & 1; }

// V^T of a block. Keys that are missing are zeros, and so are odd ones, with their bit set.
struct PairValues {
  const Pair* data;  // (Dv rounded up, kKeys / 2)
  uint32_t odd[kMaskWords];
  bool any_plain;  // else there is nothing to multiply
};

inline bool plain_halves(const uint16_t* x, int64_t stride, int64_t n) {
  typedef int16_t Halves __attribute__((vector_size(kVectorBytes)));
  constexpr int w = kVectorBytes / 2;
  constexpr int16_t kInfinity = 0x7f80, kSmall = 0x0d80;  // 2^-100
  Halves odd{};
  int64_t d = 0;
  for (; stride == 1 && d + w <= n; d += w) {
    Halves size;
    __builtin_memcpy(&size, x + d, sizeof(size));
    size &= 0x7fff;
    odd |= (size >= kInfinity) | ((size != 0) & (size < kSmall));
  }
  bool tail_odd = false;
  for (; d < n; ++d) {
    const int16_t size = x[d * stride] & 0x7fff;
    tail_odd |= size >= kInfinity || (size != 0 && size < kSmall);
  }
  const auto lanes = (IntVec<float>)odd;  // any looks at the sign of 32 bits
  return !tail_odd && !any(lanes | lanes << 16);
}

inline void load_values(const View& view, const char* first, int n, int64_t Dv, float* scratch, PairValues& out) {
  constexpr int w = kLanes<float>;
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  const auto* x = reinterpret_cast<const uint16_t*>(first);
  out.data = reinterpret_cast<const Pair*>(scratch);
  for (uint32_t& bits : out.odd) bits = 0;
  for (int j = 0; j < n; ++j) {
    if (!plain_halves(x + j * view.s, view.d, Dv)) out.odd[j / 32] |= uint32_t{1} << j % 32;
  }
  out.any_plain = false;
  for (int j = 0; j < n; ++j) out.any_plain |= !is_odd(out.odd, j);
  for (int64_t d0 = 0; d0 < Dv; d0 += w) {
    const int64_t columns = Dv - d0 < w ? Dv - d0 : w;
    for (int j0 = 0; j0 < kKeys; j0 += 2 * w) {
      F pairs[w];
      unroll<w>([&](auto t) __attribute__((always_inline)) {
        IntVec<float> halves[2];
        for (int h = 0; h < 2; ++h) {
          const int j = j0 + 2 * t + h;
          Halves row{};
          if (j < n && !is_odd(out.odd, j)) {
            const uint16_t* from = x + j * view.s + d0 * view.d;
            if (view.d == 1 && columns == w) {
              __builtin_memcpy(&row, from, sizeof(row));
            } else {
              for (int64_t d = 0; d < columns; ++d) row[d] = from[d * view.d];
            }
          }
          halves[h] = __builtin_convertvector(row, IntVec<float>);
        }
        pairs[t] = (F)(halves[0] | halves[1] << 16);
      });
      transpose<float>(pairs);
      unroll<w>([&](auto i)
                    __attribute__((always_inline)) { store(scratch + (d0 + i) * (kKeys / 2) + j0 / 2, pairs[i]); });
    }
  }
}

// P^T of keys lo ... hi - 1, a multiple of kPairKeys around them, becomes pairs in place; sum[lane] gains what the
// rounded weights sum to.
template <int NV>
inline void pack_weights(int lo, int hi, float* s, F (&sum)[NV]) {
  constexpr int w = kLanes<float>;
  const int first = lo / kPairKeys * kPairKeys, end = static_cast<int>(round_up(hi, kPairKeys));
  const int inside = lo + (lo & 1), outside = hi & ~1;  // from and up to which both keys of a pair are there
  const auto pack = [&](int j, const auto& weight) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      const F pair = round_pair(weight(j, v), weight(j + 1, v));
      store(s + (j / 2 * NV + v) * w, pair);
      sum[v] += low_half(pair) + high_half(pair);
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

// o[d][lane] += the sum of p v over the odd keys, for the lanes that see some; value(key, d) is v. The sum is added as
// a whole, as that of a block's other keys is, and eight columns are summed at once, so that fma need not wait.
template <int NV, class Value>
inline void add_odd_values(const uint32_t* odd, const Visible& seen, int64_t Dv, const float* p, float* o,
                           const Value& value) {
  constexpr int w = kLanes<float>, kColumns = 8;
  int key[kKeys], n = 0;
  IntVec<float> sees[kKeys][NV], some[NV] = {};
  for (int j = seen.lo; j < seen.hi; ++j) {
    if (!is_odd(odd, j)) continue;
    for (int v = 0; v < NV; ++v) {
      for (int i = 0; i < w; ++i) sees[n][v][i] = !seen.partial || seen.bits[j] >> (v * w + i) & 1 ? -1 : 0;
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
          const F more = fma(load(p + (key[i] * NV + v) * w), x, sum[t][v]);
          sum[t][v] = sees[i][v] != 0 ? more : sum[t][v];
        }
      }
    }
    for (int t = 0; t < kColumns && d + t < Dv; ++t) {
      for (int v = 0; v < NV; ++v) {
        float* const at = o + ((d + t) * NV + v) * w;
        store(at, some[v] != 0 ? load(at) + sum[t][v] : load(at));
      }
    }
  }
}

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

// Scores of keys lo ... hi - 1; top[lane] = max(top, s).
template <int NV>
inline void score_pairs(const Block<float>& k, const float* q, int64_t D, int lo, int hi, float* s, F (&top)[NV],
                        Ahead& next) {
  constexpr int w = kLanes<float>, L = NV * w;
  if constexpr (kTileUnit) {
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
    for_rows(hi - lo, [&](auto R, int64_t j) __attribute__((always_inline)) {
      fetch_beside(next);
      score_rows<R.value, NV>(k.pairs + (lo + j) * k.ld, k.ld, q, pair_count(D), s + (lo + j) * L, top, next);
    });
  }
}

// o += V^T P^T over the keys around lo ... hi - 1 that pack_weights packed. O has Dv rows, rounded up to 16.
template <int NV>
inline void output_pairs(const Pair* v, int64_t Dv, int lo, int hi, const float* p, float* o, Ahead& next) {
  constexpr int L = NV * kLanes<float>;
  constexpr int64_t ld = kKeys / 2;
  const int64_t first = lo / kPairKeys * kPairKeys / 2, end = round_up(hi, kPairKeys) / 2;
  if constexpr (kTileUnit) {
    constexpr int64_t row = L * 4;
    for (int64_t d = 0; d < Dv; d += 32) {
      fetch(next);
      const bool both = Dv - d > 16;
      unroll<4>([&](auto c) __attribute__((always_inline)) { tile_zero<c.value>(); });
      for (int64_t j = first; j < end; j += 16) {
        tile_load_once<4>(v + d * ld + j, ld * 4);
        tile_load<6>(p + j * L, row);
        tile_dot<0, 4, 6>();
        tile_load<7>(p + j * L + 16, row);
        tile_dot<1, 4, 7>();
        if (!both) continue;
        tile_load_once<5>(v + (d + 16) * ld + j, ld * 4);
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
    for_rows(Dv, [&](auto R, int64_t d) __attribute__((always_inline)) {
      fetch_beside(next);
      output_rows<Layout::RowMajor, R.value, NV>(v + d * ld + first, ld, p + first * L, end - first, o + d * L, next);
    });
  }
}

}  // namespace qkv::inline QKV_LEVEL
