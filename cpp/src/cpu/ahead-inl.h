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
constexpr int kIntoL2 = 2;

struct RowRange {
  const char* first = nullptr;
  int64_t n = 0;
};

struct Ahead {
  Ahead* beside = nullptr;     // more of them
  const char* at = nullptr;    // the line to ask for next
  int64_t left = 0, rows = 0;  // lines of this row, and rows after it
  int64_t row = 0, gap = 0;    // lines of a row; bytes from its end to the next
  RowRange then;               // after those
  int64_t lines = 0;           // at a time, where a loop does not know
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

// Without a loop of its own: it is part of one.
template <int kLines>
QKV_INLINE void fetch_lines(Ahead& a) {
  if constexpr (kLines == 0) return;
  if (a.left > kLines) {
    unroll<kLines>([&](auto i) __attribute__((always_inline)) { __builtin_prefetch(a.at + i * kLine, 0, kIntoL2); });
    a.at += kLines * kLine;
    a.left -= kLines;
  } else if (a.left > 0) {
    unroll<kLines>([&](auto) __attribute__((always_inline)) { fetch_line(a); });
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
// A loop that uses rows one way asks for rows that lie like them: no count of lines, no look at where a row ends.

inline Ahead rows_ahead(const View& view, RowRange rows, RowRange then, int64_t columns) {
  if (rows.n <= 0) {
    rows = then;
    then = {};
  }
  if (view.d != 1 || rows.n <= 0 || columns <= 0) return {};
  const int64_t size = itemsize(view.dtype), lines = (columns * size + kLine - 1) / kLine;
  return {nullptr, rows.first, lines, rows.n, lines, view.s * size, then, 0};
}

struct Lines {  // each time so many, `apart`; the next time `on` bytes further
  const char* at = nullptr;
  int64_t apart = 0, on = 0;
  int count = 0;
};

QKV_INLINE void ask(Lines& lines) {
  const char* at = lines.at;
  int left = lines.count;
  for (; left >= 4; left -= 4, at += 4 * lines.apart) {
    unroll<4>([&](auto i) __attribute__((always_inline)) { __builtin_prefetch(at + i * lines.apart, 0, kIntoL2); });
  }
  for (; left > 0; --left, at += lines.apart) __builtin_prefetch(at, 0, kIntoL2);
  lines.at += lines.on;
}

// A group of rows to be asked for, dealt to so many loops.
struct Shares {
  const char* at;  // of the next share
  int64_t step;    // from a row to the next
  bool run;        // one after the other in memory
  int left, each;  // rows, or lines of each row
};

// The next n rows, or as many as there are.
inline Shares take_rows(Ahead& a, int64_t n) {
  if (a.rows == 0) {
    a.at = a.then.first;
    a.rows = a.then.n;
    a.then.n = 0;
  }
  const Shares taken{a.at, a.gap, a.gap == a.row * kLine, static_cast<int>(a.rows < n ? a.rows : n), 0};
  a.at += taken.left * a.gap;
  a.rows -= taken.left;
  return taken;
}

// For loops that go along several rows at once, a line at a time: some rows each, in the order of memory if they are a
// run, which is what it likes.
inline Shares shares_of_rows(Ahead& a, int n, int loops) {
  Shares s = take_rows(a, n);
  s.each = (n + loops - 1) / loops;
  return s;
}
template <int kStep>  // bytes of each row that a loop reads at a time
QKV_INLINE Lines share_of_rows(Shares& s) {
  constexpr int kTimes = kStep < kLine ? kLine / kStep : 1;
  const int n = s.left < s.each ? s.left : s.each, part = (n + kTimes - 1) / kTimes;
  const Lines lines = s.run ? Lines{s.at, kLine, part * kLine, part} : Lines{s.at, s.step, kLine / kTimes, n};
  s.at += n * s.step;
  s.left -= n;
  return lines;
}

// For loops that go from row to row: some lines of every row each.
inline Shares shares_of_each_row(Ahead& a, int n, int loops) {
  Shares s = take_rows(a, n);
  s.left = s.left > 0 ? static_cast<int>(a.row) : 0;
  s.each = (s.left + loops - 1) / loops;
  return s;
}
QKV_INLINE Lines share_of_each_row(Shares& s) {
  const int n = s.left < s.each ? s.left : s.each;
  const Lines lines{s.at, kLine, s.step, n};
  s.at += n * kLine;
  s.left -= n;
  return lines;
}

}  // namespace qkv::inline QKV_LEVEL
