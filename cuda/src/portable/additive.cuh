// SPDX-License-Identifier: Apache-2.0
// Additive scores: what takes the place of S = Q K^T in the loop of forward_fma.cuh.
//
//     s = sum over d of w_d tanh(q_d + k_d)          q, k, w in A; the scale is in w
//
// Float      tanh(a + b) = 1 - 2 / y with y = 1 + e^2a e^2b. The exponentials are made once per query and once per key
//            of a tile; a term then costs a multiply-add, and four terms share a reciprocal:
//                w0 / y0 + w1 / y1 = (w0 y1 + w1 y0) / (y0 y1),  and two of these likewise,
//            by rcp.approx, which is within its share of the bound: no Newton step. y is kept below 2^31, so that the
//            product of four stays below 2^124: a term that small is off by less than 2^-31 |w|. No argument is
//            clamped: large ones of opposite sign cancel, and tanh(60 - 59.5) is far from 0. (The CPU has w in the
//            denominator, for two operations less; there z has a sign, and its limit is two instructions.) Double takes
//            tanh always.
// Pieces     D has no limit: rows of Q and K pass through shared memory kD columns at a time, Q once more for each tile
//            of keys, and the sum goes on from piece to piece.
// Far        A piece of a query or key with |a| > kFar somewhere, or not finite, takes tanh itself, and so does a piece
//            of w with an entry beyond 2^30. That is decided for each pair of a query and a key by the two alone: a row
//            must not depend on its neighbours. A block that holds such a pair loads the piece again, as it is.
// Memory     w kD and a bit for each row and key, beside the buffers of forward_fma.cuh.
// Cost       per four terms of a pair: 4 fma, 4 minima, 8 products and sums, one reciprocal.
// Numerics   |ds| <= |scale| (27 |w| + (3/2 sqrt(D) + 3) sum |w|) u, as on the CPU (_bounds.py has the parts). The sum
// at
//            tanh = 0 is computed by the same operations, so a score of exactly 0 is exact.
// References Bahdanau, Cho & Bengio 2014 (arXiv 1409.0473).
#pragma once

#include "portable/focus.cuh"
#include "portable/forward_fma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class A>
constexpr bool kExponentials = sizeof(A) == 4;  // float; double takes tanh

constexpr float kFar = 40;               // |a| at most: e^80 is a float, and so is 1 / e^80
constexpr float kMostDivisor = 0x1p31f;  // of y
constexpr double kMostWeight = 0x1p30;   // |w| at most, for the product of four y with it

struct Piece {  // columns first ... first + n - 1 of q and k
  int64_t first;
  int n;
};

template <class M>
struct PieceShared : FmaShared<M> {
  typename M::A weight[M::kD];  // of a piece: w times the scale, 0 beyond D
  FocusRange focus;
  uint32_t far_row[mask_words(M::kRows)], far_key[mask_words(M::kKeys)], far_weight;
};

// --- load ----------------------------------------------------------------------------------------------------

enum class Form { Itself, Exponential };  // x, or e^2x

// A piece of each row, of any dtype, 0 beyond its columns and in rows without a source. far: the rows of which some
// entry has no exponential.
template <class M, Form F, class RowOf>
QKV_DEVICE void load_piece(int rows, const View& view, Piece piece, const RowOf& row_of, typename M::A* to,
                           uint32_t* far) {
  using A = typename M::A;
  for (int i = thread_index(); i < rows * M::kD; i += M::kThreads) {
    const int row = i / M::kD, d = i % M::kD;
    const char* const from = d < piece.n ? row_of(row) : nullptr;
    A x = from ? load_as<A>(from, view.dtype, (piece.first + d) * view.d) : 0;
    if constexpr (F == Form::Exponential) {
      if (!(fabs(x) <= static_cast<A>(kFar))) atomic_or(&far[row / 32], 1u << (row % 32));
      x = exp(x + x);
    }
    to[row * M::kLd + d] = x;
  }
}

// Of the queries and the keys of a tile.
template <class M, Form F>
QKV_DEVICE void load_pieces(const KernelArgs& args, const Task& task, int64_t j0, Piece piece, PieceShared<M>& shared) {
  const Problem& p = args.problem;
  const Lanes<M::kRows>& lanes = shared.lanes;
  const int64_t q0 = lead_offset(p, p.q, task.batch), q_size = itemsize(p.q.dtype), k_size = itemsize(p.k.dtype);
  const int64_t k0 = lead_offset(p, p.k, task.batch) + task.kv_head * p.k.h + task.seq.k_row * p.k.s;
  const auto query = [&](int row) -> const char* {
    if (!lanes.alive[row]) return nullptr;
    return p.q.data + (q0 + lanes.head[row] * p.q.h + (task.seq.q_row + lanes.query[row]) * p.q.s) * q_size;
  };
  const auto key = [&](int row) -> const char* {
    return j0 + row < task.key_end ? p.k.data + (k0 + (j0 + row) * p.k.s) * k_size : nullptr;
  };
  load_piece<M, F>(M::kRows, p.q, piece, query, shared.q, shared.far_row);
  load_piece<M, F>(M::kKeys, p.k, piece, key, shared.kv, shared.far_key);
}

// Nobody may read the piece before any more; all may read this one afterwards.
template <class M>
QKV_DEVICE void load_weight(const Problem& p, Piece piece, PieceShared<M>& shared) {
  constexpr bool kAll = !kExponentials<typename M::A>;
  for (int i = thread_index(); i < mask_words(M::kRows); i += M::kThreads) shared.far_row[i] = kAll ? ~0u : 0;
  for (int i = thread_index(); i < mask_words(M::kKeys); i += M::kThreads) shared.far_key[i] = 0;
  if (thread_index() == 0) shared.far_weight = 0;
  sync_block();
  for (int d = thread_index(); d < M::kD; d += M::kThreads) {
    const double w = d < piece.n ? p.weight[piece.first + d] * p.scale : 0;
    shared.weight[d] = static_cast<typename M::A>(w);
    if (!(fabs(w) <= kMostWeight)) atomic_or(&shared.far_weight, 1u);
  }
}

// --- scores --------------------------------------------------------------------------------------------------

// acc + w0 / y0 + w1 / y1 + w2 / y2 + w3 / y3.
QKV_DEVICE float add_quotients(const float (&w)[4], const float (&y)[4], float acc) {
  const float y01 = y[0] * y[1], y23 = y[2] * y[3];
  const float w01 = multiply_add(w[0], y[1], w[1] * y[0]), w23 = multiply_add(w[2], y[3], w[3] * y[2]);
  return multiply_add(multiply_add(w01, y23, w23 * y01), reciprocal(y01 * y23), acc);
}

QKV_DEVICE float divisor(float e, float f) {
  const float y = multiply_add(e, f, 1.0f);
  return y < kMostDivisor ? y : kMostDivisor;
}

// Does the pair of row y + 16 i and key x + 16 j take tanh itself?
template <class M>
QKV_DEVICE bool is_far(const PieceShared<M>& shared, int i, int j) {
  const int row = thread_index() / 16 + 16 * i, key = thread_index() % 16 + 16 * j;
  return shared.far_weight || (shared.far_row[row / 32] >> (row % 32) & 1) ||
         (shared.far_key[key / 32] >> (key % 32) & 1);
}

// From the exponentials: s += 2 (sum of w / 2 - sum of w / y), for pairs that are near.
template <class M>
QKV_DEVICE void near_piece(int columns, const PieceShared<M>& shared, FmaScores<M>& s) {
  FmaScores<M> sum;
  clear(sum);
  float base = 0;
  for (int d = 0; d < columns; d += 4) {
    const auto w = *reinterpret_cast<const Pack<float>*>(shared.weight + d);
    base = add_quotients(w.x, {2, 2, 2, 2}, base);
    Pack<float> q[M::kRowsOf];
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) q[i] = query_pack<M>(shared, i, d);
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const auto k = key_pack<M>(shared, j, d);
      QKV_UNROLL
      for (int i = 0; i < M::kRowsOf; ++i) {
        float y[4];
        QKV_UNROLL
        for (int e = 0; e < 4; ++e) y[e] = divisor(q[i].x[e], k.x[e]);
        sum.x[i][j] = add_quotients(w.x, y, sum.x[i][j]);
      }
    }
  }
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      if (!is_far(shared, i, j)) s.x[i][j] += 2 * (base - sum.x[i][j]);
    }
  }
}

// By tanh, for pairs that are far.
template <class M>
QKV_DEVICE void far_piece(int columns, const PieceShared<M>& shared, FmaScores<M>& s) {
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      if (!is_far(shared, i, j)) continue;
      typename M::A sum = 0;
      for (int d = 0; d < columns; d += M::kPack) {
        const auto q = query_pack<M>(shared, i, d), k = key_pack<M>(shared, j, d);
        QKV_UNROLL
        for (int e = 0; e < M::kPack; ++e) {
          sum = multiply_add(shared.weight[d + e], static_cast<typename M::A>(tanh(q.x[e] + k.x[e])), sum);
        }
      }
      s.x[i][j] += sum;
    }
  }
}

// The scores of a tile of keys, of either kind, piece by piece.
template <class M>
QKV_DEVICE void score_pieces(const KernelArgs& args, const Task& task, int64_t j0, PieceShared<M>& shared,
                             FmaScores<M>& s) {
  const Problem& p = args.problem;
  clear(s);
  for (int64_t first = 0; first < p.D; first += M::kD) {
    const Piece piece{first, static_cast<int>(p.D - first < M::kD ? p.D - first : M::kD)};
    const int columns = (piece.n + 3) / 4 * 4;  // whole packs
    sync_block();
    bool direct = false;
    if (p.score == Score::additive) {
      load_weight(p, piece, shared);
      if constexpr (kExponentials<typename M::A>) {
        load_pieces<M, Form::Exponential>(args, task, j0, piece, shared);
        sync_block();
        near_piece<M>(columns, shared, s);
        bool any = shared.far_weight != 0;
        for (int w = 0; w < mask_words(M::kRows); ++w) any = any || shared.far_row[w];
        for (int w = 0; w < mask_words(M::kKeys); ++w) any = any || shared.far_key[w];
        if (!any) continue;
        sync_block();
      }
      direct = true;
    }
    load_pieces<M, Form::Itself>(args, task, j0, piece, shared);
    sync_block();
    if (direct) far_piece<M>(columns, shared, s);
    else score_tile<M>(columns, shared, s);
  }
}

}  // namespace qkv::inline QKV_LEVEL
