// SPDX-License-Identifier: Apache-2.0
// Forward attention on tensor cores, for float16, bfloat16 and, as pairs of float16 (halves.cuh), float32.
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
//            so that the eight rows ldmatrix reads lie in eight different groups of banks. Pairs: first all h of a
//            tile, then all l; tiles of half as many keys, 96 KiB at D = 128.
// Registers  of 255: O 4 kRowTiles kD / 8 = 128, S 4 kRowTiles kKeys / 8 = 64 at D = 128.
// Numerics   products of 16-bit numbers accumulated in float; p = 2^(c (s - m)) is rounded to 16 bits for the second
//            product, l is not; for float16 p, l and O are lifted by 2^15 until the end. Masked keys have p = 0
//            exactly. |error| <= u_out |o| + (u_p + 2 (sqrt(D) u max|q||k| scale + 2 u max|s|) + (8 + sqrt(Sk)) u) sum
//            p|v|.
// References Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao 2023 (arXiv 2307.08691); the PTX ISA for fragments.
#pragma once

#include "portable/tiles_mma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- scores --------------------------------------------------------------------------------------------------

// c(r, i) += a b for all row tiles and the two tiles of 8 columns in b; of pairs the small products first.
template <class M, class Sums>
QKV_DEVICE void multiply_tiles(const Sums& c, const uint32_t (&a)[M::kParts][M::kRowTiles][4],
                               const uint32_t (&b)[M::kParts][4]) {
  const auto product = [&](int of_a, int of_b) {
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) {
      QKV_UNROLL
      for (int i = 0; i < 2; ++i) multiply_add<typename M::T>(c(r, i), a[of_a][r], b[of_b][i * 2], b[of_b][i * 2 + 1]);
    }
  };
  if constexpr (M::kPairs) product(1, 0);
  if constexpr (M::kPairs) product(0, 1);
  product(0, 0);
}

template <class M>
QKV_DEVICE void score_tile(SharedAddress q, SharedAddress k, const Place& at, const MmaShared<M>& shared,
                           Scores<M>& s) {
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
  // Fragments are loaded a step of 16 keys ahead: there are few warps to cover the wait for shared memory.
  constexpr int kSteps = M::kKeyTiles / 2, kAll = M::kD / 16 * kSteps;
  uint32_t a[2][M::kParts][M::kRowTiles][4], b[2][M::kParts][4];
  const auto load = [&](int step) {
    const int d = step / kSteps, n = step % kSteps * 2;
    QKV_UNROLL
    for (int part = 0; part < M::kParts; ++part) {
      QKV_UNROLL
      for (int r = 0; r < M::kRowTiles && n == 0; ++r) {
        load_matrices(a[d % 2][part][r], q + part * M::kQPart + moved<M>(q_offset, r * 16, d * 2));
      }
      load_matrices(b[step % 2][part], k + part * M::kKeyPart + moved<M>(k_offset, n * 8, d * 2));
    }
  };
  load(0);
  QKV_UNROLL
  for (int step = 0; step < kAll; ++step) {
    if (step + 1 < kAll) load(step + 1);
    const int n = step % kSteps * 2;
    multiply_tiles<M>([&](int r, int i) -> float (&)[4] { return s.x[r][n + i]; }, a[step / kSteps % 2], b[step % 2]);
  }
  if constexpr (M::kPairs) {
    QKV_UNROLL
    for (int i = 0; i < M::kRowTiles * 2; ++i) {
      const float unit = shared.unit[at.row0 + i * 8 + at.g];
      QKV_UNROLL
      for (int n = 0; n < M::kKeyTiles; ++n) {
        QKV_UNROLL
        for (int e = 0; e < 2; ++e) s.x[i / 2][n][i % 2 * 2 + e] *= unit;
      }
    }
  }
}

template <class M>
QKV_DEVICE void modify_scores(const KernelArgs& args, const Task& task, const ScoreRule<float>& rule,
                              const Lanes<M::kRows>& lanes, int64_t j0, Scores<M>& s) {
  constexpr int kEach = M::kKeyTiles * 2;  // of this thread in a row
  const Place at = place_of_thread<M>();
  const int row0 = unknown(at.row0);  // else addresses of rows stay in registers from tile to tile
  const int64_t first = j0 + at.key0 + at.t * 2;
  const auto offset_of = [](int e) { return e / 2 * 8 + e % 2; };
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int r = i / 2, half = i % 2, row = row0 + r * 16 + half * 8 + at.g;
    if (!lanes.alive[row]) continue;
    float x[kEach];
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) x[e] = s.x[r][e / 2][half * 2 + e % 2];
    modify_row(args.problem, rule, row_terms<float>(args.problem, lanes, row), task.key_end, first, offset_of, x);
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) s.x[r][e / 2][half * 2 + e % 2] = x[e];
  }
}

// --- mask ----------------------------------------------------------------------------------------------------

// Which keys of a tile do its rows see?
template <class M>
QKV_DEVICE void look_closer(const KernelArgs& args, const Task& task, const Lanes<M::kRows>& lanes, int64_t j0,
                            Seen<M>& seen) {
  look<M::kKeys>(args, task, lanes, j0, seen.bits, thread_index(), M::kThreads);
  auto* const words = reinterpret_cast<uint32_t*>(seen.gone);
  QKV_ROLLED
  for (int i = thread_index(); i < M::kRows * mask_words(M::kKeys); i += M::kThreads) words[i] = 0;
}

// Which of the keys that a row sees are -inf already, by their bias, is told to gone(row, word, bits).
template <class M, class Gone>
QKV_DEVICE void mask_scores(const Place& at, const uint32_t (&bits)[M::kRows][mask_words(M::kKeys)], const Gone& gone,
                            Scores<M>& s) {
  constexpr int kWordTiles = M::kKeyTiles < 4 ? M::kKeyTiles : 4;  // tiles of 8 keys in a word
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int r = i / 2, half = i % 2;
    QKV_UNROLL
    for (int w = 0; w < M::kKeyTiles / kWordTiles; ++w) {
      const int row = at.row0 + r * 16 + half * 8 + at.g, word = at.key0 / 32 + w, first = at.key0 % 32 + at.t * 2;
      const uint32_t own = bits[row][word] >> first;  // bits 8 n and 8 n + 1 are this lane's
      uint32_t infinite = 0;
      QKV_UNROLL
      for (int n = 0; n < kWordTiles; ++n) {
        QKV_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = s.x[r][w * kWordTiles + n][half * 2 + e];
          infinite |= static_cast<uint32_t>(x == -kInf<float>) << (n * 8 + e);
          x = own >> (n * 8 + e) & 1 ? x : -kInf<float>;
        }
      }
      gone(row, word, infinite << first);
    }
  }
}

// What is -inf by its bias is not seen either: that is noted for whoever asks afterwards.
template <class M>
QKV_DEVICE void mask_scores(const Place& at, Seen<M>& seen, Scores<M>& s) {
  const auto note = [&](int row, int word, uint32_t gone) {
    if (gone) atomic_or(&seen.gone[row][word], gone);
  };
  mask_scores<M>(at, seen.bits, note, s);
}

// --- softmax -------------------------------------------------------------------------------------------------

template <class M>
using RowTerm = float[M::kRowTiles * 2];

// m follows the maximum of the scores, but only where it falls behind by more than kSlack powers of two. Returns
// whether O has to follow, by alpha; l has.
template <class M>
QKV_DEVICE bool raise_maximum(float c, const Scores<M>& s, Rows<M>& rows, float (&alpha)[M::kRowTiles][2]) {
  RowTerm<M> top;
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const auto pair = [&](int n) { return larger(s.x[i / 2][n][i % 2 * 2], s.x[i / 2][n][i % 2 * 2 + 1]); };
    top[i] = pair(0);
    QKV_UNROLL
    for (int n = 1; n < M::kKeyTiles; ++n) top[i] = larger(top[i], pair(n));
  }
  QKV_UNROLL
  for (int lanes = 1; lanes <= 2; lanes *= 2) {  // of all rows at once: each waits long for its answer
    QKV_UNROLL
    for (int i = 0; i < M::kRowTiles * 2; ++i) top[i] = larger(top[i], shuffle_xor(top[i], lanes));
  }
  bool moved = false;
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    float &m = rows.m[i / 2][i % 2], &factor = alpha[i / 2][i % 2];
    const bool stays = (top[i] - m) * c <= M::kSlack;           // false where nothing was seen yet
    const float next = top[i] == -kInf<float> ? 0.0f : top[i];  // -inf + inf is not a number
    factor = stays ? 1.0f : power_of_two((m - next) * c);
    m = stays ? m : top[i];
    rows.l[i / 2][i % 2] *= factor;
    moved = moved || !stays;
  }
  return any_in_warp(moved);
}

template <class M>
QKV_DEVICE void rescale(const float (&alpha)[M::kRowTiles][2], Rows<M>& rows) {
  QKV_UNROLL
  for (int r = 0; r < M::kRowTiles; ++r) {
    QKV_UNROLL
    for (int i = 0; i < M::kColumnTiles * 4; ++i) rows.o[r][i / 4][i % 4] *= alpha[r][i % 4 / 2];
  }
}

// S becomes P = 2^(c (s - m)), lifted; l grows. The exponent is c s + shift: that is one instruction, but rounds c m;
// where it is large, m is taken off s first. All of a warp go the same way.
template <class M>
QKV_DEVICE void weigh(float c, Scores<M>& s, Rows<M>& rows) {
  constexpr float kLift = M::kLift, kFar = 1 << 20;
  const auto maximum = [&](int i) {
    const float m = rows.m[i / 2][i % 2];
    return m == -kInf<float> ? 0.0f : m;  // nothing seen yet
  };
  const auto score = [&](int i, int e) -> float& { return s.x[i / 2][e / 2][i % 2 * 2 + e % 2]; };
  RowTerm<M> shift;
  bool far = false;
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const float cm = maximum(i) * c;
    far = far || fabs(cm) > kFar;
    shift[i] = kLift - cm;
  }
  far = any_in_warp(far);
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    if (far) {
      QKV_UNROLL
      for (int e = 0; e < M::kKeyTiles * 2; ++e) score(i, e) -= maximum(i);
      shift[i] = kLift;
    }
    float sum = 0;
    QKV_UNROLL
    for (int e = 0; e < M::kKeyTiles * 2; ++e) {
      score(i, e) = power_of_two(multiply_add(score(i, e), c, shift[i]));
      sum += score(i, e);
    }
    rows.l[i / 2][i % 2] += sum;
  }
}

// --- accumulate ----------------------------------------------------------------------------------------------

// Fragment A of 16 keys from two fragments C, h and l of pairs.
template <class M>
QKV_DEVICE void pack_weights(const float (&low)[4], const float (&high)[4], uint32_t (&a)[M::kParts][M::kRowTiles][4],
                             int r) {
  const auto pair = [&](int i, float x, float y) {
    a[0][r][i] = pack<typename M::T>(x, y);
    if constexpr (M::kPairs) {
      float h[2];
      unpack(a[0][r][i], h);
      a[1][r][i] = pack<typename M::T>(x - h[0], y - h[1]);
    }
  };
  pair(0, low[0], low[1]);
  pair(1, low[2], low[3]);
  pair(2, high[0], high[1]);
  pair(3, high[2], high[3]);
}

template <class M>
QKV_DEVICE int value_offset(const Place& at) {
  const int lane = at.g * 4 + at.t;
  return chunk_offset<M>(at.key0 + lane % 16, lane / 16);
}

// O += P V. Of pairs the sum of a tile joins O as a whole: tensor cores truncate their sums, and what is lost would
// grow with the keys.
template <class M>
QKV_DEVICE void accumulate(SharedAddress v, const Place& at, const Scores<M>& p, Rows<M>& rows) {
  const int offset = value_offset<M>(at);
  uint32_t a[M::kKeyTiles / 2][M::kParts][M::kRowTiles][4];  // all of P: half the registers that S had
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles; n += 2) {
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) pack_weights<M>(p.x[r][n], p.x[r][n + 1], a[n / 2], r);
  }
  constexpr int kKeySteps = M::kKeyTiles / 2, kColumnSteps = M::kColumnTiles / 2, kAll = kKeySteps * kColumnSteps;
  // Pairs stay with 16 columns until their sum is whole; otherwise no product waits for the one before it.
  const auto key_step = [](int step) { return M::kPairs ? step % kKeySteps : step / kColumnSteps; };
  const auto column_step = [](int step) { return M::kPairs ? step / kKeySteps : step % kColumnSteps; };
  uint32_t b[2][M::kParts][4];
  const auto load = [&](int step) {
    QKV_UNROLL
    for (int part = 0; part < M::kParts; ++part) {
      load_matrices_transposed(b[step % 2][part],
                               v + part * M::kKeyPart + moved<M>(offset, key_step(step) * 16, column_step(step) * 2));
    }
  };
  load(0);
  float sum[M::kRowTiles][2][4];
  QKV_UNROLL
  for (int step = 0; step < kAll; ++step) {
    if (step + 1 < kAll) load(step + 1);
    const int n = key_step(step), d = column_step(step) * 2;
    if constexpr (M::kPairs) {
      QKV_UNROLL
      for (int i = 0; i < M::kRowTiles * 8 && n == 0; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0;
      multiply_tiles<M>([&](int r, int i) -> float (&)[4] { return sum[r][i]; }, a[n], b[step % 2]);
      QKV_UNROLL
      for (int i = 0; i < M::kRowTiles * 8 && n == kKeySteps - 1; ++i) {
        rows.o[i / 8][d + i / 4 % 2][i % 4] += sum[i / 8][i / 4 % 2][i % 4];
      }
    } else {
      multiply_tiles<M>([&](int r, int i) -> float (&)[4] { return rows.o[r][d + i]; }, a[n], b[step % 2]);
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
