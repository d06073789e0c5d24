// SPDX-License-Identifier: Apache-2.0
// A product with a matrix by plain multiply-adds: for float32 and float64, and where x and w differ in dtype.
//
//     y = x w + b
//
// Shapes     x (rows, inner), w (inner, columns), b (columns), y (rows, columns): any sizes, strides and dtypes.
// Parallel   a block per tile of y, kRows x kColumns, in the order of linear_mma.cuh; 16 x 16 threads, thread (y, x)
//            holds rows y + 16 i and columns x + 16 j.
// Loop       for each kDepth of inner: Y += X W from one buffer, while the next elements of x and w are on their way to
//            registers, and from there to the other buffer.
// Memory     shared: twice x kRows kDepth and w kColumns kDepth, as lines of kDepth: 40 KiB. Lines are padded by 16
//            bytes, so that 8 of them lie in different banks.
// Registers  Y twice, 2 x 64 of 255 (in double 2 x 32): the sum so far, and that of the last kRun products.
// Numerics   every product rounded once, in A = float or double. Sums of kRun products are added to the sum so far as
//            wholes: roundings of one sign grow with kRun + inner / kRun, not with inner. (Why not tensor cores:
//            forward_fma.cuh.) |error| <= u_out |y| + (4 / sqrt 3 sqrt(inner) |x| |w| + |b| + |y|) u.
// References Goto & van de Geijn 2008 (ACM TOMS 34, 12) for products by tiles.
#pragma once

#include "portable/linear_mma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Accumulator, Height H>
struct FmaLinearTile {
  using A = Accumulator;
  static constexpr int kThreads = 256, kDepth = 16, kRun = 64, kPack = 16 / static_cast<int>(sizeof(A));
  static constexpr int kColumnsOf = sizeof(A) == 4 ? 8 : 4, kRowsOf = H == Height::Few ? 1 : kColumnsOf;  // of a thread
  static constexpr int kRows = 16 * kRowsOf, kColumns = 16 * kColumnsOf, kLd = kDepth + kPack;
};

template <class M>
struct FmaLinearShared {
  alignas(16) typename M::A x[2][M::kRows * M::kLd];
  alignas(16) typename M::A w[2][M::kColumns * M::kLd];
  int64_t row[M::kRows];  // offsets of the rows of x
};

template <class A>
struct alignas(16) LinePack {
  A x[16 / sizeof(A)];
};

template <class M>
struct FmaSums {
  typename M::A y[M::kRowsOf][M::kColumnsOf] = {};
};

// --- load ----------------------------------------------------------------------------------------------------

// A tile of N lines on its way, in registers. Neighbouring threads take what lies side by side in memory: elements of a
// line (along) or of a column.
template <class M, int N>
struct Fetched {
  static constexpr int kEach = N * M::kDepth / M::kThreads;
  typename M::A x[kEach];

  QKV_DEVICE static int line(bool along, int e) {
    const int i = thread_index() + e * M::kThreads;
    return along ? i / M::kDepth : i % N;
  }
  QKV_DEVICE static int depth(bool along, int e) {
    const int i = thread_index() + e * M::kThreads;
    return along ? i % M::kDepth : i / N;
  }
  // get(line, depth): the element, 0 beyond the ends.
  template <class Get>
  QKV_DEVICE void fetch(bool along, const Get& get) {
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) x[e] = get(line(along, e), depth(along, e));
  }
  QKV_DEVICE void put(bool along, typename M::A* tile) const {
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) tile[line(along, e) * M::kLd + depth(along, e)] = x[e];
  }
};

template <class M>
struct FmaLinearLoader {
  using A = typename M::A;
  const Linear& p;
  LinearTask task;
  bool along_x, along_w;
  Fetched<M, M::kRows> x;
  Fetched<M, M::kColumns> w;

  QKV_DEVICE FmaLinearLoader(const LinearArgs& args, const LinearTask& t)
      : p(args.problem), task(t), along_x(p.x.column == 1), along_w(args.plan.by_columns != 0) {}

  QKV_DEVICE void fetch(int64_t first, const FmaLinearShared<M>& shared) {
    x.fetch(along_x, [&](int line, int d) -> A {
      if (task.row + line >= p.rows || first + d >= p.inner) return 0;
      return load_as<A>(p.x.data, p.x.dtype, shared.row[line] + (first + d) * p.x.column);
    });
    w.fetch(along_w, [&](int line, int d) -> A {
      if (task.column + line >= p.columns || first + d >= p.inner) return 0;
      return load_as<A>(p.w.data, p.w.dtype, (first + d) * p.w.row + (task.column + line) * p.w.column);
    });
  }
  QKV_DEVICE void put(int buffer, FmaLinearShared<M>& shared) const {
    x.put(along_x, shared.x[buffer]);
    w.put(along_w, shared.w[buffer]);
  }
};

// --- accumulate ----------------------------------------------------------------------------------------------

// Y += X W over kDepth.
template <class M>
QKV_DEVICE void multiply_lines(const typename M::A* x, const typename M::A* w, FmaSums<M>& sums) {
  using P = LinePack<typename M::A>;
  const int row = thread_index() / 16, column = thread_index() % 16;
  QKV_UNROLL
  for (int d = 0; d < M::kDepth; d += M::kPack) {
    P a[M::kRowsOf];
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) a[i] = *reinterpret_cast<const P*>(x + (row + 16 * i) * M::kLd + d);
    QKV_UNROLL
    for (int j = 0; j < M::kColumnsOf; ++j) {
      const P b = *reinterpret_cast<const P*>(w + (column + 16 * j) * M::kLd + d);
      QKV_UNROLL
      for (int i = 0; i < M::kRowsOf; ++i) {
        QKV_UNROLL
        for (int e = 0; e < M::kPack; ++e) sums.y[i][j] = multiply_add(a[i].x[e], b.x[e], sums.y[i][j]);
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

// --- write ---------------------------------------------------------------------------------------------------

template <class A>
QKV_DEVICE void store_as(const RowArray& y, int64_t at, A x) {
  switch (y.dtype) {
    case DType::f32: reinterpret_cast<float*>(y.data)[at] = static_cast<float>(x); break;
    case DType::bf16: reinterpret_cast<uint16_t*>(y.data)[at] = float_to_bf16(static_cast<float>(x)); break;
    default: store_from_double(y.data, y.dtype, at, static_cast<double>(x));
  }
}

template <class M>
QKV_DEVICE void write_elements(const Linear& p, const LinearTask& task, const FmaSums<M>& sums) {
  using A = typename M::A;
  const int64_t row0 = task.row + thread_index() / 16, column0 = task.column + thread_index() % 16;
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    const int64_t row = row0 + 16 * i;
    if (row >= p.rows) continue;
    const int64_t at = row_offset(p.y, row);
    QKV_UNROLL
    for (int j = 0; j < M::kColumnsOf; ++j) {
      const int64_t column = column0 + 16 * j;
      if (column >= p.columns) continue;
      A y = sums.y[i][j];
      if (p.b.data) y += load_as<A>(p.b.data, p.b.dtype, column * p.b.column);
      store_as<A>(p.y, at + column * p.y.column, y);
    }
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

template <class A, Height H>
struct FmaLinear {
  using M = FmaLinearTile<A, H>;
  using Args = LinearArgs;
  static constexpr int kThreads = M::kThreads, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(FmaLinearShared<M>);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<FmaLinearShared<M>*>(memory);
    const Linear& p = args.problem;
    const LinearTask task = linear_task<M>(args.plan, block);
    FmaLinearLoader<M> next(args, task);
    FmaSums<M> sums, run;
    for (int i = thread_index(); i < M::kRows && task.row + i < p.rows; i += kThreads) {
      shared.row[i] = row_offset(p.x, task.row + i);
    }
    sync_block();
    next.fetch(0, shared);
    next.put(0, shared);
    sync_block();
    int buffer = 0;
    for (int64_t first = 0; first < p.inner; first += M::kDepth, buffer ^= 1) {
      const int64_t after = first + M::kDepth;
      if (after < p.inner) next.fetch(after, shared);
      multiply_lines<M>(shared.x[buffer], shared.w[buffer], run);
      if (after % M::kRun == 0) add_run(run, sums);
      if (after < p.inner) next.put(buffer ^ 1, shared);
      sync_block();
    }
    add_run(run, sums);
    write_elements<M>(p, task, sums);
  }
};

}  // namespace qkv::inline QKV_LEVEL
