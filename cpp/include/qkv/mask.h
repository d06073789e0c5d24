// SPDX-License-Identifier: Apache-2.0
// Masks as small programs, the same text for CPU and GPU.
//
// A mask is a boolean function visible(p, j) of the absolute position p of a query and the position j of a key.
// Python turns a mask object into a postfix list of MaskNode; leaves are the functions below, & | ~ combine them.
// Kernels ask two questions:
//   mask_cover(...)  is a whole rectangle of (p, j) visible, hidden, or mixed?   -> skip, run free, look closer
//   mask_bits(...)   which of the 32 keys j0 ... j0+31 does position p see?      -> one word, bit t is key j0 + t
// cover may answer Some when it does not know; None and All are promises.
#pragma once

#include <stdint.h>

#include "qkv/platform.h"

namespace qkv {

constexpr int64_t kUnbounded = int64_t{1} << 62;
constexpr int kMaskStack = 16;   // depth a program may need
constexpr int kMaskNodes = 256;  // length of a program

enum class MaskOp : int32_t {
  All = 0,
  Band = 1,           // p - a <= j <= p + b; causal is Band(kUnbounded, 0)
  Prefix = 2,         // j < a
  Lengths = 3,        // j < data[batch], or data[0] when there is one entry
  Document = 4,       // data[p] == data[j], both in range
  Global = 5,         // j in data or p in data; data is sorted
  Strided = 6,        // (p - j) mod a == 0
  Dilated = 7,        // |p - j| <= a b and (p - j) mod b == 0
  BlockSparse = 8,    // data[p / a][j / a] != 0, b columns, in range
  Tree = 9,           // tin[j] <= tin[p] < tout[j]: j is p or an ancestor of p; data = tin(a), tout(a)
  Neighborhood = 10,  // data = ndim, shape, kernel, dilation: NATTEN's clamped windows, axis by axis
  And = 20,
  Or = 21,
  Not = 22,
};

struct MaskNode {
  MaskOp op;
  int64_t a, b;
  const int64_t* data;  // (n,)
  int64_t n;
};

struct MaskProgram {
  const MaskNode* nodes;  // (n,) in postfix order
  int n;                  // 0: everything is visible
};

enum class Cover : int32_t { None = 0, All = 1, Some = 2 };

inline namespace QKV_LEVEL {

struct Rect {  // positions p0..p1 and keys j0..j1, all inclusive
  int64_t p0, p1, j0, j1;
};

// a + b without wrapping: offsets come from the user.
QKV_HD QKV_INLINE int64_t saturating_add(int64_t a, int64_t b) {
  const int64_t s = static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  const bool wrapped = ((a ^ s) & (b ^ s)) < 0;  // both have the other sign (nvcc lacks GCC's checked addition)
  return wrapped ? (a > 0 ? INT64_MAX : INT64_MIN) : s;
}

QKV_HD QKV_INLINE int64_t floor_mod(int64_t x, int64_t m) {
  const int64_t r = x % m;
  return r < 0 ? r + m : r;
}

// First index of the sorted data whose value is >= x.
QKV_HD inline int64_t lower_bound(const MaskNode& node, int64_t x) {
  int64_t lo = 0, hi = node.n;
  QKV_ROLLED
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (node.data[mid] < x) lo = mid + 1;
    else hi = mid;
  }
  return lo;
}

QKV_HD inline bool contains(const MaskNode& node, int64_t x) {
  const int64_t i = lower_bound(node, x);
  return i < node.n && node.data[i] == x;
}

QKV_HD inline bool neighbor(const MaskNode& node, int64_t p, int64_t j) {
  const int64_t ndim = node.data[0];
  const int64_t *shape = node.data + 1, *kernel = shape + ndim, *dilation = kernel + ndim;
  int64_t total = 1;
  QKV_ROLLED
  for (int64_t t = 0; t < ndim; ++t) total *= shape[t];
  if (p < 0 || p >= total || j < 0 || j >= total) return false;
  QKV_ROLLED
  for (int64_t t = ndim - 1; t >= 0; --t) {
    const int64_t x = p % shape[t], y = j % shape[t], d = dilation[t];
    p /= shape[t];
    j /= shape[t];
    if (x % d != y % d) return false;
    const int64_t size = (shape[t] - x % d + d - 1) / d;  // members of the dilation group of x
    int64_t start = x / d - kernel[t] / 2;                // window in group coordinates, shifted inwards
    if (start > size - kernel[t]) start = size - kernel[t];
    if (start < 0) start = 0;
    if (y / d < start || y / d >= start + kernel[t]) return false;
  }
  return true;
}

// Leaves of whose keys nothing is known but one by one.
QKV_HD inline bool scattered_visible(const MaskNode& m, int64_t p, int64_t j) {
  switch (m.op) {
    case MaskOp::Strided: return floor_mod(p - j, m.a) == 0;
    case MaskOp::Dilated: {
      const int64_t d = p - j, reach = m.a > kUnbounded / m.b ? kUnbounded : m.a * m.b;
      return d <= reach && d >= -reach && floor_mod(d, m.b) == 0;
    }
    case MaskOp::Tree: return p >= 0 && p < m.a && j < m.a && m.data[j] <= m.data[p] && m.data[p] < m.data[m.a + j];
    case MaskOp::Neighborhood: return neighbor(m, p, j);
    default: return true;
  }
}

QKV_HD QKV_INLINE int64_t block_rows(const MaskNode& m) { return m.b > 0 ? m.n / m.b : 0; }
QKV_HD QKV_INLINE bool in_block_rows(const MaskNode& m, int64_t p) { return p >= 0 && p / m.a < block_rows(m); }

QKV_HD inline bool leaf_visible(const MaskNode& m, int64_t batch, int64_t p, int64_t j) {
  switch (m.op) {
    case MaskOp::Band: return j >= saturating_add(p, -m.a) && j <= saturating_add(p, m.b);
    case MaskOp::Prefix: return j < m.a;
    case MaskOp::Lengths: return j < m.data[m.n == 1 ? 0 : batch];
    case MaskOp::Document: return p >= 0 && p < m.n && j < m.n && m.data[p] == m.data[j];
    case MaskOp::Global: return contains(m, j) || contains(m, p);
    case MaskOp::BlockSparse: {
      const int64_t column = j / m.a;
      return in_block_rows(m, p) && column < m.b && m.data[p / m.a * m.b + column] != 0;
    }
    default: return scattered_visible(m, p, j);
  }
}

// Bits for the keys lo <= j <= hi of the word that starts at j0.
QKV_HD QKV_INLINE uint32_t range_bits(int64_t lo, int64_t hi, int64_t j0) {
  if (hi < j0 || lo > j0 + 31 || lo > hi) return 0;
  const int first = lo <= j0 ? 0 : static_cast<int>(lo - j0);
  const int last = hi >= j0 + 31 ? 31 : static_cast<int>(hi - j0);
  return (~uint32_t{0} >> (31 - last)) & (~uint32_t{0} << first);
}

QKV_HD inline uint32_t leaf_bits(const MaskNode& m, int64_t batch, int64_t p, int64_t j0) {
  switch (m.op) {
    case MaskOp::All: return ~uint32_t{0};
    case MaskOp::Band: return range_bits(saturating_add(p, -m.a - mutant(4)), saturating_add(p, m.b + mutant(3)), j0);
    case MaskOp::Prefix: return range_bits(0, m.a - 1, j0);
    case MaskOp::Lengths: return range_bits(0, m.data[m.n == 1 ? 0 : batch] - 1, j0);
    case MaskOp::Global: {
      if (contains(m, p)) return ~uint32_t{0};
      uint32_t bits = 0;
      QKV_ROLLED
      for (int64_t i = lower_bound(m, j0); i < m.n && m.data[i] <= j0 + 31; ++i) {
        bits |= uint32_t{1} << (m.data[i] - j0);
      }
      return bits;
    }
    case MaskOp::Document: {
      if (p < 0 || p >= m.n) return 0;
      const int64_t count = m.n - j0 < 32 ? m.n - j0 : 32, id = m.data[p];
      uint32_t bits = 0;
      QKV_ROLLED
      for (int t = 0; t < count; ++t) bits |= static_cast<uint32_t>(m.data[j0 + t] == id) << t;
      return bits;
    }
    case MaskOp::BlockSparse: {
      if (!in_block_rows(m, p)) return 0;
      uint32_t bits = 0;
      int64_t column = j0 / m.a;
      const int64_t* const kept = m.data + p / m.a * m.b;
      QKV_ROLLED
      for (int64_t first = column * m.a; column < m.b && first <= j0 + 31; first += m.a, ++column) {
        if (kept[column] != 0) bits |= range_bits(first, first + m.a - 1, j0);
      }
      return bits;
    }
    default: {
      uint32_t bits = 0;
      QKV_ROLLED
      for (int t = 0; t < 32; ++t) bits |= static_cast<uint32_t>(scattered_visible(m, p, j0 + t)) << t;
      return bits;
    }
  }
}

// A program's word, from those of its leaves.
template <class Leaf>
QKV_HD QKV_INLINE uint32_t combine_bits(const MaskProgram& program, const Leaf& leaf) {
  uint32_t stack[kMaskStack];
  int top = -1;
  QKV_ROLLED
  for (int i = 0; i < program.n; ++i) {
    const MaskNode& m = program.nodes[i];
    switch (m.op) {
      case MaskOp::And:
        --top;
        stack[top] &= stack[top + 1];
        break;
      case MaskOp::Or:
        --top;
        stack[top] |= stack[top + 1];
        break;
      case MaskOp::Not: stack[top] = ~stack[top]; break;
      default: stack[++top] = leaf(m);
    }
  }
  return stack[0];
}

// Keys at or beyond the end of the sequence are the caller's to cut off.
QKV_HD inline uint32_t mask_bits(const MaskProgram& program, int64_t batch, int64_t p, int64_t j0) {
  if (program.n == 0) return ~uint32_t{0};
  return combine_bits(program, [&](const MaskNode& m) { return leaf_bits(m, batch, p, j0); });
}

QKV_HD QKV_INLINE Cover range_cover(int64_t all_lo, int64_t all_hi, const Rect& r, bool disjoint) {
  if (disjoint) return Cover::None;
  return r.j0 >= all_lo && r.j1 <= all_hi ? Cover::All : Cover::Some;
}

struct IdRange {
  int64_t lo, hi;
};

QKV_HD inline IdRange id_range(const int64_t* ids, int64_t first, int64_t last) {
  IdRange r{ids[first], ids[first]};
  QKV_ROLLED
  for (int64_t i = first + 1; i <= last; ++i) {
    if (ids[i] < r.lo) r.lo = ids[i];
    if (ids[i] > r.hi) r.hi = ids[i];
  }
  return r;
}

QKV_HD inline Cover document_cover(const MaskNode& m, const Rect& r) {
  const int64_t p0 = r.p0 < 0 ? 0 : r.p0, p1 = r.p1 >= m.n ? m.n - 1 : r.p1;
  const int64_t j1 = r.j1 >= m.n ? m.n - 1 : r.j1;
  if (p0 > p1 || r.j0 > j1) return Cover::None;
  const IdRange p = id_range(m.data, p0, p1), j = id_range(m.data, r.j0, j1);
  if (p.hi < j.lo || j.hi < p.lo) return Cover::None;
  const bool whole = p0 == r.p0 && p1 == r.p1 && j1 == r.j1;
  return whole && p.lo == p.hi && j.lo == j.hi && p.lo == j.lo ? Cover::All : Cover::Some;
}

QKV_HD inline Cover block_cover(const MaskNode& m, const Rect& r) {
  const int64_t rows = block_rows(m);
  bool any = false, all = r.p0 >= 0 && r.p1 / m.a < rows && r.j1 / m.a < m.b;
  const int64_t last_row = r.p1 / m.a < rows ? r.p1 / m.a : rows - 1;
  const int64_t last_col = r.j1 / m.a < m.b ? r.j1 / m.a : m.b - 1;
  QKV_ROLLED
  for (int64_t row = r.p0 < 0 ? 0 : r.p0 / m.a; r.p1 >= 0 && row <= last_row; ++row) {
    QKV_ROLLED
    for (int64_t col = r.j0 / m.a; col <= last_col; ++col) {
      if (m.data[row * m.b + col] != 0) any = true;
      else all = false;
    }
  }
  return any ? (all ? Cover::All : Cover::Some) : Cover::None;
}

QKV_HD inline Cover leaf_cover(const MaskNode& m, int64_t batch, const Rect& r) {
  switch (m.op) {
    case MaskOp::All: return Cover::All;
    case MaskOp::Band:
      return range_cover(saturating_add(r.p1, -m.a), saturating_add(r.p0, m.b), r,
                         r.j1 < saturating_add(r.p0, -m.a) || r.j0 > saturating_add(r.p1, m.b));
    case MaskOp::Prefix: return range_cover(0, m.a - 1, r, r.j0 >= m.a);
    case MaskOp::Lengths: {
      const int64_t n = m.data[m.n == 1 ? 0 : batch];
      return range_cover(0, n - 1, r, r.j0 >= n);
    }
    case MaskOp::Document: return document_cover(m, r);
    case MaskOp::Global: {
      const int64_t p = lower_bound(m, r.p0), j = lower_bound(m, r.j0);
      const bool some_p = p < m.n && m.data[p] <= r.p1, some_j = j < m.n && m.data[j] <= r.j1;
      return some_p || some_j ? Cover::Some : Cover::None;
    }
    case MaskOp::Dilated: {
      const int64_t reach = m.a > kUnbounded / m.b ? kUnbounded : m.a * m.b;
      const bool disjoint = r.j1 < saturating_add(r.p0, -reach) || r.j0 > saturating_add(r.p1, reach);
      return disjoint ? Cover::None : Cover::Some;
    }
    case MaskOp::BlockSparse: return block_cover(m, r);
    default: return Cover::Some;
  }
}

QKV_HD inline Cover mask_cover(const MaskProgram& program, int64_t batch, const Rect& r) {
  if (program.n == 0) return Cover::All;
  Cover stack[kMaskStack];
  int top = -1;
  QKV_ROLLED
  for (int i = 0; i < program.n; ++i) {
    const MaskNode& m = program.nodes[i];
    if (m.op == MaskOp::And || m.op == MaskOp::Or) {
      const Cover x = stack[top - 1], y = stack[top];
      const Cover absorbing = m.op == MaskOp::And ? Cover::None : Cover::All;
      const Cover neutral = m.op == MaskOp::And ? Cover::All : Cover::None;
      --top;
      if (x == absorbing || y == absorbing) stack[top] = absorbing;
      else stack[top] = x == neutral ? y : (y == neutral ? x : Cover::Some);
    } else if (m.op == MaskOp::Not) {
      if (stack[top] != Cover::Some) stack[top] = stack[top] == Cover::All ? Cover::None : Cover::All;
    } else {
      stack[++top] = leaf_cover(m, batch, r);
    }
  }
  return stack[0];
}

}  // namespace QKV_LEVEL
}  // namespace qkv
