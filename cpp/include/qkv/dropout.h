// SPDX-License-Identifier: Apache-2.0
// Dropout whose mask is a function of (seed, b, h, i, j) alone: the same for any number of threads, padding, tile,
// layout and backend, and again in the backward pass. b is the batch element (flattened leading dimensions, or the
// packed sequence), h the query head, i the query and j the key, both counted within their sequence.
//
// Philox4x32-10 turns a counter of four words and a key of two into four words that pass as random; no state. The
// counter is (j / 4, i, h, b), the key is the seed, low word first, and key j takes word j mod 4.
// Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <stdint.h>

#include "qkv/platform.h"

namespace qkv {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // words below it are dropped; 0: off
  double scale = 1;        // of what is kept: 1 / (1 - dropout_p)
};

inline namespace QKV_LEVEL {

struct Philox {
  uint32_t word[4];
};

QKV_HD QKV_INLINE Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < (mutant(41) ? 1 : 10); ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    const auto a_hi = static_cast<uint32_t>(a >> 32), b_hi = static_cast<uint32_t>(b >> 32);
    c0 = b_hi ^ c1 ^ k0;
    c2 = a_hi ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of keys j ... j + 3; j is a multiple of 4.
QKV_HD QKV_INLINE Philox dropout_words(uint64_t seed, int64_t b, int64_t h, int64_t i, int64_t j) {
  return philox(static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i), static_cast<uint32_t>(h),
                static_cast<uint32_t>(b), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

QKV_HD QKV_INLINE bool dropout_keeps(const Dropout& d, int64_t b, int64_t h, int64_t i, int64_t j) {
  return dropout_words(d.seed, b, h, i, j & ~int64_t{3}).word[j & 3] >= d.threshold;
}

}  // namespace QKV_LEVEL

// 0 <= p < 1; p is met to 2^-33.
inline Dropout make_dropout(double p, uint64_t seed) {
  const double words = p * 0x1p32 + 0.5;
  return {seed, words >= 0x1p32 ? 0xffffffffu : static_cast<uint32_t>(words), 1 / (1 - p)};
}

}  // namespace qkv
