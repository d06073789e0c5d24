// SPDX-License-Identifier: Apache-2.0
// A product with a matrix on tensor cores, for float16 and bfloat16.
//
//     y = x w + b
//
// Shapes     x (rows, inner), w (inner, columns), b (columns), y (rows, columns): any sizes, any strides; y of x's
//            dtype or float32.
// Parallel   a block per tile of y, kRows x kColumns; its warps share the tile. Tiles are taken in sections of rows, so
//            that blocks that run together read the same lines of x and w from the L2 cache. For few rows (decoding)
//            the tile is 16 high, and the copies of three steps are under way.
// Loop       for each kDepth of inner: copy tiles of x and w to shared memory -> Y += X W, in registers.
// Memory     shared, in 16 bits: kStages tiles of x, kRows kDepth, and of w, kDepth kColumns: 64 KiB. A tile of w is
//            kept as w lies in memory (Order), as lines of rows or of columns; ldmatrix transposes on the way. Lines
//            are cut into chunks of 16 bytes: chunk c of line i lies at c ^ (i mod 8).
// Registers  Y: 64 of 255.
// Numerics   exact products of 16-bit numbers, sums and b in float, one rounding at the end:
//            |error| <= u_out |y| + (4 / sqrt 3 sqrt(inner) |x| |w| + |b| + |y|) u.
// References the PTX ISA for fragments.
#pragma once

#include "layer_plan.h"
#include "portable/scores.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

enum class Order { Rows, Columns };  // of w: what a line in shared memory holds

template <class Element, Height H, Order O>
struct LinearTile {
  using T = Element;
  static constexpr bool kFew = H == Height::Few, kByColumns = O == Order::Columns;
  static constexpr int kRowWarps = kFew ? 1 : 4, kColumnWarps = kFew ? 4 : 2, kThreads = kFew ? 128 : 256;
  static constexpr int kRowTiles = kFew ? 1 : 2, kColumnTiles = kFew ? 2 : 8;  // of a warp: 16 rows, 8 columns
  static constexpr int kRows = kRowWarps * kRowTiles * 16, kColumns = kColumnWarps * kColumnTiles * 8;
  static constexpr int kDepth = 64, kStages = kFew ? 4 : 2;
  static constexpr int kLinesX = kRows, kChunksX = kDepth / 8;
  static constexpr int kLinesW = kByColumns ? kColumns : kDepth, kChunksW = (kByColumns ? kDepth : kColumns) / 8;
};

template <class M>
struct LinearShared {
  char x[M::kStages][M::kLinesX * M::kChunksX * 16];
  char w[M::kStages][M::kLinesW * M::kChunksW * 16];
  int64_t row[M::kRows];  // offsets of the rows of x
};

template <class M>
struct LinearSums {  // of one warp: [row tile][8 columns][fragment C]
  float y[M::kRowTiles][M::kColumnTiles][4];
};

struct LinearTask {
  int64_t row, column;  // the first of the tile
};

// --- tiles ---------------------------------------------------------------------------------------------------

constexpr int64_t kSectionTiles = 16;

template <class M>
QKV_DEVICE LinearTask linear_task(const LinearPlan& plan, int64_t block) {
  const int64_t first = block / (kSectionTiles * plan.column_tiles) * kSectionTiles, left = plan.row_tiles - first;
  const int64_t in_section = left < kSectionTiles ? left : kSectionTiles, rest = block - first * plan.column_tiles;
  return {(first + rest % in_section) * M::kRows, rest / in_section * M::kColumns};
}

template <int Chunks>
QKV_DEVICE int line_offset(int line, int chunk) {
  return (line * Chunks + (chunk ^ (line & 7))) * 16;
}

// From the offset of (line, chunk 0 or 1) to that of (line + lines, chunk + chunks), lines a multiple of 8, chunks
// of 2.
template <int Chunks>
QKV_DEVICE int line_moved(int offset, int lines, int chunks) {
  return (offset ^ (chunks % 8 * 16)) + lines * Chunks * 16 + chunks / 8 * 128;
}

// --- load ----------------------------------------------------------------------------------------------------

struct Lines {       // where a tile comes from
  int64_t step;      // from element to element of a line
  int64_t elements;  // that are left of each line: beyond them a tile is 0
  const char* any;   // an address to copy nothing from
  bool async;
};

// line_of: where a line of the tile begins, nullptr beyond the last.
template <int N, int Chunks, int Threads, class LineOf>
QKV_DEVICE void load_lines(char* tile, const Lines& lines, const LineOf& line_of) {
  for (int i = thread_index(); i < N * Chunks; i += Threads) {
    const int line = i / Chunks, chunk = i % Chunks;
    const char* const from = line_of(line);
    const int64_t left = from ? lines.elements - chunk * 8 : 0;
    const int n = left < 0 ? 0 : (left < 8 ? static_cast<int>(left) : 8);
    char* const to = tile + line_offset<Chunks>(line, chunk);
    if (lines.async) {
      copy_async(to, n > 0 ? from + chunk * 16 : lines.any, n * 2);
      continue;
    }
    const auto* x = reinterpret_cast<const uint16_t*>(from);
    auto* y = reinterpret_cast<uint16_t*>(to);
    for (int e = 0; e < 8; ++e) y[e] = e < n ? x[(chunk * 8 + e) * lines.step] : uint16_t{0};
  }
}

// x and w at first ... first + kDepth - 1 of inner.
template <class M>
QKV_DEVICE void load_step(const LinearArgs& args, const LinearTask& task, int64_t first, int stage,
                          LinearShared<M>& shared) {
  const Linear& p = args.problem;
  const int64_t deep = p.inner - first, wide = p.columns - task.column;
  const auto row_of = [&](int line) -> const char* {
    return task.row + line < p.rows ? p.x.data + (shared.row[line] + first * p.x.column) * 2 : nullptr;
  };
  load_lines<M::kLinesX, M::kChunksX, M::kThreads>(shared.x[stage],
                                                   {p.x.column, deep, p.x.data, args.plan.async_x != 0}, row_of);
  const char* const corner = p.w.data + (first * p.w.row + task.column * p.w.column) * 2;
  const int64_t step = M::kByColumns ? p.w.row : p.w.column, across = M::kByColumns ? p.w.column : p.w.row;
  const int64_t elements = M::kByColumns ? deep : wide, count = M::kByColumns ? wide : deep;
  const auto line_of = [&](int line) -> const char* { return line < count ? corner + line * across * 2 : nullptr; };
  load_lines<M::kLinesW, M::kChunksW, M::kThreads>(shared.w[stage], {step, elements, p.w.data, args.plan.async_w != 0},
                                                   line_of);
}

// --- accumulate ----------------------------------------------------------------------------------------------

// Y += X W over kDepth.
template <class M>
QKV_DEVICE void multiply_step(SharedAddress x, SharedAddress w, LinearSums<M>& sums) {
  using T = typename M::T;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int row0 = warp / M::kColumnWarps * M::kRowTiles * 16, column0 = warp % M::kColumnWarps * M::kColumnTiles * 8;
  const int x_offset = line_offset<M::kChunksX>(row0 + lane % 16, lane / 16);
  const int w_offset = M::kByColumns
                           ? line_offset<M::kChunksW>(column0 + lane / 16 * 8 + lane % 8, lane / 8 % 2)
                           : line_moved<M::kChunksW>(line_offset<M::kChunksW>(lane % 16, lane / 16), 0, column0 / 8);
  QKV_UNROLL
  for (int d = 0; d < M::kDepth / 16; ++d) {
    uint32_t a[M::kRowTiles][4];
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) load_matrices(a[r], x + line_moved<M::kChunksX>(x_offset, r * 16, d * 2));
    QKV_UNROLL
    for (int n = 0; n < M::kColumnTiles; n += 2) {
      uint32_t b[4];  // of 16 columns: two of n
      if constexpr (M::kByColumns) load_matrices(b, w + line_moved<M::kChunksW>(w_offset, n * 8, d * 2));
      else load_matrices_transposed(b, w + line_moved<M::kChunksW>(w_offset, d * 16, n));
      QKV_UNROLL
      for (int r = 0; r < M::kRowTiles; ++r) {
        multiply_add<T>(sums.y[r][n], a[r], b[0], b[1]);
        multiply_add<T>(sums.y[r][n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// --- write ---------------------------------------------------------------------------------------------------

template <class T>
QKV_DEVICE void store_pair(const RowArray& y, int64_t at, int n, float low, float high) {  // n: 1 or 2 columns
  const int64_t next = at + y.column;
  if (y.dtype == DType::f32) {
    reinterpret_cast<float*>(y.data)[at] = low;
    if (n == 2) reinterpret_cast<float*>(y.data)[next] = high;
    return;
  }
  const uint32_t bits = pack<T>(low, high);
  auto* const to = reinterpret_cast<uint16_t*>(y.data) + at;
  if (n == 2 && y.column == 1 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = bits;
    return;
  }
  to[0] = static_cast<uint16_t>(bits);
  if (n == 2) reinterpret_cast<uint16_t*>(y.data)[next] = static_cast<uint16_t>(bits >> 16);
}

template <class M>
QKV_DEVICE void write_sums(const Linear& p, const LinearTask& task, const LinearSums<M>& sums) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t row0 = task.row + warp / M::kColumnWarps * M::kRowTiles * 16 + lane / 4;
  const int64_t column0 = task.column + warp % M::kColumnWarps * M::kColumnTiles * 8 + lane % 4 * 2;
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int64_t row = row0 + i * 8;
    if (row >= p.rows) continue;
    const int64_t at = row_offset(p.y, row);
    QKV_UNROLL
    for (int n = 0; n < M::kColumnTiles; ++n) {
      const int64_t column = column0 + n * 8, left = p.columns - column;
      if (left <= 0) continue;
      float y[2];
      QKV_UNROLL
      for (int e = 0; e < 2; ++e) {
        y[e] = sums.y[i / 2][n][i % 2 * 2 + e];
        if (p.b.data && e < left) y[e] += load_as<float>(p.b.data, p.b.dtype, (column + e) * p.b.column);
      }
      store_pair<typename M::T>(p.y, at + column * p.y.column, left > 1 ? 2 : 1, y[0], y[1]);
    }
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

template <class Element, Height H, Order O>
struct MmaLinear {
  using M = LinearTile<Element, H, O>;
  using Args = LinearArgs;
  static constexpr int kThreads = M::kThreads, kBlocks = 2;
  static constexpr int64_t kShared = sizeof(LinearShared<M>);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<LinearShared<M>*>(memory);
    const Linear& p = args.problem;
    const LinearTask task = linear_task<M>(args.plan, block);
    for (int i = thread_index(); i < M::kRows && task.row + i < p.rows; i += kThreads) {
      shared.row[i] = row_offset(p.x, task.row + i);
    }
    sync_block();
    LinearSums<M> sums{};
    const int64_t steps = (p.inner + M::kDepth - 1) / M::kDepth;
    for (int t = 0; t < M::kStages - 1; ++t) {
      if (t < steps) load_step<M>(args, task, t * M::kDepth, t, shared);
      commit_copies();
    }
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t next = t + M::kStages - 1;
      if (next < steps) load_step<M>(args, task, next * M::kDepth, static_cast<int>(next % M::kStages), shared);
      commit_copies();
      wait_copies<M::kStages - 1>();
      sync_block();
      const int stage = static_cast<int>(t % M::kStages);
      multiply_step<M>(shared_address(shared.x[stage]), shared_address(shared.w[stage]), sums);
      sync_block();
    }
    write_sums<M>(p, task, sums);
  }
};

}  // namespace qkv::inline QKV_LEVEL
