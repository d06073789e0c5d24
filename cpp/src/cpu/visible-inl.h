// SPDX-License-Identifier: Apache-2.0
// Which keys of a block do the lanes of a tile see? Tiles that see nothing are skipped, tiles that see all run
// without a mask, the others get one word per key with a bit per lane, and the range of keys seen by any lane.
#pragma once

#include "cpu/tiles.h"
#include "qkv/problem.h"

namespace qkv::inline QKV_LEVEL {

constexpr int kMaxLanes = kTileVectors<float> * kLanes<float>;
static_assert(kMaxLanes <= 32, "a word of mask bits per key");

struct TileLanes {              // which query and head each lane holds
  int live;                     // lanes 0 ... live - 1 hold rows; the others are padding
  int living;                   // how many of them are alive
  bool consecutive;             // each is the query after the one before, of one head
  bool alive[kMaxLanes];        // false for a padding query
  int64_t row[kMaxLanes];       // result row
  int64_t query[kMaxLanes];     // index in q, mask, bias
  int64_t position[kMaxLanes];  // absolute position p
  int64_t head[kMaxLanes];      // query head
  int64_t result_head[kMaxLanes];
  int64_t first, last;  // range of positions of the living
};

struct Range {
  int lo, hi;
};

struct Visible {
  int lo = 0, hi = 0;    // keys lo ... hi - 1 of the block are seen by some lane
  bool partial = false;  // some lane misses some of these: bits decide
  uint32_t bits[kKeys];  // bit = lane
};

// bit c of x[r] <-> bit r of x[c]
inline void transpose_bits(uint32_t (&x)[32]) {
  uint32_t m = 0x0000ffffu;
  for (int s = 16; s != 0; s >>= 1, m ^= m << s) {
    for (int k = 0; k < 32; k = (k + s + 1) & ~s) {
      const uint32_t t = ((x[k] >> s) ^ x[k + s]) & m;
      x[k] ^= t << s;
      x[k + s] ^= t;
    }
  }
}

// Bits of up to n <= 32 elements of a boolean row.
inline uint32_t bool_bits(const char* row, int64_t stride, int n) {
  const auto* x = reinterpret_cast<const uint8_t*>(row);
  if (stride == 1 && n == 32) return nonzero_bytes(x);
  uint32_t bits = 0;
  for (int t = 0; t < n; ++t) bits |= static_cast<uint32_t>(x[t * stride] != 0) << t;
  return bits;
}

// Bit t: x[t] is not -inf.
template <class A>
inline uint32_t finite_below_bits(const A* x, int n) {
  uint32_t bits = 0;
  if (n == 32) {
    IntVec<A> hidden{}, shown{};
    for (int t = 0; t < n; t += kLanes<A>) {
      hidden |= load(x + t) == splat(-kInf<A>);
      shown |= load(x + t) != splat(-kInf<A>);
    }
    if (!any(hidden)) return ~bits;
    if (!any(shown)) return 0;
  }
  for (int t = 0; t < n; ++t) bits |= static_cast<uint32_t>(!(x[t] == -kInf<A>)) << t;
  return bits;
}

// --- keys by lanes -------------------------------------------------------------------------------------------
// Where lanes are consecutive positions, the lanes that see a key are as short an answer, for the usual leaves, as the
// keys that a lane sees; and it is the one that is wanted.

inline bool has_lanes(const MaskProgram& program) {
  bool all = program.n > 0;
  for (int i = 0; i < program.n; ++i) {
    switch (program.nodes[i].op) {
      case MaskOp::All:
      case MaskOp::Band:
      case MaskOp::Prefix:
      case MaskOp::Lengths:
      case MaskOp::Document:
      case MaskOp::And:
      case MaskOp::Or:
      case MaskOp::Not: break;
      default: all = false;
    }
  }
  return all;
}

// Bit i: position p0 + i sees key j. Beyond lane n - 1 they mean nothing.
inline uint32_t leaf_lanes(const MaskNode& m, int64_t batch, int64_t p0, int n, int64_t j) {
  if (m.op == MaskOp::Band) {
    return range_bits(saturating_add(j, -m.b - mutant(3)), saturating_add(j, m.a + mutant(4)), p0);
  }
  if (m.op == MaskOp::Document) {
    const int64_t first = p0 < 0 ? -p0 : 0, end = m.n - p0 < n ? m.n - p0 : n;
    if (j >= m.n || first >= end) return 0;
    return equal_words(m.data + p0 + first, m.data[j], static_cast<int>(end - first)) << first;
  }
  return leaf_visible(m, batch, p0, j) ? ~uint32_t{0} : 0;  // the same for all positions
}

inline uint32_t mask_lanes(const MaskProgram& program, int64_t batch, int64_t p0, int n, int64_t j) {
  return combine_bits(program, [&](const MaskNode& m) { return leaf_lanes(m, batch, p0, n, j); });
}

// --- a block -------------------------------------------------------------------------------------------------

// bias_rows: the lanes' values of the bias for this block, or nullptr where none hides; -inf counts as masked.
template <class A>
inline void look(const Problem& p, int64_t batch, const TileLanes& lanes, int64_t j0, int n, const A* const* bias_rows,
                 Visible& out) {
  out.lo = 0;
  out.hi = n;
  out.partial = false;
  const Rect rect{lanes.first, lanes.last, j0, j0 + n - 1};
  const Cover cover = mask_cover(p.program, batch, rect);
  if (cover == Cover::None) {
    out.hi = 0;
    return;
  }
  if (cover == Cover::All && !p.mask.data && !bias_rows && !p.focus.centre.data) return;

  const bool by_lanes = lanes.consecutive && lanes.living > 0 && !p.mask.data && !bias_rows && !p.focus.centre.data &&
                        has_lanes(p.program);
  uint32_t seen[kMaskWords] = {}, missed[kMaskWords] = {};
  const int64_t mask_lead = p.mask.data ? lead_offset(p, p.mask, batch) : 0;
  for (int w = 0; w * 32 < n; ++w) {
    const int count = n - w * 32 < 32 ? n - w * 32 : 32;
    const uint32_t inside = ~uint32_t{0} >> (32 - count);
    const int64_t first = j0 + w * 32;
    const Cover part =
        cover == Cover::All ? cover : mask_cover(p.program, batch, {rect.p0, rect.p1, first, first + count - 1});
    if (part == Cover::None) {
      missed[w] = inside;
      for (int t = 0; t < count; ++t) out.bits[w * 32 + t] = 0;
      continue;
    }
    if (by_lanes && part == Cover::Some) {
      const uint32_t living = ~uint32_t{0} >> (32 - lanes.living);
      for (int t = 0; t < count; ++t) {
        const uint32_t bits = living & mask_lanes(p.program, batch, lanes.first, lanes.living, first + t);
        out.bits[w * 32 + t] = bits;
        seen[w] |= static_cast<uint32_t>(bits != 0) << t;
        missed[w] |= static_cast<uint32_t>(bits != living) << t;
      }
      continue;
    }
    uint32_t rows[32] = {}, program = part == Cover::All ? ~uint32_t{0} : 0, living = 0, all = inside;
    int64_t known = INT64_MIN;  // lanes of one query share the program's answer
    for (int i = 0; i < lanes.live; ++i) {
      if (!lanes.alive[i]) continue;
      if (part == Cover::Some && lanes.position[i] != known) {
        program = mask_bits(p.program, batch, lanes.position[i], first);
        known = lanes.position[i];
      }
      uint32_t bits = program & inside;
      if (p.mask.data && bits) {
        const int64_t at =
            mask_lead + lanes.head[i] * p.mask.h + (mutant(22) ? lanes.row[i] : lanes.query[i]) * p.mask.s;
        bits &= bool_bits(p.mask.data + at + first * p.mask.d, p.mask.d, count);
      }
      if (bias_rows && bits) bits &= finite_below_bits(bias_rows[i] + w * 32, count);
      if (p.focus.centre.data && bits) {
        bits &= focus_bits(p.focus.reach, focus_centre(p, batch, lanes.head[i], lanes.query[i]), first);
      }
      rows[i] = bits;
      living |= uint32_t{1} << i;
      seen[w] |= bits;
      all &= bits;
    }
    missed[w] = ~all & inside;
    if (all != inside) transpose_bits(rows);
    for (int t = 0; t < count; ++t) out.bits[w * 32 + t] = all == inside ? living : rows[t];
  }
  int lo = n, hi = 0;
  for (int w = 0; w < kMaskWords; ++w) {
    if (!seen[w]) continue;
    if (lo == n) lo = w * 32 + __builtin_ctz(seen[w]);
    hi = w * 32 + 32 - __builtin_clz(seen[w]);
  }
  out.lo = hi == 0 ? 0 : lo;
  out.hi = hi;
  const auto below = [](int n) { return (uint64_t{1} << (n < 0 ? 0 : (n > 32 ? 32 : n))) - 1; };
  for (int w = 0; w < kMaskWords; ++w) {
    if (missed[w] & below(out.hi - w * 32) & ~below(out.lo - w * 32)) out.partial = true;
  }
}

}  // namespace qkv::inline QKV_LEVEL
