// SPDX-License-Identifier: Apache-2.0
// The bias of a tile: rows of an array of scores, or what is read by distance and never was such an array.
//
//     b(i, j) = bias[i, j],   or with distances (problem.h)   b(i, j) = bias[i, clamp(p_i - j - least, 0, n - 1)]
//
// Table      Where all queries share one row (T5's bias) and the lanes are consecutive queries of one head, those
//            of a key are consecutive elements of it: one unaligned load, a broadcast where the key is beyond either
//            end, and lane by lane only for the w - 1 keys that straddle an end.
// Rows       All else (Shaw's and Transformer-XL's terms, heads of a group in the lanes, chosen rows, arrays): a lane's
//            elements of a block, which modify_scores transposes. By distance they are a piece of the row, backwards,
//            with its ends repeated. -inf in them hides keys; a table has none.
#pragma once

#include "cpu/rows-inl.h"
#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

inline bool shares_table(const Problem& p, const TileLanes& lanes) { return p.distances.plain && lanes.consecutive; }

// Does a tile need the rows of its bias in scratch?
inline bool reads_bias_rows(const Problem& p, const TileLanes& lanes) { return p.bias.data && !shares_table(p, lanes); }

template <class A>
struct Table {
  const A* row = nullptr;
  int64_t n = 0, first = 0;  // the element of lane 0 and key 0

  Table(const Problem& p, const TileLanes& lanes) {
    if (!shares_table(p, lanes)) return;
    row = reinterpret_cast<const A*>(p.bias.data) + lanes.head[0] * p.bias.h;
    n = p.distances.n;
    first = lanes.position[0] - p.distances.least - mutant(68);
  }

  // For key j and as many lanes as a vector has, from `lane` on.
  QKV_INLINE Vec<A> at(int64_t lane, int64_t j) const {
    constexpr int w = kLanes<A>;
    const int64_t t = first + lane - j;
    if (t >= 0 && t <= n - w) return load(row + t);
    if (t + w <= 0) return splat(row[0]);
    if (t >= n) return splat(row[mutant(69) ? 0 : n - 1]);
    A x[w];
    for (int64_t i = 0; i < w; ++i) x[i] = row[t + i < 0 ? 0 : (t + i >= n ? n - 1 : t + i)];
    return load(x);
  }
};

// Elements of `row` for keys j0 ... j0 + n - 1 of a query at a position.
template <class A>
inline void load_by_distance(const Problem& p, const char* row, int64_t position, int64_t j0, int64_t n, A* out) {
  const int64_t size = itemsize(p.bias.dtype), last = p.distances.n - 1;
  const auto element = [&](int64_t t) { return row + t * p.bias.d * size; };
  const int64_t t0 = position - p.distances.least - j0;  // of key j0; it falls
  const auto within = [n](int64_t x) { return x < 0 ? 0 : (x > n ? n : x); };
  const int64_t above = within(t0 - last), below = within(t0 + 1);  // keys before, and up to which, t is within the row
  load_row(element(last), p.bias.dtype, 0, above, out);
  load_row(element(t0 - above), p.bias.dtype, -p.bias.d, below - above, out + above);
  load_row(element(0), p.bias.dtype, 0, n - below, out + below);
}

// Plain: with a score that is finite, the sum is too.
template <class A>
constexpr A kMostPlainBias = sizeof(A) == 4 ? static_cast<A>(0x1p100) : static_cast<A>(0x1p900);

template <class A>
QKV_INLINE IntVec<A> sizes_of(Vec<A> x) {  // in the order of |x|, NaN largest
  return (IntVec<A>)absolute<A>(x);
}
template <class A>
QKV_INLINE bool all_plain(IntVec<A> sizes) {
  return !any((IntVec<A>)(sizes > (IntVec<A>)splat(kMostPlainBias<A>)));
}

template <class A>
struct BiasRows {  // of a tile, for a block; padding has that of a lane that lives
  const A* row[kMaxLanes];
  bool plain = true;  // those that were looked at
};

// Keys j0 ... j0 + n - 1; what cannot be read where it is, is converted into `copies`, (lanes, kKeys). Only one row is
// looked at: keys that no lane sees are hidden in it too. The others are when they are added, which saves a walk over
// them while they are not in L1.
template <class A, int NV>
inline void load_bias(const Problem& p, int64_t batch, const TileLanes& lanes, int64_t j0, int n, A* copies,
                      BiasRows<A>& out) {
  constexpr int w = kLanes<A>;
  const int64_t lead = lead_offset(p, p.bias, batch), size = itemsize(p.bias.dtype);
  const bool in_place = !p.distances.n && whole_vectors<A>(p.bias, n);
  int one = 0;  // that lives
  while (one < lanes.live - 1 && !lanes.alive[one]) ++one;
  for (int i = one; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    A* const copy = copies + i * kKeys;
    out.row[i] = copy;
    const int64_t at = lead + (mutant(16) ? 0 : lanes.head[i]) * p.bias.h + lanes.query[i] * p.bias.s;
    const char* const row = p.bias.data + at * size;
    const char* const first = row + j0 * p.bias.d * size;
    if (in_place) out.row[i] = reinterpret_cast<const A*>(first);
    else if (p.distances.n) load_by_distance(p, row, lanes.position[i] + mutant(70), j0, n, copy);
    else load_row(first, p.bias.dtype, p.bias.d, n, copy);
    for (int j = n; j < round_up(n, w); ++j) copy[j] = 0;
  }
  for (int i = 0; i < NV * w; ++i) {
    if (i >= lanes.live || !lanes.alive[i]) out.row[i] = out.row[one];
  }
  IntVec<A> most{};
  for (int j = 0; j < n; j += w) {
    const IntVec<A> sizes = sizes_of<A>(load(out.row[one] + j));
    most = sizes > most ? sizes : most;
  }
  out.plain = all_plain<A>(most);
  if (out.plain) return;
  constexpr int kStep = static_cast<int>(kLine / sizeof(A));
  for (int i = 0; i < lanes.live; ++i) {  // all at once: look() waits for one after the other
    for (int j = 0; j < n; j += kStep) __builtin_prefetch(out.row[i] + j);
  }
}

}  // namespace qkv::inline QKV_LEVEL
