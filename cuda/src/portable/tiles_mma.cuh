// SPDX-License-Identifier: Apache-2.0
// What forward_mma.cuh works on: sizes of tiles, what a block shares and a warp holds, and how Q, K and V come to
// shared memory. Hopper's kernel (hopper/forward_wgmma.cuh) has sizes and copies of its own, and the same rows.
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
struct Seen {                                     // of a tile that some row does not wholly see
  uint32_t bits[M::kRows][mask_words(M::kKeys)];  // keys that a row sees
  uint32_t gone[M::kRows][mask_words(M::kKeys)];  // of these, what a bias of -inf hides
  uint32_t odd[3][M::kD][mask_words(M::kKeys)];   // keys whose value in a column is NaN, +inf or -inf
};

template <class M>
struct MmaShared {
  static constexpr int kRowBytes = M::kD * 2;
  char q[M::kParts * M::kRows * kRowBytes];
  char k[M::kStages][M::kParts * M::kKeys * kRowBytes];
  char v[M::kStages][M::kParts * M::kKeys * kRowBytes];
  Seen<M> seen;
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

template <class T>
struct alignas(16) Chunk {
  T x[16 / sizeof(T)];
};

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
QKV_DEVICE void load_queries(const KernelArgs& args, const Task& task, const Lanes<M::kRows>& lanes, char* q) {
  constexpr int kChunks = M::kD / 8;
  const Problem& p = args.problem;
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
    load_chunk(q + part * M::kQPart + chunk_offset<M>(row, chunk), p.q, from, n, args.plan.async_q);
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

}  // namespace qkv::inline QKV_LEVEL
