// SPDX-License-Identifier: Apache-2.0
// Rows that will be needed soon, asked for a few lines of the cache at a time between the multiply-adds.
//
// Read on demand they stall the products. Asked for all at once they do so as well: a core has a dozen or so slots for
// misses, and once they are taken its loads wait, even those that would hit. So a loop asks, each time around, for
// about as many bytes as it reads.
#pragma once

#include "cpu/simd.h"
#include "qkv/problem.h"

namespace qkv::inline QKV_LEVEL {

constexpr int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
constexpr int64_t kLine = 64;  // bytes of the cache's

struct Ahead {
  Ahead* beside = nullptr;     // more of them
  const char* at = nullptr;    // the line to ask for next
  int64_t left = 0, rows = 0;  // lines of this row, and rows after it
  int64_t row = 0, gap = 0;    // lines of a row; bytes from its end to the next
  int64_t lines = 0;           // at a time, where a loop does not know
};

// To be asked for in so many turns.
inline Ahead ahead(const View& view, const char* first, int64_t rows, int64_t columns, int64_t turns) {
  const int64_t size = itemsize(view.dtype), step = view.s * size, bytes = columns * size;
  if (view.d != 1 || rows <= 0 || columns <= 0) return {};
  const int64_t all = step == bytes ? rows * bytes : bytes, lines = (all + kLine - 1) / kLine;
  const int64_t more = step == bytes ? 0 : rows - 1;
  return {nullptr, first, lines, more, lines, step - lines * kLine, (lines * (more + 1) + turns - 1) / turns};
}

template <int kLocality>  // 2: into L2, 3: into L1
QKV_INLINE void fetch_line(Ahead& a) {
  if (a.left == 0) return;
  __builtin_prefetch(a.at, 0, kLocality);
  a.at += kLine;
  if (--a.left > 0 || a.rows == 0) return;
  --a.rows;
  a.left = a.row;
  a.at += a.gap;
}

// Without a loop of its own: it is part of one.
template <int kLocality, int kLines>
QKV_INLINE void fetch_lines(Ahead& a) {
  if constexpr (kLines == 0) return;
  if (a.left > kLines) {
    unroll<kLines>([&](auto i) __attribute__((always_inline)) { __builtin_prefetch(a.at + i * kLine, 0, kLocality); });
    a.at += kLines * kLine;
    a.left -= kLines;
  } else if (a.left > 0) {
    unroll<kLines>([&](auto) __attribute__((always_inline)) { fetch_line<kLocality>(a); });
  }
}

QKV_INLINE void fetch_beside(Ahead& a) {
  for (Ahead* more = a.beside; more; more = more->beside) {
    for (int64_t i = 0; i < more->lines && more->left > 0; ++i) fetch_line<2>(*more);
  }
}
template <int kLocality = 2>
QKV_INLINE void fetch(Ahead& a) {
  for (int64_t i = 0; i < a.lines && a.left > 0; ++i) fetch_line<kLocality>(a);
  fetch_beside(a);
}

}  // namespace qkv::inline QKV_LEVEL
