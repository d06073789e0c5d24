// SPDX-License-Identifier: Apache-2.0
// Forward attention of few rows by plain multiply-adds, for float32 and float64: bound by how fast K and V are read.
//
//     s = scale q k^T,  s = softcap tanh(s / softcap),  s += bias - slope |p - j|,  s = -inf where masked
//     o = softmax(s) v,  lse = log sum exp(s)
//
// Shapes     q (Hq, Sq, D), k (Hkv, Sk, D), v (Hkv, Sk, Dv) per batch element, any strides; D, Dv <= kD.
// Parallel   over tasks (batch, kv head, kRows rows, range of keys), one block each. A warp takes 32 keys of a
//            tile's kKeys; its lanes lie along the columns: kLanes of them, a group, share a key, 8 columns each, for
//            all rows. So kGroups keys lie side by side. Each group has a softmax of its own, and they meet at the
//            end: there is no barrier in the loop.
// Loop       for each visible tile, by steps of kStep keys: S = Q K^T, summed over the group such that lane t gets row
//            t mod kRows -> modify -> mask -> softmax -> O += P V, with P from the lanes that have it.
// Memory     shared: 32 kStages KiB of K and V. Every thread copies by cp.async what it will read itself, and nobody
//            else: loads under way that take no registers.
// Registers  of 255: Q and O 64 each, sums of S 32, V 32.
// Numerics   as in forward_fma.cuh: every product rounded once, unseen keys passed over. The sum of the kKeysOf keys of
//            a step joins O as a whole, rescaled in the same rounding; a part has kMostSums of them at most.
// References Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2023, Flash-Decoding; PTX ISA, cp.async.
#pragma once

#include "portable/forward_fma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element, int HeadDim>
struct DecodeTile {
  using A = Element;
  static constexpr int kD = HeadDim, kThreads = 128, kWarps = kThreads / 32, kStages = 2;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(A));
  static constexpr int kRows = 32 / static_cast<int>(sizeof(A));
  static constexpr int kLanes = kD * kRows * static_cast<int>(sizeof(A)) / 256, kGroups = 32 / kLanes;
  static constexpr int kPacks = kD / kLanes / kPack;  // of a lane, in a row of q, K or V
  static constexpr int kKeysOf = 8 / kPacks;          // of a group, in a step
  static constexpr int kStep = kKeysOf * kGroups, kSteps = 32 / kStep, kKeys = 32 * kWarps;
  static constexpr int kStreams = kWarps * kGroups;
  static constexpr int64_t kMostSums = 128, kPartKeys = kMostSums * kStep * kWarps;
  static_assert(kLanes >= kRows && kPartKeys % kKeys == 0);
};

template <class M>
using Slots = Pack<typename M::A>[M::kKeysOf][M::kPacks][M::kThreads];  // the last index is the thread that uses it

template <class M>
struct DecodeShared {
  union {
    struct {
      Slots<M> k[M::kStages], v[M::kStages];
    };
    typename M::A o[M::kStreams][M::kRows][M::kD];  // at the end
  };
  typename M::A m[M::kStreams][M::kRows], l[M::kStreams][M::kRows];
  char ends[M::kRows * (2 * sizeof(typename M::A) + sizeof(RowOut<typename M::A>))];
  TileList<M::kThreads> list;
  Lanes<M::kRows> lanes;
  Task task;
};

template <class M>
using RowPacks = Pack<typename M::A>[M::kRows][M::kPacks];  // of all rows, this lane's columns

template <class M>
struct DecodeRows {  // state of a group of lanes
  RowPacks<M> o;
  typename M::A m, l;  // of row lane mod kRows
};

template <class M>
struct Lane {
  int t, group, row;  // lane t of its group of lanes; its row once scores are reduced
  QKV_DEVICE Lane()
      : t(thread_index() % M::kLanes), group(thread_index() % 32 / M::kLanes), row(thread_index() % M::kRows) {}
};

// --- load ----------------------------------------------------------------------------------------------------

// Of this thread, all: columns beyond the last are 0, and no slot holds what nobody wrote.
template <class M>
QKV_DEVICE void clear_slots(DecodeShared<M>& shared) {
  constexpr int kSlots = M::kStages * M::kKeysOf * M::kPacks;
  auto* const k = &shared.k[0][0][0][thread_index()];
  auto* const v = &shared.v[0][0][0][thread_index()];
  QKV_ROLLED
  for (int i = 0; i < kSlots; ++i) k[i * M::kThreads] = v[i * M::kThreads] = {};
}

// The packs of this lane, of the rows row, row + stride, ... as far as there are any; what is not loaded stays as it
// is. async: 16 bytes at a time, of which all are there.
template <class M, int Rows>
QKV_DEVICE void load_packs(const View& view, const char* row, int64_t stride, int rows, int64_t columns, bool async,
                           Pack<typename M::A> (*slots)[M::kPacks][M::kThreads]) {
  using A = typename M::A;
  constexpr int kNext = M::kLanes * M::kPack;  // columns from a pack to the next
  const int first = Lane<M>().t * M::kPack, left = static_cast<int>(columns) - first;
  auto* const to = &slots[0][0][thread_index()];
  if (async) {
    const auto* from = reinterpret_cast<const A*>(row) + first;
    QKV_UNROLL
    for (int u = 0; u < Rows; ++u) {
      QKV_UNROLL
      for (int i = 0; i < M::kPacks; ++i) {
        if (u < rows && i * kNext < left) copy_async(to + (u * M::kPacks + i) * M::kThreads, from + i * kNext);
      }
      from = reinterpret_cast<const A*>(reinterpret_cast<const char*>(from) + stride);
    }
    return;
  }
  QKV_ROLLED
  for (int n = 0; n < rows * M::kPacks; ++n) {
    const int u = n / M::kPacks, i = n % M::kPacks;
    const auto* from = reinterpret_cast<const A*>(row + u * stride) + (first + i * kNext) * view.d;
    QKV_ROLLED
    for (int e = 0; e < M::kPack && e < left - i * kNext; ++e) to[n * M::kThreads].x[e] = from[e * view.d];
  }
}

// Through the slots of K, which are free yet and all 0.
template <class M>
QKV_DEVICE void load_queries(const KernelArgs& args, DecodeShared<M>& shared, RowPacks<M>& q) {
  const Problem& p = args.problem;
  const Task& task = shared.task;
  static_assert(sizeof(shared.k) >= sizeof(q) * M::kThreads);
  const int64_t lead = lead_offset(p, p.q, task.batch);
  auto* const slots = shared.k[0];
  QKV_ROLLED
  for (int row = 0; row < M::kRows; ++row) {
    if (!shared.lanes.alive[row]) continue;
    const int64_t at = lead + shared.lanes.head[row] * p.q.h + (task.seq.q_row + shared.lanes.query[row]) * p.q.s;
    load_packs<M, 1>(p.q, p.q.data + at * static_cast<int64_t>(sizeof(typename M::A)), 0, 1, p.D,
                     args.plan.async_q && p.D % M::kPack == 0, slots + row);
  }
  commit_copies();
  wait_copies<0>();
  QKV_UNROLL
  for (int row = 0; row < M::kRows; ++row) {
    QKV_UNROLL
    for (int i = 0; i < M::kPacks; ++i) q[row][i] = slots[row][i][thread_index()];
  }
}

template <class M>
struct Source {  // K or V of a task
  const View& view;
  const char* data;  // of key `group` of this lane
  int64_t columns, stride;
  bool async;

  QKV_DEVICE Source(const Problem& p, const View& from, int64_t width, const Task& task, bool aligned)
      : view(from),
        columns(width),
        stride(from.s * static_cast<int64_t>(sizeof(typename M::A))),
        async(aligned && width % M::kPack == 0) {
    const int64_t first = lead_offset(p, from, task.batch) + task.kv_head * from.h + task.seq.k_row * from.s;
    data = from.data + first * static_cast<int64_t>(sizeof(typename M::A)) + Lane<M>().group * stride;
  }

  // The keys of a step, from j0 on, as far as there are any.
  QKV_DEVICE void load(int64_t j0, int64_t key_end, Slots<M>& to) const {
    const int64_t left = key_end - j0 - Lane<M>().group;
    const int keys = left < M::kStep ? (static_cast<int>(left) + M::kGroups - 1) / M::kGroups : M::kKeysOf;
    load_packs<M, M::kKeysOf>(view, data + j0 * stride, M::kGroups * stride, keys, columns, async, to);
  }
};

// --- scores --------------------------------------------------------------------------------------------------

// Half of the rows change lanes, then half of these, until each lane has one: row lane mod kRows.
template <class M, int Half = M::kRows / 2>
QKV_DEVICE void share_rows(typename M::A (&x)[M::kRows][M::kKeysOf]) {
  const bool upper = (thread_index() & Half) != 0;
  QKV_UNROLL
  for (int r = 0; r < Half; ++r) {
    QKV_UNROLL
    for (int u = 0; u < M::kKeysOf; ++u) {
      const auto away = upper ? x[r][u] : x[r + Half][u];
      x[r][u] = (upper ? x[r + Half][u] : x[r][u]) + shuffle_xor(away, Half);
    }
  }
  if constexpr (Half > 1) share_rows<M, Half / 2>(x);
}

// Of the keys of this lane's group: the sums over all its lanes, for this lane's row.
template <class M>
QKV_DEVICE void score_step(const RowPacks<M>& q, const Slots<M>& k, typename M::A (&s)[M::kKeysOf]) {
  using A = typename M::A;
  A x[M::kRows][M::kKeysOf] = {};
  QKV_UNROLL
  for (int u = 0; u < M::kKeysOf; ++u) {
    QKV_UNROLL
    for (int i = 0; i < M::kPacks; ++i) {
      const Pack<A> key = k[u][i][thread_index()];
      QKV_UNROLL
      for (int e = 0; e < M::kPack; ++e) {
        QKV_UNROLL
        for (int r = 0; r < M::kRows; ++r) x[r][u] = multiply_add(q[r][i].x[e], key.x[e], x[r][u]);
      }
    }
  }
  share_rows<M>(x);
  QKV_UNROLL
  for (int u = 0; u < M::kKeysOf; ++u) {
    QKV_UNROLL
    for (int lanes = M::kRows; lanes < M::kLanes; lanes *= 2) x[0][u] += shuffle_xor(x[0][u], lanes);
    s[u] = x[0][u];
  }
}

// --- mask ----------------------------------------------------------------------------------------------------

// seen: of the keys from the step's first on. True where a key of the warp is hidden from a row.
template <class M>
QKV_DEVICE bool mask_step(uint32_t seen, typename M::A (&s)[M::kKeysOf]) {
  constexpr auto kHidden = -kInf<typename M::A>;
  const uint32_t own = seen >> Lane<M>().group;
  bool hidden = false;
  QKV_UNROLL
  for (int u = 0; u < M::kKeysOf; ++u) {
    if (!(own >> (u * M::kGroups) & 1)) s[u] = kHidden;
    hidden = hidden || s[u] == kHidden;
  }
  return any_in_warp(hidden);
}

// --- softmax -------------------------------------------------------------------------------------------------

// S becomes P = 2^(c (s - m)); m and l move to the new maximum. Returns by what O has to be multiplied.
template <class M>
QKV_DEVICE typename M::A softmax_step(typename M::A c, typename M::A (&s)[M::kKeysOf], DecodeRows<M>& rows) {
  using A = typename M::A;
  A top = rows.m;
  QKV_UNROLL
  for (int u = 0; u < M::kKeysOf; ++u) top = larger(top, s[u]);
  const A m = top == -kInf<A> ? static_cast<A>(0) : top;  // nothing seen yet: -inf + inf is not a number
  const A alpha = power_of_two((rows.m - m) * c);
  A sum = 0;
  QKV_UNROLL
  for (int u = 0; u < M::kKeysOf; ++u) {
    const A x = power_of_two((s[u] - m) * c);
    sum += x;
    s[u] = s[u] == -kInf<A> ? static_cast<A>(kUnseen) : x;
  }
  rows.m = top;
  rows.l = multiply_add(rows.l, alpha, sum);
  return alpha;
}

// --- accumulate ----------------------------------------------------------------------------------------------

// O = alpha O + P V. 0 times NaN is NaN: an unseen key is passed over, not multiplied.
template <class M, bool Hidden>
QKV_DEVICE void accumulate_step(const Slots<M>& v, typename M::A alpha, const typename M::A (&p)[M::kKeysOf],
                                DecodeRows<M>& rows) {
  using A = typename M::A;
  const int first = thread_index() % 32 / M::kLanes * M::kLanes;  // lane first + r has row r
  Pack<A> x[M::kKeysOf][M::kPacks];
  QKV_UNROLL
  for (int u = 0; u < M::kKeysOf; ++u) {
    QKV_UNROLL
    for (int i = 0; i < M::kPacks; ++i) x[u][i] = v[u][i][thread_index()];
  }
  QKV_UNROLL
  for (int r = 0; r < M::kRows; ++r) {
    const A factor = shuffle_from(alpha, first + r);
    Pack<A> sum[M::kPacks] = {};
    QKV_UNROLL
    for (int u = 0; u < M::kKeysOf; ++u) {
      const A w = shuffle_from(p[u], first + r);
      if (Hidden && w < 0) continue;
      QKV_UNROLL
      for (int i = 0; i < M::kPacks; ++i) {
        QKV_UNROLL
        for (int e = 0; e < M::kPack; ++e) sum[i].x[e] = multiply_add(w, x[u][i].x[e], sum[i].x[e]);
      }
    }
    QKV_UNROLL
    for (int i = 0; i < M::kPacks; ++i) {
      QKV_UNROLL
      for (int e = 0; e < M::kPack; ++e) rows.o[r][i].x[e] = multiply_add(rows.o[r][i].x[e], factor, sum[i].x[e]);
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
