// SPDX-License-Identifier: Apache-2.0
// Values that are not finite beside masked keys, in the tiles of forward_mma.cuh (guard-inl.h on the CPU).
//
// 0 times NaN is NaN: where a row must not see a key whose value is not finite, that value becomes 0 for the product,
// and the rows that see it get it afterwards. (A weight that is 0 by underflow lets it through, as in exact
// arithmetic.)
#pragma once

#include "portable/forward_mma.cuh"

namespace qkv::inline QKV_LEVEL {

template <class M>
QKV_DEVICE bool not_finite(uint32_t x) {
  constexpr uint32_t kExponent = M::T::kDType == DType::f16 ? 0x7c00 : 0x7f80;
  return (x & kExponent) == kExponent;
}

// The chunks of one of so many threads.
template <class M>
QKV_DEVICE bool finite_tile(const char* v, int thread, int threads) {
  uint32_t sum[4] = {};
  for (int i = thread; i < M::kKeys * (M::kD / 8); i += threads) {
    const auto* x = reinterpret_cast<const Chunk<uint32_t>*>(v)[i].x;
    for (int e = 0; e < 4; ++e) sum[e] = add_zeros<typename M::T>(sum[e], x[e]);
  }
  return ((sum[0] | sum[1] | sum[2] | sum[3]) & 0x7fff7fff) == 0;
}

// By `threads` threads, which sync() brings together.
template <class M, class Sync>
QKV_DEVICE void take_out_odd(char* v, uint32_t (&odd)[3][M::kD][mask_words(M::kKeys)], int thread, int threads,
                             const Sync& sync) {
  constexpr uint32_t kMantissa = M::T::kDType == DType::f16 ? 0x3ff : 0x7f;
  constexpr int kWords = mask_words(M::kKeys);
  auto* const words = reinterpret_cast<uint32_t*>(odd);
  for (int i = thread; i < 3 * M::kD * kWords; i += threads) words[i] = 0;
  sync();
  QKV_ROLLED
  for (int i = thread; i < M::kKeys * M::kD; i += threads) {
    const int key = i / M::kD, column = i % M::kD;
    auto* x = reinterpret_cast<uint16_t*>(v + chunk_offset<M>(key, column / 8, M::kKeys)) + column % 8;
    if (!not_finite<M>(*x)) continue;
    const int kind = (*x & kMantissa) != 0 ? 0 : (*x & 0x8000 ? 2 : 1);
    atomic_or(&odd[kind][column][key / 32], 1u << (key % 32));
    *x = 0;
  }
  sync();
}

// What the keys that a row sees add to a column beside finite numbers: 1 for +inf, 2 for -inf, 3 for NaN.
template <class M>
QKV_DEVICE uint32_t odd_sum(const Seen<M>& seen, const Place& at, int row, int column) {
  uint32_t any[3] = {};
  QKV_ROLLED
  for (int w = at.key0 / 32; w * 32 < at.key0 + M::kWarpKeys; ++w) {  // the keys of this warp alone
    const uint32_t own = M::kWarpKeys >= 32 ? ~0u : ((1u << (M::kWarpKeys % 32)) - 1) << (at.key0 % 32);
    const uint32_t sees = seen.bits[row][w] & ~seen.gone[row][w] & own;
    for (int kind = 0; kind < 3; ++kind) any[kind] |= sees & seen.odd[kind][column][w];
  }
  return any[0] ? 3 : (any[1] ? 1 : 0) | (any[2] ? 2 : 0);
}

// Which of 32 keys from j0 on, of those that a row sees, has a bias of -inf?
template <int R>
QKV_DEVICE uint32_t hidden_by_bias(const Problem& p, const Lanes<R>& lanes, int row, int64_t j0, uint32_t seen) {
  uint32_t hidden = 0;
  QKV_ROLLED
  for (int t = 0; t < 32 && p.bias.data && seen >> t; ++t) {
    if (!(seen >> t & 1)) continue;
    const int64_t at = lanes.bias[row] + bias_column(p, lanes.position[row], j0 + t);
    hidden |= static_cast<uint32_t>(load_as<float>(p.bias.data, p.bias.dtype, at) == -kInf<float>) << t;
  }
  return hidden;
}

template <class M>
QKV_DEVICE void put_back_odd(const Seen<M>& seen, const Place& at, Rows<M>& rows) {
  constexpr float inf = kInf<float>;
  constexpr int kEach = 8;  // tiles of columns, two columns of this thread in each: 2 bits for each column
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    QKV_UNROLL
    for (int d = 0; d < M::kColumnTiles; d += kEach) {
      uint32_t sums = 0;
      QKV_ROLLED
      for (int n = 0; n < kEach * 2; ++n) {
        const int row = at.row0 + i / 2 * 16 + i % 2 * 8 + at.g, column = (d + n / 2) * 8 + at.t * 2 + n % 2;
        sums |= odd_sum(seen, at, row, column) << (n * 2);
      }
      QKV_UNROLL
      for (int n = 0; n < kEach * 2; ++n) {
        float& o = rows.o[i / 2][d + n / 2][i % 2 * 2 + n % 2];
        if (sums >> (n * 2) & 1) o += inf;
        if (sums >> (n * 2) & 2) o -= inf;
      }
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
