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
// Registers  of 224: S 64, P 32 (the tile before), O kD / 2. The copying warpgroup leaves its own to the others.
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
  static constexpr int kD = HeadDim, kThreads = 256, kCopiers = 128, kAll = kThreads + kCopiers;
  static constexpr bool kPairs = false, kFew = false, kHopper = true;
  // Registers of a thread: at the start, and when the copying warpgroup has given what the others take.
  static constexpr int kAtStart = 65536 / kAll / 8 * 8, kCopying = 56, kComputing = 224;
  static_assert(kThreads * (kComputing - kAtStart) <= kCopiers * (kAtStart - kCopying), "who takes more waits forever");
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

// Keys j0 ... of K or V by the copying warpgroup, those at and beyond the end as 0.
template <class M>
QKV_DEVICE void copy_tile(const View& view, const char* data, int64_t columns, const Task& task, uint32_t entry,
                          bool async, char* tile) {
  constexpr int kChunks = M::kD / 8, kStep = M::kCopiers / kChunks;
  const int thread = thread_index() - M::kThreads, chunk = thread % kChunks, first = thread / kChunks;
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

// The tiles of a list, K0 V0 K1 V1 ...: a tile is announced when the copies of the next are under way.
template <class M>
QKV_DEVICE void copy_tiles(const KernelArgs& args, int count, int64_t before, WgmmaShared<M>& shared) {
  const Problem& p = args.problem;
  const int steps = count * 2;
  for (int step = 0; step <= steps; ++step) {
    const int i = step / 2;
    const int64_t turn = before + i;
    const int stage = static_cast<int>(turn % M::kStages);
    const uint32_t round = static_cast<uint32_t>(turn / M::kStages);
    if (step < steps) {
      if (step % 2 == 0) {
        wait_phase(&shared.k_free[stage], round + 1);  // the phase before the first has passed already
        copy_tile<M>(p.k, shared.k_data, p.D, shared.task, shared.tiles.tile[i], args.plan.async_k, shared.k[stage]);
      } else {
        wait_phase(&shared.v_free[stage], round + 1);
        if (p.Dv > 0) {
          copy_tile<M>(p.v, shared.v_data, p.Dv, shared.task, shared.tiles.tile[i], args.plan.async_v, shared.v[stage]);
        }
      }
    }
    commit_copies();
    if (step == 0) continue;
    wait_copies<1>();
    show_to_products();
    const int last = static_cast<int>((before + (step - 1) / 2) % M::kStages);
    arrive(step % 2 ? &shared.k_full[last] : &shared.v_full[last]);
  }
  wait_copies<0>();
}

// --- scores --------------------------------------------------------------------------------------------------

// Begins S = Q K^T of this thread's warpgroup.
template <class M>
QKV_DEVICE void begin_scores(const WgmmaShared<M>& shared, const char* k, Scores<M>& s) {
  const int group = thread_index() / 128;
  const SharedAddress q = shared_address(shared.q) + group * 64 * 128, keys = shared_address(k);
  begin_products();
  QKV_UNROLL
  for (int d = 0; d < M::kD / 16; ++d) {
    multiply_rows<typename M::T>(s.x[0], rows_of(q + d / 4 * (M::kRows * 128) + d % 4 * 32),
                                 rows_of(keys + d / 4 * (M::kKeys * 128) + d % 4 * 32), d > 0);
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
  const SharedAddress values = shared_address(v);
  begin_products();
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles / 2; ++n) {
    multiply_columns<typename M::T>(rows.o[0], p.a[n][0][0], columns_of(values + n * 16 * 128, M::kKeys * 128), true);
  }
  commit_products();
}

}  // namespace qkv::inline QKV_LEVEL
