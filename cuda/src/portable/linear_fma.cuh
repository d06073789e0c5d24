// SPDX-License-Identifier: Apache-2.0
// A product with a matrix by plain multiply-adds: for float32 and float64, and where x and w differ in dtype.
//
//     y = x w + b
//
// Shapes     x (rows, inner), w (inner, columns), b (columns), y (rows, columns): any sizes, strides and dtypes.
// Parallel   a block per tile of y (linear_tiles.cuh), 128 x 64 (in double 64 x 64) where there are enough of them: 4
//            warps of 32 x 64 (32 x 32). Otherwise one such tile, and for few rows (decoding) 8 x 32: 4 or 8 warps that
//            share kDepth. A thread has kRowsOf x kColumnsOf of its warp's tile, with 4 x 8 threads.
// Loop       for each kDepth of inner: Y += X W from one stage, while the next are on their way to others.
// Memory     shared: kStages tiles of x and w, 40 to 83 KiB; a thread reads 16 bytes at a time. Lines along inner are
//            padded by 16 bytes, so that 8 of them lie in different banks. Neighbours in pairs read the same of w, and
//            pairs of them the same of x: half a warp takes one turn.
// Registers  Y twice, 2 x 64 of 255 (in double 2 x 32): the sum so far, and that of the last kRun products.
// Numerics   every product rounded once, in A = float or double. Sums of kRun products are added to the sum so far as
//            wholes: roundings of one sign grow with kRun + inner / kRun, not with inner. (Why not tensor cores:
//            forward_fma.cuh.) |error| <= u_out |y| + (4 / sqrt 3 sqrt(inner) |x| |w| + |b| + |y|) u.
// References Goto & van de Geijn 2008 (ACM TOMS 34, 12) for products by tiles.
#pragma once

#include "portable/linear_tiles.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Accumulator, LinearSize S, Order O>
struct FmaLinearTile {
  using A = Accumulator;
  using Stored = A;
  static constexpr Order kOrder = O;
  static constexpr bool kSwizzled = false, kFloat = sizeof(A) == 4;
  static constexpr int kRowsOf = of_size(S, 2, 8, 8), kColumnsOf = kFloat ? of_size(S, 4, 8, 8) : 4;
  static constexpr int kRowWarps = of_size(S, 1, 1, kFloat ? 4 : 2), kColumnWarps = of_size(S, 1, 1, kFloat ? 1 : 2);
  static constexpr int kDepthWarps = of_size(S, 8, 4, 1), kStages = of_size(S, 4, 3, kFloat ? 3 : 4);
  static constexpr int kWarpRows = 4 * kRowsOf, kWarpColumns = 8 * kColumnsOf,
                       kWarpDepth = of_size(S, 1, 1, 2) * (kFloat ? 16 : 8);
  static constexpr int kPasses = 1, kRun = 64, kPack = 16 / static_cast<int>(sizeof(A));
};

struct FmaPlace {  // of a thread, among those of its warp
  int row, column;
};

template <class M>
struct FmaSums {
  typename M::A y[M::kRowsOf][M::kColumnsOf] = {};
};

// --- tiles ---------------------------------------------------------------------------------------------------

QKV_DEVICE FmaPlace fma_place() {
  const int lane = thread_index() % 32;
  return {lane / 16 * 2 + lane % 2, lane / 2 % 8};
}

// The j-th column of a thread in its warp's tile: those that lie side by side in shared memory.
template <class M>
QKV_DEVICE int fma_column(const FmaPlace& at, int j) {
  if (M::kOrder == Order::Columns) return at.column + 8 * j;
  return (j / M::kPack * 8 + at.column) * M::kPack + j % M::kPack;
}

// --- accumulate ----------------------------------------------------------------------------------------------

// Y += X W over kWarpDepth.
template <class M>
QKV_DEVICE void multiply_lines(const char* x, const char* w, FmaSums<M>& sums) {
  using P = Pack<typename M::A>;
  using X = typename Frame<M>::X;
  using W = typename Frame<M>::W;
  const WarpPlace warp = warp_place<M>();
  const FmaPlace at = fma_place();
  const char* const own_x = x + X::offset(warp.row + at.row, warp.depth / M::kPack);
  const char* const own_w = w + (Frame<M>::kByColumns ? W::offset(warp.column + at.column, warp.depth / M::kPack)
                                                      : W::offset(warp.depth, warp.column / M::kPack + at.column));
  QKV_UNROLL
  for (int d = 0; d < M::kWarpDepth; d += M::kPack) {
    P a[M::kRowsOf];
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) {
      a[i] = *reinterpret_cast<const P*>(own_x + 4 * i * X::kPitch + d / M::kPack * 16);
    }
    if constexpr (Frame<M>::kByColumns) {
      QKV_UNROLL
      for (int j = 0; j < M::kColumnsOf; ++j) {
        const P b = *reinterpret_cast<const P*>(own_w + 8 * j * W::kPitch + d / M::kPack * 16);
        QKV_UNROLL
        for (int e = 0; e < M::kPack; ++e) {
          QKV_UNROLL
          for (int i = 0; i < M::kRowsOf; ++i) sums.y[i][j] = multiply_add(a[i].x[e], b.x[e], sums.y[i][j]);
        }
      }
    } else {
      QKV_UNROLL
      for (int e = 0; e < M::kPack; ++e) {
        QKV_UNROLL
        for (int j = 0; j < M::kColumnsOf; ++j) {
          const P b = *reinterpret_cast<const P*>(own_w + (d + e) * W::kPitch + j / M::kPack * 8 * 16);
          QKV_UNROLL
          for (int i = 0; i < M::kRowsOf; ++i) {
            sums.y[i][j] = multiply_add(a[i].x[e], b.x[j % M::kPack], sums.y[i][j]);
          }
        }
      }
    }
  }
}

// The last sums join those so far.
template <class M>
QKV_DEVICE void add_run(FmaSums<M>& run, FmaSums<M>& sums) {
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    QKV_UNROLL
    for (int j = 0; j < M::kColumnsOf; ++j) {
      sums.y[i][j] += run.y[i][j];
      run.y[i][j] = 0;
    }
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

template <class A, LinearSize S, Order O>
struct FmaLinear {
  using M = FmaLinearTile<A, S, O>;
  using Args = LinearArgs;
  static constexpr int kThreads = Frame<M>::kThreads, kBlocks = of_size(S, 1, 2, 2);
  static constexpr int64_t kShared = sizeof(LinearShared<M>);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<LinearShared<M>*>(memory);
    const Linear& p = args.problem;
    const LinearTask task = linear_task<M>(args.plan, block);
    LinearCopies<M> copies(args, task);
    QKV_ROLLED
    for (int t = 0; t < M::kStages - 1; ++t) copies.copy(t, 0, 1, shared);
    FmaSums<M> sums, run;
    int stage = 0, free = M::kStages - 1, products = 0;
    QKV_ROLLED
    for (int64_t left = p.inner; left > 0; left -= Frame<M>::kDepth) {
      wait_copies<M::kStages - 2>();
      sync_block();  // the tile has come, and nobody reads the one before any more
      copies.copy(free, 0, 1, shared);
      multiply_lines<M>(shared.x[stage], shared.w[stage], run);
      free = stage;
      stage = stage + 1 < M::kStages ? stage + 1 : 0;
      products += M::kWarpDepth;
      if (products < M::kRun) continue;
      add_run(run, sums);
      products = 0;
    }
    add_run(run, sums);
    const FmaPlace at = fma_place();
    write_tile<M, A>(p, task, memory, [&](A* to, int pitch) {
      QKV_UNROLL
      for (int i = 0; i < M::kRowsOf; ++i) {
        QKV_UNROLL
        for (int j = 0; j < M::kColumnsOf; ++j) to[(at.row + 4 * i) * pitch + fma_column<M>(at, j)] = sums.y[i][j];
      }
    });
  }
};

}  // namespace qkv::inline QKV_LEVEL
