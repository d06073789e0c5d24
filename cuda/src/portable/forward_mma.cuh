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

#include "portable/scores.cuh"
#include "portable/visible.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element>
struct OutOf {
  using Type = uint16_t;
};
template <>
struct OutOf<Halves> {
  using Type = float;
};

template <class Element, int HeadDim, Height H>
struct MmaTile {
  using T = Element;
  static constexpr int kD = HeadDim;
  static constexpr int kThreads = 128;
  static constexpr bool kPairs = Element::kDType == DType::f32, kHopper = false;
  static constexpr int64_t kPartKeys = 0;  // a part may have any number of them
  QKV_DEVICE static void sync() { sync_block(); }
  static constexpr int kParts = kPairs ? 2 : 1;  // of an element, 16 bits each
  static constexpr bool kFew = H == Height::Few;
  // Few rows: one tile of 16, and each warp takes a quarter of the keys. Otherwise each warp takes its own rows, two
  // tiles of 16 where O leaves registers for S (see above).
  static constexpr int kKeyWarps = kFew ? 4 : 1, kRowWarps = 4 / kKeyWarps;
  static constexpr int kRowTiles = kFew || kD == 256 ? 1 : 2;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kKeys = kPairs || (!kFew && kD == 256) ? 32 : 64;  // many GPUs have 99 KiB of shared memory
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  // Decoding waits for memory: more tiles under way. Otherwise a second block per multiprocessor covers the wait.
  static constexpr int kStages = !kFew ? 1 : (kD == 64 ? 3 : (kD == 128 ? 2 : 1));
  // float16 ends at 2^-14: with p up to 2^15 what is lost below is beyond the last place of any float16 output.
  static constexpr int kLift = Element::kDType == DType::bf16 ? 0 : 15;
  // How far, in powers of two, the maximum may run ahead of m before O is multiplied. Above its lift float16 has no
  // room.
  static constexpr float kSlack = kLift > 0 ? 0 : 8;
  using Out = typename OutOf<Element>::Type;
  static constexpr int kQPart = kRows * kD * 2, kKeyPart = kKeys * kD * 2;  // bytes from h to l of a tile
  static constexpr int kKeyTiles = kWarpKeys / 8, kColumnTiles = kD / 8;    // of 8 columns: n of the two products
};

template <class M>
struct MmaShared {
  static constexpr int kRowBytes = M::kD * 2;
  char q[M::kParts * M::kRows * kRowBytes];
  char k[M::kStages][M::kParts * M::kKeys * kRowBytes];
  char v[M::kStages][M::kParts * M::kKeys * kRowBytes];
  uint32_t bits[M::kRows][mask_words(M::kKeys)];
  uint32_t gone[M::kRows][mask_words(M::kKeys)];  // of these, what a bias of -inf hides
  uint32_t odd[3][M::kD][mask_words(M::kKeys)];   // keys whose value in a column is NaN, +inf or -inf
  float unit[M::kPairs ? M::kRows : 1],
      v_unit;  // of pairs: the powers of two that scores and O are to be multiplied with
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

// Of chunk `chunk` of a row; on Hopper tiles lie in blocks of 64 columns.
template <class M>
QKV_DEVICE int chunk_offset(int row, int chunk, [[maybe_unused]] int rows) {
  if constexpr (M::kHopper) return chunk / 8 * rows * 128 + row * 128 + (chunk % 8 ^ (row & 7)) * 16;
  else return row * M::kD * 2 + (chunk ^ (row & 7)) * 16;
}
template <class M>
QKV_DEVICE int chunk_offset(int row, int chunk) {
  return chunk_offset<M>(row, chunk, M::kRows);
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
  constexpr int kChunks = M::kD / 8;
  if (thread_index() >= M::kThreads) return;
  const Problem& p = args.problem;
  const Lanes<M::kRows>& lanes = shared.lanes;
  const int64_t lead = lead_offset(p, p.q, task.batch), columns = M::kPairs ? halved_columns(p.D) : p.D;
  QKV_ROLLED
  for (int i = thread_index(); i < M::kParts * M::kRows * kChunks; i += M::kThreads) {
    const int part = i / (M::kRows * kChunks), row = i / kChunks % M::kRows, chunk = i % kChunks;
    const int n = lanes.alive[row] ? within(columns - chunk * 8, 8) : 0;
    const char* from = nullptr;
    if (n > 0) {
      const int64_t first = lead + lanes.head[row] * p.q.h + (task.seq.q_row + lanes.query[row]) * p.q.s;
      from = p.q.data + (first + part * columns + chunk * 8 * p.q.d) * 2;
    }
    load_chunk(shared.q + part * M::kQPart + chunk_offset<M>(row, chunk), p.q, from, n, args.plan.async_q);
  }
}

// Keys j0 ... of K or V, those at and beyond the end as 0; whole: all keys of the tile are there. A thread has the same
// chunk of keys kStep apart: in shared memory the distance is a constant, in device memory one addition.
template <class M>
QKV_DEVICE void load_tile(const View& view, const char* data, int64_t columns, int64_t j0, int64_t key_end, bool whole,
                          bool async, char* tile) {
  constexpr int kChunks = M::kD / 8, kStep = M::kThreads / kChunks;
  static_assert((kStep & (kStep - 1)) == 0);
  const int chunk = thread_index() % kChunks, first = thread_index() / kChunks;
  const int left = static_cast<int>(columns) - chunk * 8;
  const char* from = data + ((j0 + first) * view.s + chunk * (async ? 8 : 8 * view.d)) * 2;
  const int64_t step = kStep * view.s * 2;
  if (async && whole && left >= 8) {
    const int offset = chunk_offset<M>(first, chunk);
    QKV_UNROLL
    for (int i = 0; i < M::kKeys; i += kStep, from += step) {
      copy_async(tile + (offset ^ i % 8 * 16) + i * M::kD * 2, from);  // first < kStep: i has the other bits of the row
    }
    return;
  }
  const int keys = within(key_end - j0, M::kKeys), n = within(int64_t{left}, 8);
  QKV_ROLLED
  for (int i = first; i < M::kKeys; i += kStep, from += step) {
    load_chunk(tile + chunk_offset<M>(i, chunk), view, from, i < keys ? n : 0, async);
  }
}

template <class M>
QKV_DEVICE void load_parts(const MmaShared<M>& shared, const View& view, const char* data, int64_t columns, bool async,
                           uint32_t entry, char* tile) {
  const int64_t there = M::kPairs ? halved_columns(columns) : columns;
  QKV_UNROLL
  for (int part = 0; part < M::kParts; ++part) {
    load_tile<M>(view, data + part * there * 2, there, first_key<M::kKeys>(entry), shared.task.key_end,
                 !(entry & kPartial), async, tile + part * M::kKeyPart);
  }
}

template <class M>
QKV_DEVICE void load_keys(const KernelArgs& args, const MmaShared<M>& shared, uint32_t entry, char* tile) {
  load_parts<M>(shared, args.problem.k, shared.k_data, args.problem.D, args.plan.async_k, entry, tile);
}
template <class M>
QKV_DEVICE void load_values(const KernelArgs& args, const MmaShared<M>& shared, uint32_t entry, char* tile) {
  load_parts<M>(shared, args.problem.v, shared.v_data, args.problem.Dv, args.plan.async_v, entry, tile);
}

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

// m follows the maximum of the scores, but only where it falls behind by more than kSlack powers of two. Returns
// whether O has to follow, by alpha; l has.
template <class M>
QKV_DEVICE bool raise_maximum(float c, const Scores<M>& s, Rows<M>& rows, float (&alpha)[M::kRowTiles][2]) {
  bool moved = false;
  QKV_UNROLL
  for (int r = 0; r < M::kRowTiles; ++r) {
    QKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      float top = larger(s.x[r][0][half * 2], s.x[r][0][half * 2 + 1]);
      QKV_UNROLL
      for (int n = 1; n < M::kKeyTiles; ++n) {
        top = larger(top, larger(s.x[r][n][half * 2], s.x[r][n][half * 2 + 1]));
      }
      top = larger(top, shuffle_xor(top, 1));
      top = larger(top, shuffle_xor(top, 2));
      float& m = rows.m[r][half];
      const bool stays = (top - m) * c <= M::kSlack;        // false where nothing was seen yet
      const float next = top == -kInf<float> ? 0.0f : top;  // -inf + inf is not a number
      alpha[r][half] = stays ? 1.0f : power_of_two((m - next) * c);
      m = stays ? m : top;
      rows.l[r][half] *= alpha[r][half];
      moved = moved || !stays;
    }
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

// S becomes P = 2^(c (s - m)), lifted; l grows. c m is finite for plain scores alone (kernels.cc): they take one
// instruction to the exponent.
template <class M, bool General>
QKV_DEVICE void weigh(float c, Scores<M>& s, Rows<M>& rows) {
  constexpr float kLift = M::kLift;
  QKV_UNROLL
  for (int r = 0; r < M::kRowTiles; ++r) {
    QKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float m = rows.m[r][half] == -kInf<float> ? 0.0f : rows.m[r][half], shift = kLift - m * c;
      float sum = 0;
      QKV_UNROLL
      for (int n = 0; n < M::kKeyTiles; ++n) {
        QKV_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = s.x[r][n][half * 2 + e];
          x = power_of_two(General ? multiply_add(x - m, c, kLift) : multiply_add(x, c, shift));
          sum += x;
        }
      }
      rows.l[r][half] += sum;
    }
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
