// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper's tensor cores, for float16 and bfloat16.
//
//     s = scale q k^T,  s = softcap tanh(s / softcap),  s += bias - slope |p - j|,  s = -inf where masked
//     o = softmax(s) v,  lse = log sum exp(s)
//
// Shapes     q (Hq, Sq, D), k (Hkv, Sk, D), v (Hkv, Sk, Dv) per batch element, any strides; D, Dv <= kD.
// Parallel   over tasks as in forward_mma.cuh, one after the other by one block per multiprocessor (tiles_wgmma.cuh):
//            two or three warpgroups with 64 rows each, and one whose warps plan, copy and guard.
// Loop       for each visible tile of kKeys keys: S = Q K^T -> modify -> mask -> softmax -> O += P V, where the product
//            of the next K runs beside that of this V, and both beside another warpgroup's softmax.
// Memory     shared: Q kRows kD twice (once at D = 256), and kStages tiles of K and of V, kKeys kD each, in blocks of
//            64 columns (device/hopper.cuh): 192 KiB at D = 128. Barriers say when a tile has come, and when all
//            warpgroups have done with it. So little is left of the L1 cache that a register kept in memory, or a
//            fence for the copy engine, costs hundreds of cycles: the loop has neither.
// Registers  of 224, or 160 at D = 64: S 64, P 32 (the tile before), O kD / 2. The copying warps leave theirs to the
//            others.
// Numerics   those of forward_mma.cuh: products of 16-bit numbers accumulated in float, p rounded to 16 bits.
// References Shah et al. 2024 (arXiv 2407.08608); the PTX ISA for wgmma and its matrices in shared memory.
#pragma once

#include "hopper/tiles_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

template <class M>
struct Weights {  // P of a warpgroup, as the left operand: 16 keys each
  uint32_t a[M::kKeyTiles / 2][1][M::kRowTiles][4];
};

// --- scores --------------------------------------------------------------------------------------------------

// Begins S = Q K^T of a warpgroup.
template <class M>
QKV_DEVICE void begin_scores(SharedMatrix q, SharedMatrix k, Scores<M>& s) {
  begin_products();
  QKV_UNROLL
  for (int d = 0; d < M::kD / 16; ++d) {
    multiply_rows<typename M::T>(s.x[0], moved(q, d / 4 * (M::kRows * 128) + d % 4 * 32),
                                 moved(k, d / 4 * (M::kKeys * 128) + d % 4 * 32), d > 0);
  }
  commit_products();
}

// --- accumulate ----------------------------------------------------------------------------------------------

// Begins O += P V.
template <class M>
QKV_DEVICE void begin_accumulate(SharedMatrix v, const Weights<M>& p, Rows<M>& rows) {
  begin_products();
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles / 2; ++n) {
    multiply_columns<typename M::T>(rows.o[0], p.a[n][0][0], moved(v, n * 16 * 128), true);
  }
  commit_products();
}

}  // namespace qkv::inline QKV_LEVEL
