// SPDX-License-Identifier: Apache-2.0
// Forward attention on tensor cores, for float16 and bfloat16.
//
//     s = scale q k^T,  s = softcap tanh(s / softcap),  s += bias - slope |p - j|,  s = -inf where masked
//     o = softmax(s) v,  lse = log sum exp(s)
//
// Shapes     q (Hq, Sq, D), k (Hkv, Sk, D), v (Hkv, Sk, Dv) per batch element, any strides; D, Dv <= kD.
// Parallel   over tasks (batch, kv head, kRows rows, range of keys), one block each; a row is a (query, head of the
//            group) pair, query-major. Warps share the rows among them; for few rows (decoding) the keys of a tile.
// Loop       for each visible tile of kKeys keys: S = Q K^T -> modify -> mask -> softmax -> O += P V. S, P and O stay
//            in registers: the accumulators of S are, packed, the left operand of the second product.
// Memory     shared, in 16 bits: Q kRows kD, and kStages tiles of K and of V, kKeys kD each, filled by cp.async while
//            the other is used: 64 KiB at D = 128. 16-byte chunks are swizzled: chunk c of row r lies at c ^ (r mod 8),
//            so that the eight rows ldmatrix reads lie in eight different groups of banks.
// Registers  of 255: O 4 kRowTiles kD / 8 = 128, S 4 kRowTiles kKeys / 8 = 64 at D = 128.
// Numerics   products of 16-bit numbers accumulated in float; p = 2^(c (s - m)) is rounded to 16 bits for the second
//            product, l is not; for float16 p, l and O are lifted by 2^15 until the end. Masked keys have p = 0
//            exactly. |error| <= u_out |o| + (u_p + 2 (sqrt(D) u max|q||k| scale + 2 u max|s|) + (8 + sqrt(Sk)) u) sum
//            p|v|.
// References Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao 2023 (arXiv 2307.08691); the PTX ISA for fragments.
#pragma once

#include "portable/scores.cuh"
#include "portable/visible.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element, int HeadDim, Height H>
struct MmaTile {
  using T = Element;
  static constexpr int kD = HeadDim;
  static constexpr int kThreads = 128;
  static constexpr bool kFew = H == Height::Few;
  // Few rows: one tile of 16, and each warp takes a quarter of the keys. Otherwise each warp takes its own rows, two
  // tiles of 16 where O leaves registers for S (see above).
  static constexpr int kKeyWarps = kFew ? 4 : 1, kRowWarps = 4 / kKeyWarps;
  static constexpr int kRowTiles = kFew || kD == 256 ? 1 : 2;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kKeys = !kFew && kD == 256 ? 32 : 64;  // 99 KiB of shared memory is what every GPU has
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  // Decoding waits for memory: more tiles under way. Otherwise a second block per multiprocessor covers the wait.
  static constexpr int kStages = !kFew ? 1 : (kD == 64 ? 3 : (kD == 128 ? 2 : 1));
  // float16 ends at 2^-14: with p up to 2^15 what is lost below is beyond the last place of any float16 output.
  static constexpr int kLift = Element::kDType == DType::f16 ? 15 : 0;
  static constexpr int kKeyTiles = kWarpKeys / 8, kColumnTiles = kD / 8;  // of 8 columns: n of the two products
};

template <class M>
struct MmaShared {
  static constexpr int kRowBytes = M::kD * 2;
  char q[M::kRows * kRowBytes];
  char k[M::kStages][M::kKeys * kRowBytes];
  char v[M::kStages][M::kKeys * kRowBytes];
  uint32_t bits[M::kRows][mask_words(M::kKeys)];
  uint32_t gone[M::kRows][mask_words(M::kKeys)];  // of these, what a bias of -inf hides
  uint32_t odd[3][M::kD][mask_words(M::kKeys)];   // keys whose value in a column is NaN, +inf or -inf
  TileList<M::kThreads> list;
  Lanes<M::kRows> lanes;
  Task task;                    // here and not in registers: O and S need those
  const char *k_data, *v_data;  // rows of key 0
};

template <class M>
struct Scores {  // of one warp: [row tile][8 keys][fragment C]
  float x[M::kRowTiles][M::kKeyTiles][4];
};

template <class M>
struct Rows {  // state of one warp's rows; index [row tile][half]: rows g and g + 8
  float o[M::kRowTiles][M::kColumnTiles][4];
  float m[M::kRowTiles][2], l[M::kRowTiles][2];  // l: this lane's columns only, until the end
};

struct Place {  // of a thread: lane 4 g + t of its warp
  int g, t, row0, key0;
};

template <class M>
QKV_DEVICE Place place_of_thread() {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  return {lane / 4, lane % 4, warp / M::kKeyWarps * 16 * M::kRowTiles, warp % M::kKeyWarps * M::kWarpKeys};
}

// --- tiles ---------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE int chunk_offset(int row, int chunk) {
  return row * M::kD * 2 + (chunk ^ (row & 7)) * 16;
}

// From the offset of (row, chunk 0 or 1) to that of (row + rows, chunk + chunks), rows a multiple of 8 and chunks of 2:
// four XORs for all of them. The distance of rows and of 8 chunks is a constant of the instruction.
template <class M>
QKV_DEVICE int moved(int offset, int rows, int chunks) {
  return (offset ^ (chunks % 8 * 16)) + rows * M::kD * 2 + chunks / 8 * 128;
}

// --- load ----------------------------------------------------------------------------------------------------

// One chunk of 8 elements, of which the first n are there and the others become 0.
QKV_DEVICE void load_chunk(char* to, const View& view, const char* from, int n, bool async) {
  if (async) {
    copy_async(to, n > 0 ? from : view.data, n * 2);
    return;
  }
  const auto* x = reinterpret_cast<const uint16_t*>(from);
  auto* y = reinterpret_cast<uint16_t*>(to);
  QKV_ROLLED
  for (int e = 0; e < 8; ++e) y[e] = e < n ? x[e * view.d] : uint16_t{0};
}

// How many elements of a chunk there are, and of the keys of a tile: 0 ... most.
QKV_DEVICE int within(int64_t left, int most) { return left < 0 ? 0 : (left < most ? static_cast<int>(left) : most); }

template <class M>
QKV_DEVICE void load_queries(const KernelArgs& args, const Task& task, MmaShared<M>& shared) {
  const Problem& p = args.problem;
  const Lanes<M::kRows>& lanes = shared.lanes;
  const int64_t lead = lead_offset(p, p.q, task.batch);
  QKV_ROLLED
  for (int i = thread_index(); i < M::kRows * (M::kD / 8); i += M::kThreads) {
    const int row = i / (M::kD / 8), chunk = i % (M::kD / 8);
    const int n = lanes.alive[row] ? within(p.D - chunk * 8, 8) : 0;
    const char* from = nullptr;
    if (n > 0) {
      const int64_t first = lead + lanes.head[row] * p.q.h + (task.seq.q_row + lanes.query[row]) * p.q.s;
      from = p.q.data + (first + chunk * 8 * p.q.d) * 2;
    }
    load_chunk(shared.q + chunk_offset<M>(row, chunk), p.q, from, n, args.plan.async_q);
  }
}

// Keys j0 ... of K or V, those at and beyond the end as 0. A thread has the same chunk of keys kStep apart.
template <class M>
QKV_DEVICE void load_tile(const View& view, const char* data, int64_t columns, int64_t j0, int64_t key_end, bool async,
                          char* tile) {
  constexpr int kChunks = M::kD / 8, kStep = M::kThreads / kChunks;
  const int chunk = thread_index() % kChunks, first = thread_index() / kChunks;
  const int n = within(columns - chunk * 8, 8), keys = within(key_end - j0, M::kKeys);
  const char* from = data + ((j0 + first) * view.s + chunk * 8 * view.d) * 2;
  const auto load = [&](int key, bool asynchronous) {
    load_chunk(tile + chunk_offset<M>(key, chunk), view, from, key < keys ? n : 0, asynchronous);
    from += kStep * view.s * 2;
  };
  if (async) {
    QKV_UNROLL
    for (int i = 0; i < M::kKeys; i += kStep) load(first + i, true);
  } else {
    QKV_ROLLED
    for (int i = 0; i < M::kKeys; i += kStep) load(first + i, false);
  }
}

template <class M>
QKV_DEVICE void load_keys(const KernelArgs& args, const MmaShared<M>& shared, int64_t j0, char* tile) {
  const Problem& p = args.problem;
  load_tile<M>(p.k, shared.k_data, p.D, j0, shared.task.key_end, args.plan.async_k, tile);
}
template <class M>
QKV_DEVICE void load_values(const KernelArgs& args, const MmaShared<M>& shared, int64_t j0, char* tile) {
  const Problem& p = args.problem;
  load_tile<M>(p.v, shared.v_data, p.Dv, j0, shared.task.key_end, args.plan.async_v, tile);
}

// --- scores --------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE void score_tile(SharedAddress q, SharedAddress k, const Place& at, Scores<M>& s) {
  const int lane = at.g * 4 + at.t;
  const int q_offset = chunk_offset<M>(at.row0 + lane % 16, lane / 16);
  const int k_offset = chunk_offset<M>(at.key0 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  QKV_UNROLL
  for (int r = 0; r < M::kRowTiles; ++r) {
    QKV_UNROLL
    for (int n = 0; n < M::kKeyTiles; ++n) {
      QKV_UNROLL
      for (int e = 0; e < 4; ++e) s.x[r][n][e] = 0;
    }
  }
  QKV_UNROLL
  for (int d = 0; d < M::kD / 16; ++d) {
    uint32_t a[M::kRowTiles][4];
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) {
      load_matrices(a[r], q + moved<M>(q_offset, r * 16, d * 2));
    }
    QKV_UNROLL
    for (int n = 0; n < M::kKeyTiles; n += 2) {
      uint32_t b[4];  // of 16 keys: two of n
      load_matrices(b, k + moved<M>(k_offset, n * 8, d * 2));
      QKV_UNROLL
      for (int r = 0; r < M::kRowTiles; ++r) {
        multiply_add<typename M::T>(s.x[r][n], a[r], b[0], b[1]);
        multiply_add<typename M::T>(s.x[r][n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

template <class M>
QKV_DEVICE void modify_scores(const KernelArgs& args, const Task& task, const ScoreRule<float>& rule,
                              const Lanes<M::kRows>& lanes, int64_t j0, Scores<M>& s) {
  constexpr int kEach = M::kKeyTiles * 2;  // of this thread in a row
  const Place at = place_of_thread<M>();
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int r = i / 2, half = i % 2, row = at.row0 + r * 16 + half * 8 + at.g;
    if (!lanes.alive[row]) continue;
    const auto key_of = [&](int e) { return j0 + at.key0 + e / 2 * 8 + at.t * 2 + e % 2; };
    float x[kEach];
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) x[e] = s.x[r][e / 2][half * 2 + e % 2];
    modify_row(args.problem, rule, row_terms<float>(args.problem, lanes, row), task.key_end, key_of, x);
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) s.x[r][e / 2][half * 2 + e % 2] = x[e];
  }
}

// --- mask ----------------------------------------------------------------------------------------------------

// Which keys of a tile do its rows see?
template <class M>
QKV_DEVICE void look_closer(const KernelArgs& args, int64_t j0, MmaShared<M>& shared) {
  look<M::kKeys, M::kThreads>(args, shared.task, shared.lanes, j0, shared.bits);
  auto* const words = reinterpret_cast<uint32_t*>(shared.gone);
  for (int i = thread_index(); i < M::kRows * mask_words(M::kKeys); i += M::kThreads) words[i] = 0;
}

// What is -inf by its bias is not seen either: that is noted for whoever asks afterwards.
template <class M>
QKV_DEVICE void mask_scores(const Place& at, MmaShared<M>& shared, Scores<M>& s) {
  constexpr int kWordTiles = M::kKeyTiles < 4 ? M::kKeyTiles : 4;  // tiles of 8 keys in a word
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int r = i / 2, half = i % 2;
    QKV_UNROLL
    for (int w = 0; w < M::kKeyTiles / kWordTiles; ++w) {
      const int row = at.row0 + r * 16 + half * 8 + at.g, word = at.key0 / 32 + w, first = at.key0 % 32 + at.t * 2;
      const uint32_t own = shared.bits[row][word] >> first;  // bits 8 n and 8 n + 1 are this lane's
      uint32_t gone = 0;
      QKV_UNROLL
      for (int n = 0; n < kWordTiles; ++n) {
        QKV_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = s.x[r][w * kWordTiles + n][half * 2 + e];
          gone |= static_cast<uint32_t>(x == -kInf<float>) << (n * 8 + e);
          x = own >> (n * 8 + e) & 1 ? x : -kInf<float>;
        }
      }
      if (gone) atomic_or(&shared.gone[row][word], gone << first);
    }
  }
}

// --- softmax -------------------------------------------------------------------------------------------------

// S becomes P = 2^(c (s - m)), lifted; m, l and O move to the new maximum.
template <class M>
QKV_DEVICE void softmax(float c, Scores<M>& s, Rows<M>& rows) {
  QKV_UNROLL
  for (int r = 0; r < M::kRowTiles; ++r) {
    float alpha[2];
    QKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      float top = rows.m[r][half];
      QKV_UNROLL
      for (int n = 0; n < M::kKeyTiles; ++n) {
        top = larger(top, larger(s.x[r][n][half * 2], s.x[r][n][half * 2 + 1]));
      }
      top = larger(top, shuffle_xor(top, 1));
      top = larger(top, shuffle_xor(top, 2));
      const float m = top == -kInf<float> ? 0.0f : top;  // nothing seen yet: -inf + inf is not a number
      alpha[half] = power_of_two((rows.m[r][half] - m) * c);
      rows.m[r][half] = top;
      float sum = 0;
      QKV_UNROLL
      for (int n = 0; n < M::kKeyTiles; ++n) {
        QKV_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = s.x[r][n][half * 2 + e];
          x = power_of_two(multiply_add(x - m, c, static_cast<float>(M::kLift)));
          sum += x;
        }
      }
      rows.l[r][half] = rows.l[r][half] * alpha[half] + sum;
    }
    if (!any_in_warp(alpha[0] != 1 || alpha[1] != 1)) continue;
    QKV_UNROLL
    for (int d = 0; d < M::kColumnTiles; ++d) {
      QKV_UNROLL
      for (int e = 0; e < 4; ++e) rows.o[r][d][e] *= alpha[e / 2];
    }
  }
}

// --- accumulate ----------------------------------------------------------------------------------------------

// Fragment A of 16 keys from two fragments C.
template <class M>
QKV_DEVICE void pack_weights(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = pack<typename M::T>(low[0], low[1]);
  a[1] = pack<typename M::T>(low[2], low[3]);
  a[2] = pack<typename M::T>(high[0], high[1]);
  a[3] = pack<typename M::T>(high[2], high[3]);
}

template <class M>
QKV_DEVICE int value_offset(const Place& at) {
  const int lane = at.g * 4 + at.t;
  return chunk_offset<M>(at.key0 + lane % 16, lane / 16);
}

// O += P V
template <class M>
QKV_DEVICE void accumulate(SharedAddress v, const Place& at, const Scores<M>& p, Rows<M>& rows) {
  const int offset = value_offset<M>(at);
  uint32_t a[M::kKeyTiles / 2][M::kRowTiles][4];  // all of P: half the registers that S had
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles; n += 2) {
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) pack_weights<M>(p.x[r][n], p.x[r][n + 1], a[n / 2][r]);
  }
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles; n += 2) {
    QKV_UNROLL
    for (int d = 0; d < M::kColumnTiles; d += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, v + moved<M>(offset, n * 8, d));
      QKV_UNROLL
      for (int r = 0; r < M::kRowTiles; ++r) {
        multiply_add<typename M::T>(rows.o[r][d], a[n / 2][r], b[0], b[1]);
        multiply_add<typename M::T>(rows.o[r][d + 1], a[n / 2][r], b[2], b[3]);
      }
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
