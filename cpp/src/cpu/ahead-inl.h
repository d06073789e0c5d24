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

constexpr int64_t round_up(int64_t n, int64_t m) {  // n >= 0: unsigned, what is asked of powers of two is a mask
  const auto to = static_cast<uint64_t>(m);
  return static_cast<int64_t>((static_cast<uint64_t>(n) + to - 1) / to * to);
}
constexpr int64_t kLine = 64;  // bytes of the cache's
constexpr int kIntoL2 = 2;

struct RowRange {
  const char* first = nullptr;
  int64_t n = 0;
};

struct Ahead {
  Ahead* beside = nullptr;        // more of them
  const char* at = nullptr;       // the line to ask for next
  int64_t left = 0, rows = 0;     // lines of this row, and rows after it
  int64_t row = 0, gap = 0;       // lines of a row; bytes from its end to the next
  RowRange then;                  // after those
  int64_t lines = 0;              // at a time, where a loop does not know
  int64_t columns = 0, size = 0;  // of a row, by rows: see there
  int64_t again = 0;              // bytes from a line to another that is asked for with it
};

// Rows and then others, to be asked for in so many turns.
inline Ahead ahead(const View& view, RowRange rows, RowRange then, int64_t columns, int64_t turns) {
  const int64_t size = itemsize(view.dtype), step = view.s * size, bytes = columns * size;
  if (then.first == rows.first + rows.n * step) {
    rows.n += then.n;
    then = {};
  }
  if (rows.n <= 0) {
    rows = then;
    then = {};
  }
  if (view.d != 1 || rows.n <= 0 || columns <= 0) return {};
  const bool one = step == bytes && then.n == 0;  // run of memory
  const int64_t lines = ((one ? rows.n * bytes : bytes) + kLine - 1) / kLine, more = one ? 0 : rows.n - 1;
  const int64_t all = lines * (1 + more + then.n);
  return {nullptr, rows.first, lines, more, lines, step - lines * kLine, then, (all + turns - 1) / turns};
}

QKV_INLINE void fetch_line(Ahead& a) {
  if (a.left == 0) return;
  __builtin_prefetch(a.at, 0, kIntoL2);
  a.at += kLine;
  if (--a.left > 0) return;
  a.at += a.gap;
  if (a.rows == 0) {
    a.at = a.then.first;
    a.rows = a.then.n;
    a.then.n = 0;
  }
  if (a.rows == 0) return;
  --a.rows;
  a.left = a.row;
}

// A number of lines that the compiler knows.
QKV_INLINE void fetch_lines(Ahead& a, int lines) {
  if (lines == 0) return;
  if (a.left > lines) {
    QKV_FLAT
    for (int i = 0; i < lines; ++i) __builtin_prefetch(a.at + i * kLine, 0, kIntoL2);
    a.at += lines * kLine;
    a.left -= lines;
  } else if (a.left > 0) {
    QKV_FLAT
    for (int i = 0; i < lines; ++i) fetch_line(a);
  }
}

QKV_INLINE void fetch_beside(Ahead& a) {
  for (Ahead* more = a.beside; more; more = more->beside) {
    for (int64_t i = 0; i < more->lines && more->left > 0; ++i) fetch_line(*more);
  }
}
QKV_INLINE void fetch(Ahead& a) {
  for (int64_t i = 0; i < a.lines && a.left > 0; ++i) fetch_line(a);
  fetch_beside(a);
}

// --- by rows -------------------------------------------------------------------------------------------------
// A loop that goes along rows asks for rows that lie like them, a line for each that it loads: no count of lines, no
// look at where a row ends.

inline Ahead rows_ahead(const View& view, RowRange rows, RowRange then, int64_t columns) {
  if (rows.n <= 0) {
    rows = then;
    then = {};
  }
  if (view.d != 1 || rows.n <= 0 || columns <= 0) return {};
  const int64_t size = itemsize(view.dtype);
  Ahead a;
  a.at = rows.first;
  a.rows = rows.n;
  a.gap = view.s * size;
  a.then = then;
  a.size = size;
  a.columns = columns;
  return a;
}

// The first of the next n rows, or of as many as there are; nullptr if there are none.
inline const char* take_rows(Ahead& a, int64_t n) {
  if (a.rows == 0) {
    a.at = a.then.first;
    a.rows = a.then.n;
    a.then.n = 0;
  }
  if (a.rows == 0) return nullptr;
  const char* const first = a.at;
  if (n > a.rows) n = a.rows;
  a.at += n * a.gap;
  a.rows -= n;
  return first;
}

// One by one, between the loads that they must not hold up. `Times`: a busy processor drops some of what it is asked
// for, so a line may be asked for several times, as it comes nearer by `again` bytes.
template <int Times>
QKV_INLINE void ask(const char*& line, int64_t apart, int64_t again) {
  unroll<Times>([&](auto i) __attribute__((always_inline)) { __builtin_prefetch(line + i * again, 0, kIntoL2); });
  line += apart;
  forget(line);
}

}  // namespace qkv::inline QKV_LEVEL
