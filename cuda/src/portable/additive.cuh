// SPDX-License-Identifier: Apache-2.0
// Additive scores: what takes the place of S = Q K^T in the loop of forward_fma.cuh.
//
//     s = sum over d of w_d tanh(q_d + k_d)          q, k, w in A; the scale is in w
//
// Float      by the identity of qkv/additive.h, with rcp.approx: it is within its share of the bound as it is. Double
//            takes tanh always.
// Pieces     D has no limit: rows of Q and K pass through shared memory kD columns at a time, Q once more for each tile
//            of keys, and the sum goes on from piece to piece. The unit of the inverses is that of all weights.
// Far        Decided for a piece of a query or key. A block that holds a far one loads the piece again, as it is.
// Memory     w and c, kD each, and a bit for each row and key, beside the buffers of forward_fma.cuh.
// Cost       per four terms of a pair: 4 fma, 8 products and sums, one reciprocal; 8 minima and maxima where the block
//            holds a number beyond kNear.
#pragma once

#include "portable/focus.cuh"
#include "portable/forward_fma.cuh"
#include "qkv/additive.h"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class A>
constexpr bool kExponentials = sizeof(A) == 4;  // float; double takes tanh

struct Piece {  // columns first ... first + n - 1 of q and k
  int64_t first;
  int n;
};

template <class M>
struct PieceShared : FmaShared<M> {
  alignas(16) typename M::A weight[M::kD];   // of a piece: w times the scale, 0 beyond D
  alignas(16) typename M::A inverse[M::kD];  // c; kMostDivisor where w counts as 0
  typename M::A of_warp[M::kThreads / 32];
  InverseUnit unit;  // not usual: all take tanh
  FocusRange focus;
  uint32_t far_row[mask_words(M::kRows)], far_key[mask_words(M::kKeys)];
  uint32_t beyond_near;  // is some row or key?
};

// --- load ----------------------------------------------------------------------------------------------------

// join over all threads, in an order that is always the same; all call it.
template <class M, class Join>
QKV_DEVICE float over_block(float x, PieceShared<M>& shared, const Join& join) {
  for (int lanes = 1; lanes < 32; lanes *= 2) x = join(x, shuffle_xor(x, lanes));
  sync_block();
  if (thread_index() % 32 == 0) shared.of_warp[thread_index() / 32] = x;
  sync_block();
  float all = shared.of_warp[0];
  for (int w = 1; w < M::kThreads / 32; ++w) all = join(all, shared.of_warp[w]);
  return all;
}

// Once for a block, before the first piece; all threads call it.
template <class M>
QKV_DEVICE void find_unit(const Problem& p, PieceShared<M>& shared) {
  const auto size = [&](int64_t d) {
    const float w = fabsf(static_cast<float>(p.weight[d] * p.scale));
    return w <= kInf<float> ? w : kInf<float>;  // what is not a number is not lost among the maxima
  };
  float most = 0, ignored = 0;
  QKV_ROLLED
  for (int64_t d = thread_index(); d < p.D; d += M::kThreads) most = larger(most, size(d));
  most = over_block<M>(most, shared, [](float a, float b) { return larger(a, b); });
  InverseUnit x = inverse_unit(most);
  QKV_ROLLED
  for (int64_t d = thread_index(); d < p.D; d += M::kThreads) ignored += size(d) < x.unit ? size(d) : 0;
  ignored = over_block<M>(ignored, shared, [](float a, float b) { return a + b; });
  x.usual = x.usual && ignored <= most * kNegligible;
  if (thread_index() == 0) shared.unit = x;
  sync_block();
}

// A piece of each row, of any dtype, as put(row, d, x); 0 beyond its columns and in rows without a source.
template <class M, class RowOf, class Put>
QKV_DEVICE void load_piece(int rows, const View& view, Piece piece, const RowOf& row_of, const Put& put) {
  for (int i = thread_index(); i < rows * M::kD; i += M::kThreads) {
    const int row = i / M::kD, d = i % M::kD;
    const char* const from = d < piece.n ? row_of(row) : nullptr;
    put(row, d, from ? load_as<typename M::A>(from, view.dtype, (piece.first + d) * view.d) : 0);
  }
}

enum class Form { Itself, Exponential };  // q and k, or e^2q and c e^2k

// e^2x, of a row that may be far by it.
QKV_DEVICE float exponential(float x, int row, uint32_t* far, bool& beyond_near) {
  beyond_near = beyond_near || !(fabsf(x) <= kNear);
  if (!(fabsf(x) <= kFar)) atomic_or(&far[row / 32], 1u << (row % 32));
  return expf(x + x);
}

QKV_DEVICE float factor(float c) { return c == kMostDivisor ? 0.0f : c; }

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
  bool beyond_near = false;
  load_piece<M>(M::kRows, p.q, piece, query, [&](int row, int d, typename M::A x) {
    if constexpr (F == Form::Exponential) x = exponential(x, row, shared.far_row, beyond_near);
    shared.q[row * M::kLd + d] = x;
  });
  load_piece<M>(M::kKeys, p.k, piece, key, [&](int row, int d, typename M::A x) {
    if constexpr (F == Form::Exponential)
      x = exponential(x, row, shared.far_key, beyond_near) * factor(shared.inverse[d]);
    shared.kv[row * M::kLd + d] = x;
  });
  if (beyond_near) atomic_or(&shared.beyond_near, 1u);
}

// Nobody may read the piece before any more; all may read this one afterwards.
template <class M>
QKV_DEVICE void load_weight(const Problem& p, Piece piece, PieceShared<M>& shared) {
  using A = typename M::A;
  for (int i = thread_index(); i < mask_words(M::kRows); i += M::kThreads) shared.far_row[i] = 0;
  for (int i = thread_index(); i < mask_words(M::kKeys); i += M::kThreads) shared.far_key[i] = 0;
  if (thread_index() == 0) shared.beyond_near = 0;
  for (int d = thread_index(); d < M::kD; d += M::kThreads) {
    const auto w = static_cast<A>(d < piece.n ? p.weight[piece.first + d] * p.scale : 0);
    shared.weight[d] = w;
    if constexpr (kExponentials<A>) {
      shared.inverse[d] = fabsf(w) >= shared.unit.unit ? shared.unit.unit / w : kMostDivisor;
    }
  }
  sync_block();
}

// --- scores --------------------------------------------------------------------------------------------------

// acc + 1 / z0 + 1 / z1 + 1 / z2 + 1 / z3.
QKV_DEVICE float add_inverses(const float (&z)[4], float acc) {
  const float s = z[0] + z[1], p = z[0] * z[1], s2 = z[2] + z[3], p2 = z[2] * z[3];
  return multiply_add(multiply_add(s, p2, s2 * p), reciprocal(p * p2), acc);
}

template <bool kLimited>
QKV_DEVICE float denominator(float e, float f, float c) {
  const float z = multiply_add(e, f, c);
  return kLimited ? fmaxf(-kMostDivisor, fminf(z, kMostDivisor)) : z;
}

// Does the pair of row y + 16 i and key x + 16 j take tanh itself?
template <class M>
QKV_DEVICE bool is_far(const PieceShared<M>& shared, int i, int j) {
  const int row = thread_index() / 16 + 16 * i, key = thread_index() % 16 + 16 * j;
  return !kExponentials<typename M::A> || !shared.unit.usual || (shared.far_row[row / 32] >> (row % 32) & 1) ||
         (shared.far_key[key / 32] >> (key % 32) & 1);
}

// From the exponentials, for pairs that are not far: s += 2 unit (sum of 1 / z at tanh = 0 - sum of 1 / z).
template <class M, bool kLimited>
QKV_DEVICE void near_piece(int columns, const PieceShared<M>& shared, FmaScores<M>& s) {
  FmaScores<M> sum;
  clear(sum);
  float base = 0;
  for (int d = 0; d < columns; d += 4) {
    const auto c = *reinterpret_cast<const Pack<float>*>(shared.inverse + d);
    const float at_zero[4] = {factor(c.x[0]) + c.x[0], factor(c.x[1]) + c.x[1], factor(c.x[2]) + c.x[2],
                              factor(c.x[3]) + c.x[3]};
    base = add_inverses(at_zero, base);
    Pack<float> q[M::kRowsOf];
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) q[i] = query_pack<M>(shared, i, d);
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const auto k = key_pack<M>(shared, j, d);
      QKV_UNROLL
      for (int i = 0; i < M::kRowsOf; ++i) {
        float z[4];
        QKV_UNROLL
        for (int e = 0; e < 4; ++e) z[e] = denominator<kLimited>(k.x[e], q[i].x[e], c.x[e]);
        sum.x[i][j] = add_inverses(z, sum.x[i][j]);
      }
    }
  }
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      if (!is_far(shared, i, j)) s.x[i][j] = multiply_add(base - sum.x[i][j], 2 * shared.unit.unit, s.x[i][j]);
    }
  }
}

// By tanh, for pairs that are far: rare, so that one text does for all pairs of a thread.
template <class M>
QKV_DEVICE void far_piece(int columns, const PieceShared<M>& shared, FmaScores<M>& s) {
  constexpr int kPairs = M::kRowsOf * FmaScores<M>::kPerThread;
  QKV_ROLLED
  for (int pair = 0; pair < kPairs; ++pair) {
    const int i = pair / FmaScores<M>::kPerThread, j = pair % FmaScores<M>::kPerThread;
    if (!is_far(shared, i, j)) continue;
    typename M::A sum = 0;
    QKV_ROLLED
    for (int d = 0; d < columns; d += M::kPack) {
      const auto q = query_pack<M>(shared, i, d), k = key_pack<M>(shared, j, d);
      QKV_UNROLL
      for (int e = 0; e < M::kPack; ++e) {
        sum = multiply_add(shared.weight[d + e], static_cast<typename M::A>(tanh(q.x[e] + k.x[e])), sum);
      }
    }
    QKV_UNROLL
    for (int at = 0; at < kPairs; ++at) {  // s is in registers, which have no index
      if (at == pair) s.x[at / FmaScores<M>::kPerThread][at % FmaScores<M>::kPerThread] += sum;
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
        if (shared.beyond_near) near_piece<M, true>(columns, shared, s);
        else near_piece<M, false>(columns, shared, s);
        bool any = !shared.unit.usual;
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
