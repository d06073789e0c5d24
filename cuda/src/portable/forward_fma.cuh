// SPDX-License-Identifier: Apache-2.0
// Forward attention by plain multiply-adds, for float32 and float64.
//
//     s = scale q k^T,  s = softcap tanh(s / softcap),  s += bias - slope |p - j|,  s = -inf where masked
//     o = softmax(s) v,  lse = log sum exp(s)
//
// Shapes     q (Hq, Sq, D), k (Hkv, Sk, D), v (Hkv, Sk, Dv) per batch element, any strides; D, Dv <= kD.
// Parallel   over tasks (batch, kv head, kRows rows, range of keys), one block each; 16 x 16 threads, thread (y, x)
//            holds rows y + 16 i, keys x + 16 j of S and columns of O in packs of 16 bytes.
// Loop       for each visible tile of kKeys keys: S = Q K^T -> modify -> mask -> softmax -> O += P V; P goes through
//            shared memory, K and V share one buffer.
// Memory     shared: Q kRows kD, K or V kKeys kD, P kRows kKeys: at most 80 KiB, which every GPU since sm_80 has.
//            Rows are padded by 16 bytes, so that 8 of them lie in different banks.
// Numerics   A = float or double, every product rounded once. Why not tensor cores for float32: three products of
//            tf32 drop what is below 2^-22 of each q k, and their accumulators truncate: for a small D that is beyond
//            the bound, which a float32 result must keep. p = 2^(c (s - m)); unseen keys have p = 0 exactly.
//            |error| <= u_out |o| + (u + 2 (sqrt(D) u max|q||k| scale + 2 u max|s|) + (8 + sqrt(Sk)) u) sum p|v|.
// References Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135).
#pragma once

#include "portable/scores.cuh"
#include "portable/visible.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element, int HeadDim, Height H>
struct FmaTile {
  static constexpr int64_t kPartKeys = 0;  // a part may have any number of them
  using A = Element;
  static constexpr int kD = HeadDim, kThreads = 256;
  static constexpr bool kFew = H == Height::Few;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(A));
  // Rows and keys of a thread. Q, K or V and P fit 80 KiB; O takes 4 kD / 16 registers at most (x 2 in double).
  static constexpr bool kSmall = kD * sizeof(A) * sizeof(A) <= 2048, kMiddle = kD * sizeof(A) <= 1024;
  static constexpr int kRowsOf = kFew ? 1 : (kSmall ? 4 : (kMiddle ? 2 : 1)), kKeysOf = kSmall ? 4 : (kMiddle ? 2 : 1);
  static constexpr int kRows = 16 * kRowsOf, kKeys = 16 * kKeysOf;
  static constexpr int kColumns = kD / 16;  // of a thread
  static constexpr int kLd = kD + kPack, kLdP = kKeys + kPack;
};

template <class A>
struct alignas(16) Pack {
  A x[16 / sizeof(A)];
};

template <class M>
struct FmaShared {
  typename M::A q[M::kRows * M::kLd];
  typename M::A kv[M::kKeys * M::kLd];
  typename M::A p[M::kRows * M::kLdP];
  uint32_t bits[M::kRows][mask_words(M::kKeys)];
  TileList<M::kThreads> list;
  Lanes<M::kRows> lanes;
  Task task;  // here and not in registers: O needs those
};

template <class M>
struct FmaScores {
  static constexpr int kPerThread = M::kKeys / 16;
  typename M::A x[M::kRowsOf][kPerThread];
};

template <class M>
struct FmaRows {
  typename M::A o[M::kRowsOf][M::kColumns], m[M::kRowsOf], l[M::kRowsOf];
};

constexpr int kUnseen = -1;  // in P: weights are never negative

// --- load ----------------------------------------------------------------------------------------------------

// Rows of kD elements, those at and beyond `columns` and rows without a source as 0.
template <class M, class RowOf>
QKV_DEVICE void load_rows(int rows, int64_t columns, int64_t stride, const RowOf& row_of, typename M::A* to) {
  for (int i = thread_index(); i < rows * M::kD; i += M::kThreads) {
    const int row = i / M::kD, d = i % M::kD;
    const auto* from = reinterpret_cast<const typename M::A*>(row_of(row));
    to[row * M::kLd + d] = from && d < columns ? from[d * stride] : 0;
  }
}

template <class M>
QKV_DEVICE void load_queries(const KernelArgs& args, const Task& task, FmaShared<M>& shared) {
  const Problem& p = args.problem;
  const Lanes<M::kRows>& lanes = shared.lanes;
  const int64_t lead = lead_offset(p, p.q, task.batch);
  const auto row_of = [&](int row) -> const char* {
    if (!lanes.alive[row]) return nullptr;
    const int64_t at = lead + lanes.head[row] * p.q.h + (task.seq.q_row + lanes.query[row]) * p.q.s;
    return p.q.data + at * static_cast<int64_t>(sizeof(typename M::A));
  };
  load_rows<M>(M::kRows, p.D, p.q.d, row_of, shared.q);
}

template <class M>
QKV_DEVICE void load_tile(const KernelArgs& args, const Task& task, const View& view, int64_t columns, int64_t j0,
                          FmaShared<M>& shared) {
  const int64_t first = lead_offset(args.problem, view, task.batch) + task.kv_head * view.h + task.seq.k_row * view.s;
  const auto row_of = [&](int key) -> const char* {
    if (j0 + key >= task.key_end) return nullptr;
    return view.data + (first + (j0 + key) * view.s) * static_cast<int64_t>(sizeof(typename M::A));
  };
  load_rows<M>(M::kKeys, columns, view.d, row_of, shared.kv);
}

// --- scores --------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE void clear(FmaScores<M>& s) {
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) s.x[i][j] = 0;
  }
}

// Row y + 16 i of Q and key x + 16 j of K: a pack from column d on.
template <class M>
QKV_DEVICE Pack<typename M::A> query_pack(const FmaShared<M>& shared, int i, int d) {
  return *reinterpret_cast<const Pack<typename M::A>*>(shared.q + (thread_index() / 16 + 16 * i) * M::kLd + d);
}
template <class M>
QKV_DEVICE Pack<typename M::A> key_pack(const FmaShared<M>& shared, int j, int d) {
  return *reinterpret_cast<const Pack<typename M::A>*>(shared.kv + (thread_index() % 16 + 16 * j) * M::kLd + d);
}

// S += Q K^T over the first `columns`, a multiple of the pack.
template <class M>
QKV_DEVICE void score_tile(int columns, const FmaShared<M>& shared, FmaScores<M>& s) {
  for (int d = 0; d < columns; d += M::kPack) {
    Pack<typename M::A> q[M::kRowsOf];
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) q[i] = query_pack(shared, i, d);
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const auto k = key_pack(shared, j, d);
      QKV_UNROLL
      for (int i = 0; i < M::kRowsOf; ++i) {
        QKV_UNROLL
        for (int e = 0; e < M::kPack; ++e) s.x[i][j] = multiply_add(q[i].x[e], k.x[e], s.x[i][j]);
      }
    }
  }
}

template <class M>
QKV_DEVICE void modify_scores(const KernelArgs& args, const Task& task, const ScoreRule<typename M::A>& rule,
                              const Lanes<M::kRows>& lanes, int64_t j0, FmaScores<M>& s) {
  using A = typename M::A;
  const int64_t first = j0 + thread_index() % 16;
  const auto offset_of = [](int j) { return 16 * j; };
  constexpr int kEach = FmaScores<M>::kPerThread;
  QKV_ROLLED
  for (int i = 0; i < M::kRowsOf; ++i) {  // the rows go round, as the keys of a row do in modify_row
    const int row = thread_index() / 16 + 16 * i;
    A x[kEach];
    QKV_UNROLL
    for (int j = 0; j < kEach; ++j) x[j] = s.x[0][j];
    if (lanes.alive[row]) {
      modify_row(args.problem, rule, row_terms<A>(args.problem, lanes, row), task.key_end, first, offset_of, x);
    }
    QKV_UNROLL
    for (int r = 1; r < M::kRowsOf; ++r) {
      QKV_UNROLL
      for (int j = 0; j < kEach; ++j) s.x[r - 1][j] = s.x[r][j];
    }
    QKV_UNROLL
    for (int j = 0; j < kEach; ++j) s.x[M::kRowsOf - 1][j] = x[j];
  }
}

// --- mask ----------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE void mask_scores(const uint32_t (&bits)[M::kRows][mask_words(M::kKeys)], FmaScores<M>& s) {
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const int key = thread_index() % 16 + 16 * j;
      if (!(bits[thread_index() / 16 + 16 * i][key / 32] >> (key % 32) & 1)) s.x[i][j] = -kInf<typename M::A>;
    }
  }
}

// --- softmax -------------------------------------------------------------------------------------------------

// S becomes P = 2^(c (s - m)) in shared memory; m, l and O move to the new maximum.
template <class M>
QKV_DEVICE void softmax(typename M::A c, const FmaScores<M>& s, FmaRows<M>& rows, typename M::A* p) {
  using A = typename M::A;
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    A top = rows.m[i];
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) top = larger(top, s.x[i][j]);
    for (int lanes = 1; lanes < 16; lanes *= 2) top = larger(top, shuffle_xor(top, lanes));
    const A m = top == -kInf<A> ? static_cast<A>(0) : top;  // nothing seen yet: -inf + inf is not a number
    const A alpha = power_of_two((rows.m[i] - m) * c);
    rows.m[i] = top;
    A sum = 0;
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const A x = power_of_two((s.x[i][j] - m) * c);
      sum += x;
      p[(thread_index() / 16 + 16 * i) * M::kLdP + thread_index() % 16 + 16 * j] =
          s.x[i][j] == -kInf<A> ? static_cast<A>(kUnseen) : x;
    }
    rows.l[i] = rows.l[i] * alpha + sum;
    QKV_UNROLL
    for (int d = 0; d < M::kColumns; ++d) rows.o[i][d] *= alpha;
  }
}

// --- accumulate ----------------------------------------------------------------------------------------------

// O += P V. 0 times NaN is NaN: an unseen key is passed over, not multiplied. The sum of a tile joins O as a whole:
// roundings of one sign grow with the keys of a tile and the tiles, not with all keys.
template <class M>
QKV_DEVICE void accumulate(const FmaShared<M>& shared, FmaRows<M>& rows) {
  using A = typename M::A;
  QKV_UNROLL
  for (int d = 0; d < M::kColumns; d += M::kPack) {
    const int column = d * 16 + thread_index() % 16 * M::kPack;
    Pack<A> sum[M::kRowsOf] = {};
    for (int key = 0; key < M::kKeys; key += M::kPack) {
      Pack<A> p[M::kRowsOf];
      QKV_UNROLL
      for (int i = 0; i < M::kRowsOf; ++i) {
        p[i] = *reinterpret_cast<const Pack<A>*>(shared.p + (thread_index() / 16 + 16 * i) * M::kLdP + key);
      }
      QKV_UNROLL
      for (int k = 0; k < M::kPack; ++k) {
        const auto v = *reinterpret_cast<const Pack<A>*>(shared.kv + (key + k) * M::kLd + column);
        QKV_UNROLL
        for (int i = 0; i < M::kRowsOf; ++i) {
          QKV_UNROLL
          for (int e = 0; e < M::kPack; ++e) {
            sum[i].x[e] = p[i].x[k] < 0 ? sum[i].x[e] : multiply_add(p[i].x[k], v.x[e], sum[i].x[e]);
          }
        }
      }
    }
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) {
      QKV_UNROLL
      for (int e = 0; e < M::kPack; ++e) rows.o[i][d + e] += sum[i].x[e];
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
