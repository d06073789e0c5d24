// SPDX-License-Identifier: Apache-2.0
// A product with a matrix on tensor cores, for float16 and bfloat16.
//
//     y = x w + b
//
// Shapes     x (rows, inner), w (inner, columns), b (columns), y (rows, columns): any sizes, any strides; y of x's
//            dtype or float32.
// Parallel   a block per tile of y (linear_tiles.cuh), 128 x 256 where there are enough of them: 8 warps of 64 x 64, so
//            that a matrix in registers serves 4 or 8 products. Otherwise 64 x 64, and for few rows (decoding) 16 x 32:
//            4 warps that share kDepth.
// Loop       for each kDepth of inner: Y += X W, 16 of inner at a time, in registers, while the matrices of the next 16
//            come from shared memory, and the tile kStages - 1 further from memory: its copies lie among the products.
// Memory     shared, in 16 bits: kStages tiles of x and w, 72 to 96 KiB. ldmatrix transposes lines of w's rows.
// Registers  Y: 128 of 255, matrices 2 x 32.
// Numerics   exact products of 16-bit numbers, sums and b in float, one rounding at the end:
//            |error| <= u_out |y| + (4 / sqrt 3 sqrt(inner) |x| |w| + |b| + |y|) u.
// References the PTX ISA for fragments.
#pragma once

#include "portable/linear_tiles.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element, LinearSize S, Order O>
struct LinearTile {
  using T = Element;
  using Stored = uint16_t;
  static constexpr Order kOrder = O;
  static constexpr bool kSwizzled = true;
  static constexpr int kRowWarps = of_size(S, 1, 1, 2), kColumnWarps = of_size(S, 1, 1, 2);
  static constexpr int kDepthWarps = of_size(S, 4, 4, 1), kStages = of_size(S, 6, 3, 4);
  static constexpr int kRowTiles = of_size(S, 1, 4, 4), kColumnTiles = of_size(S, 4, 8, 8);  // 16 rows, 8 columns
  static constexpr int kWarpRows = kRowTiles * 16, kWarpColumns = kColumnTiles * 8, kWarpDepth = 32;
  static constexpr int kSlices = kWarpDepth / 16, kPasses = of_size(S, 1, 1, 2);
};

template <class M>
struct LinearSums {  // of one warp: [row tile][8 columns][fragment C]
  float y[M::kRowTiles][M::kColumnTiles][4];
};

template <class M>
struct Matrices {  // of 16 of inner: [row tile][fragment A], [16 columns][two fragments B]
  uint32_t x[M::kRowTiles][4], w[M::kColumnTiles / 2][4];
};

// --- accumulate ----------------------------------------------------------------------------------------------

template <class M>
struct MatrixLoader {
  using X = typename Frame<M>::X;
  using W = typename Frame<M>::W;
  static constexpr bool kByColumns = Frame<M>::kByColumns;
  int x_offset, w_offset;

  QKV_DEVICE MatrixLoader() {
    const int lane = thread_index() % 32;
    const WarpPlace at = warp_place<M>();
    x_offset = X::moved(X::offset(at.row + lane % 16, lane / 16), 0, at.depth / 8);
    w_offset = kByColumns ? W::moved(W::offset(at.column + lane / 16 * 8 + lane % 8, lane / 8 % 2), 0, at.depth / 8)
                          : W::moved(W::offset(at.depth + lane % 16, lane / 16), 0, at.column / 8);
  }

  QKV_DEVICE void load(SharedAddress x, SharedAddress w, int slice, Matrices<M>& to) const {
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) load_matrices(to.x[r], x + X::moved(x_offset, r * 16, slice * 2));
    QKV_UNROLL
    for (int n = 0; n < M::kColumnTiles; n += 2) {
      if constexpr (kByColumns) load_matrices(to.w[n / 2], w + W::moved(w_offset, n * 8, slice * 2));
      else load_matrices_transposed(to.w[n / 2], w + W::moved(w_offset, slice * 16, n));
    }
  }
};

// Y += X W over 16 of inner.
template <class M>
QKV_DEVICE void multiply(const Matrices<M>& from, LinearSums<M>& sums) {
  QKV_UNROLL
  for (int r = 0; r < M::kRowTiles; ++r) {
    QKV_UNROLL
    for (int i = 0; i < M::kColumnTiles; ++i) {
      const int n = r % 2 ? M::kColumnTiles - 1 - i : i;  // there and back: the next has an operand of the last
      multiply_add<typename M::T>(sums.y[r][n], from.x[r], from.w[n / 2][n % 2 * 2], from.w[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

template <class Element, LinearSize S, Order O>
struct MmaLinear {
  using M = LinearTile<Element, S, O>;
  using Args = LinearArgs;
  static constexpr int kThreads = Frame<M>::kThreads, kBlocks = of_size(S, 3, 2, 2);
  static constexpr int64_t kShared = sizeof(LinearShared<M>);
  static_assert(M::kSlices % 2 == 0);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<LinearShared<M>*>(memory);
    const Linear& p = args.problem;
    const LinearTask task = linear_task<M>(args.plan, block);
    LinearCopies<M> copies(args, task);
    QKV_ROLLED
    for (int t = 0; t < M::kStages - 1; ++t) copies.copy(t, 0, 1, shared);
    const MatrixLoader<M> loader;
    LinearSums<M> sums{};
    Matrices<M> matrices[2];
    int stage = 0, free = M::kStages - 1;
    const auto load = [&](int slice, Matrices<M>& to) {
      loader.load(shared_address(shared.x[stage]), shared_address(shared.w[stage]), slice, to);
    };
    if (p.inner > 0) {
      wait_copies<M::kStages - 2>();
      sync_block();
      load(0, matrices[0]);
    }
    QKV_ROLLED
    for (int64_t left = p.inner; left > 0; left -= Frame<M>::kDepth) {
      QKV_UNROLL
      for (int d = 0; d < M::kSlices; ++d) {
        copies.copy(free, d, M::kSlices, shared);
        if (d + 1 < M::kSlices) {
          load(d + 1, matrices[(d + 1) % 2]);
        } else {
          free = stage;
          stage = stage + 1 < M::kStages ? stage + 1 : 0;
          if (left > Frame<M>::kDepth) {
            wait_copies<M::kStages - 2>();
            sync_block();  // the next tile has come, and nobody reads this one any more
            load(0, matrices[0]);
          }
        }
        multiply(matrices[d % 2], sums);
      }
    }
    const int lane = thread_index() % 32;
    write_tile<M, float>(p, task, memory, [&](float* to, int pitch) {
      QKV_UNROLL
      for (int i = 0; i < M::kRowTiles * 2; ++i) {
        QKV_UNROLL
        for (int n = 0; n < M::kColumnTiles; ++n) {
          float* const pair = to + (i * 8 + lane / 4) * pitch + n * 8 + lane % 4 * 2;
          pair[0] = sums.y[i / 2][n][i % 2 * 2];
          pair[1] = sums.y[i / 2][n][i % 2 * 2 + 1];
        }
      }
    });
  }
};

}  // namespace qkv::inline QKV_LEVEL
