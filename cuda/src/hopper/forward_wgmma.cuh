// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper's tensor cores, for float16 and bfloat16.
//
//     s = scale q k^T,  s = softcap tanh(s / softcap),  s += bias - slope |p - j|,  s = -inf where masked
//     o = softmax(s) v,  lse = log sum exp(s)
//
// Shapes     q (Hq, Sq, D), k (Hkv, Sk, D), v (Hkv, Sk, Dv) per batch element, any strides; D, Dv <= kD.
// Parallel   over tasks as in forward_mma.cuh, one block each and one block per multiprocessor: two warpgroups with 64
//            rows each, and one that only copies.
// Loop       for each visible tile of kKeys keys: S = Q K^T -> modify -> mask -> softmax -> O += P V, where the product
// of
//            the next K runs beside that of this V, and both beside the other warpgroup's softmax.
// Memory     shared: Q kRows kD, and two tiles of K and of V, kKeys kD each, in blocks of 64 columns
// (device/hopper.cuh);
//            160 KiB at D = 128. Barriers say when a tile has come, and when both warpgroups have done with it.
// Registers  of 240: S 64, P 32 (the tile before), O kD / 2. The copying warpgroup leaves its own to the others.
// Numerics   those of forward_mma.cuh: products of 16-bit numbers accumulated in float, p rounded to 16 bits.
// References Shah et al. 2024 (arXiv 2407.08608); the PTX ISA for wgmma and its matrices in shared memory.
#pragma once

#include "device/hopper.cuh"
#include "portable/results_mma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element, int HeadDim>
struct WgmmaTile {
  using T = Element;
  using Out = uint16_t;
  static constexpr int kD = HeadDim, kThreads = 256, kCopiers = 64, kAll = kThreads + 2 * kCopiers;
  static constexpr bool kPairs = false, kFew = false, kHopper = true;
  static constexpr int kParts = 1, kKeyWarps = 1, kRowTiles = 1, kRows = 128, kStages = 2;
  static constexpr int kKeys = kD == 256 ? 64 : 128, kWarpKeys = kKeys;
  static constexpr int kLift = Element::kDType == DType::bf16 ? 0 : 15;
  static constexpr float kSlack = kLift > 0 ? 0 : 8;
  static constexpr int kQPart = kRows * kD * 2, kKeyPart = kKeys * kD * 2;
  static constexpr int kKeyTiles = kKeys / 8, kColumnTiles = kD / 8;
  QKV_DEVICE static void sync() { sync_threads<kThreads>(1); }
};

template <class M>
struct WgmmaShared : MmaShared<M> {
  TileList<M::kAll> tiles;
  Barrier k_full[M::kStages], k_free[M::kStages], v_full[M::kStages], v_free[M::kStages];
  uint32_t vote;
};

template <class M>
struct Weights {  // P of a warpgroup, as the left operand: 16 keys each
  uint32_t a[M::kKeyTiles / 2][1][M::kRowTiles][4];
};

// Does some thread of the warpgroups with rows say so?
template <class M>
QKV_DEVICE bool any_with_rows(bool x, WgmmaShared<M>& shared) {
  M::sync();
  if (thread_index() == 0) shared.vote = 0;
  M::sync();
  if (x) atomic_or(&shared.vote, 1);
  M::sync();
  return shared.vote != 0;
}

// --- load ----------------------------------------------------------------------------------------------------

// Keys j0 ... of K or V by kCopiers threads, those at and beyond the end as 0.
template <class M>
QKV_DEVICE void copy_tile(const View& view, const char* data, int64_t columns, const Task& task, uint32_t entry,
                          bool async, char* tile) {
  constexpr int kChunks = M::kD / 8, kStep = M::kCopiers / kChunks;
  const int thread = thread_index() % M::kCopiers, chunk = thread % kChunks, first = thread / kChunks;
  const int left = static_cast<int>(columns) - chunk * 8;
  const int64_t j0 = first_key<M::kKeys>(entry), step = kStep * view.s * 2;
  const char* from = data + ((j0 + first) * view.s + chunk * (async ? 8 : 8 * view.d)) * 2;
  if (async && !(entry & kPartial) && left >= 8) {
    char* const to = tile + chunk / 8 * (M::kKeys * 128);
    QKV_UNROLL
    for (int i = 0; i < M::kKeys; i += kStep, from += step) {
      const int row = first + i;
      copy_async(to + row * 128 + (chunk % 8 ^ (row & 7)) * 16, from);
    }
    return;
  }
  const int keys = within(task.key_end - j0, M::kKeys), n = within(int64_t{left}, 8);
  QKV_ROLLED
  for (int i = first; i < M::kKeys; i += kStep, from += step) {
    load_chunk(tile + chunk_offset<M>(i, chunk, M::kKeys), view, from, i < keys ? n : 0, async);
  }
}

// The tiles of a list: two warps copy K, two V, each as soon as both warpgroups have done with a tile.
template <class M>
QKV_DEVICE void copy_tiles(const KernelArgs& args, int count, int64_t before, WgmmaShared<M>& shared) {
  const Problem& p = args.problem;
  const bool keys = thread_index() < M::kThreads + M::kCopiers;
  const View& view = keys ? p.k : p.v;
  const char* const data = keys ? shared.k_data : shared.v_data;
  const int64_t columns = keys ? p.D : p.Dv;
  const bool async = keys ? args.plan.async_k : args.plan.async_v;
  for (int i = 0; i < count; ++i) {
    const int stage = static_cast<int>((before + i) % M::kStages);
    const auto round = static_cast<uint32_t>((before + i) / M::kStages);
    wait_phase(keys ? &shared.k_free[stage] : &shared.v_free[stage], round + 1);  // before the first: passed already
    copy_tile<M>(view, data, columns, shared.task, shared.tiles.tile[i], async,
                 keys ? shared.k[stage] : shared.v[stage]);
    commit_copies();
    wait_copies<0>();
    show_to_products();
    arrive(keys ? &shared.k_full[stage] : &shared.v_full[stage]);
  }
}

// --- scores --------------------------------------------------------------------------------------------------

// Begins S = Q K^T of this thread's warpgroup.
template <class M>
QKV_DEVICE void begin_scores(const WgmmaShared<M>& shared, const char* k, Scores<M>& s) {
  const int group = thread_index() / 128;
  const SharedMatrix q = rows_of(shared_address(shared.q) + group * 64 * 128), keys = rows_of(shared_address(k));
  begin_products();
  QKV_UNROLL
  for (int d = 0; d < M::kD / 16; ++d) {
    multiply_rows<typename M::T>(s.x[0], q.further(d / 4 * (M::kRows * 128) + d % 4 * 32),
                                 keys.further(d / 4 * (M::kKeys * 128) + d % 4 * 32), d > 0);
  }
  commit_products();
}

// --- mask ----------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE void look_closer(const KernelArgs& args, int64_t j0, WgmmaShared<M>& shared) {
  M::sync();  // the bits of the tile before have been used
  look<M::kKeys, M::kThreads>(args, shared.task, shared.lanes, j0, shared.bits);
  auto* const words = reinterpret_cast<uint32_t*>(shared.gone);
  for (int i = thread_index(); i < M::kRows * mask_words(M::kKeys); i += M::kThreads) words[i] = 0;
  M::sync();
}

// --- accumulate ----------------------------------------------------------------------------------------------

// Begins O += P V.
template <class M>
QKV_DEVICE void begin_accumulate(const char* v, const Weights<M>& p, Rows<M>& rows) {
  const SharedMatrix values = columns_of(shared_address(v), M::kKeys * 128);
  begin_products();
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles / 2; ++n) {
    multiply_columns<typename M::T>(rows.o[0], p.a[n][0][0], values.further(n * 16 * 128), true);
  }
  commit_products();
}

}  // namespace qkv::inline QKV_LEVEL
