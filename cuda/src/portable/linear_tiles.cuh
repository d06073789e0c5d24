// SPDX-License-Identifier: Apache-2.0
// What the products with a matrix share: which tile a block has, its copies of x and w, and how sums leave it.
//
// Parallel   a block per tile of y, kRows x kColumns. Blocks are taken in sections of rows, so that those which run
//            together read the same lines of x and w from the L2 cache. Warps share the tile, or, where it is small,
//            kDepth: then each has sums of the whole tile.
// Memory     shared: kStages tiles of x and w, by lines: of x's rows, of w's rows or columns as they lie (Order). A
//            line is cut into chunks of 16 bytes. A thread copies one chunk of every kStep-th line: where it lies in
//            shared memory is a constant of the instruction, where it comes from a pointer that moves on. What lies
//            beyond the last row or column is another's: it stays in sums that nobody writes. Beyond the end of inner
//            there are zeros. At the end the sums lie there, and leave by whole lines.
#pragma once

#include "layer_plan.h"
#include "portable/scores.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

enum class Order { Rows, Columns };            // of w: what a line in shared memory holds
enum class Banks { Swizzled, Padded, Plain };  // chunk c of line i at c ^ i; a chunk more for each line; neither

constexpr int of_size(LinearSize s, int few, int some, int many) {
  return s == LinearSize::Few ? few : (s == LinearSize::Some ? some : many);
}

template <int Lines, int Chunks, Banks B>
struct TileLayout {
  static constexpr int kLines = Lines, kChunks = Chunks, kPitch = Chunks * 16 + (B == Banks::Padded ? 16 : 0);
  static constexpr int kBytes = Lines * kPitch;
  static constexpr bool kSwizzled = B == Banks::Swizzled;

  QKV_DEVICE static int offset(int line, int chunk) {  // eight lines, or those of 128 bytes, lie in different banks
    const int swizzle = kSwizzled ? (Chunks < 8 ? line / 2 & 3 : line & 7) : 0;
    return line * kPitch + (chunk ^ swizzle) * 16;
  }
  // From the offset of (line, chunk 0 or 1) to that of (line + lines, chunk + chunks), lines a multiple of 8, chunks
  // of 2.
  QKV_DEVICE static int moved(int offset, int lines, int chunks) {
    constexpr int kCycle = Chunks < 8 ? Chunks : 8;
    return (offset ^ (chunks % kCycle * 16)) + lines * kPitch + chunks / kCycle * kCycle * 16;
  }
};

// Of a tile M, that has kRowWarps x kColumnWarps x kDepthWarps warps with kWarpRows x kWarpColumns and kWarpDepth each.
template <class M>
struct Frame {
  static constexpr int kPack = 16 / static_cast<int>(sizeof(typename M::Stored));
  static constexpr int kThreads = 32 * M::kRowWarps * M::kColumnWarps * M::kDepthWarps;
  static constexpr int kRows = M::kRowWarps * M::kWarpRows, kColumns = M::kColumnWarps * M::kWarpColumns;
  static constexpr int kDepth = M::kDepthWarps * M::kWarpDepth;
  static constexpr bool kByColumns = M::kOrder == Order::Columns;
  static constexpr Banks kDeep = M::kSwizzled ? Banks::Swizzled : Banks::Padded;
  static constexpr Banks kWide = M::kSwizzled ? Banks::Swizzled : Banks::Plain;
  using X = TileLayout<kRows, kDepth / kPack, kDeep>;
  using W =
      TileLayout<kByColumns ? kColumns : kDepth, (kByColumns ? kDepth : kColumns) / kPack, kByColumns ? kDeep : kWide>;
};

template <class M>
struct LinearShared {
  alignas(16) char x[M::kStages][Frame<M>::X::kBytes];
  alignas(16) char w[M::kStages][Frame<M>::W::kBytes];
};

struct LinearTask {
  int64_t row, column;  // the first of the tile
};

struct WarpPlace {
  int row, column, depth;  // the first of the warp, in the tile
};

// --- tiles ---------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE LinearTask linear_task(const LinearPlan& plan, int64_t block) {
  const int64_t section = plan.section_tiles;
  const int64_t first = block / (section * plan.column_tiles) * section, left = plan.row_tiles - first;
  const int64_t in_section = left < section ? left : section, rest = block - first * plan.column_tiles;
  return {(first + rest % in_section) * Frame<M>::kRows, rest / in_section * Frame<M>::kColumns};
}

// As unsigned: no corrections for a sign.
QKV_DEVICE int thread_over(int n) {
  return static_cast<int>(static_cast<unsigned>(thread_index()) / static_cast<unsigned>(n));
}

template <class M>
QKV_DEVICE WarpPlace warp_place() {
  const int warp = thread_over(32);
  const int flat = warp % (M::kRowWarps * M::kColumnWarps);
  return {flat / M::kColumnWarps * M::kWarpRows, flat % M::kColumnWarps * M::kWarpColumns,
          warp / (M::kRowWarps * M::kColumnWarps) * M::kWarpDepth};
}

// --- load ----------------------------------------------------------------------------------------------------

QKV_DEVICE int count_within(int64_t left, int most) {
  return left < 0 ? 0 : (left < most ? static_cast<int>(left) : most);
}

template <class E>
struct alignas(16) Pack {
  E x[16 / sizeof(E)];
};

// The first n elements of a chunk, as E; the others become 0.
template <class E>
QKV_DEVICE Pack<E> load_pack(const char* from, DType dtype, int64_t step, int n) {
  Pack<E> pack;
  const auto load = [&](const auto& element) {
    QKV_UNROLL
    for (int e = 0; e < 16 / static_cast<int>(sizeof(E)); ++e) pack.x[e] = e < n ? element(e * step) : E{0};
  };
  if constexpr (sizeof(E) == 2) {
    load([&](int64_t at) { return reinterpret_cast<const uint16_t*>(from)[at]; });
  } else {
    switch (dtype) {
      case DType::f32: load([&](int64_t at) { return load_as<E>(from, DType::f32, at); }); break;
      case DType::bf16: load([&](int64_t at) { return load_as<E>(from, DType::bf16, at); }); break;
      case DType::f16: load([&](int64_t at) { return load_as<E>(from, DType::f16, at); }); break;
      default: load([&](int64_t at) { return load_as<E>(from, DType::f64, at); });
    }
  }
  return pack;
}

template <class M>
struct SourceX {  // lines are rows
  using Layout = typename Frame<M>::X;
  static constexpr bool kDeep = true;  // lines run along inner
  const LinearArgs& args;
  const LinearTask& task;

  QKV_DEVICE const RowArray& array() const { return args.problem.x; }
  QKV_DEVICE bool async() const { return args.plan.async_x != 0; }
  QKV_DEVICE int64_t step() const { return array().column; }  // from element to element of a line
  QKV_DEVICE int64_t deep() const { return array().column; }  // along inner
  QKV_DEVICE int64_t wide() const { return 0; }
  QKV_DEVICE int64_t origin() const { return array().n_dims > 1 ? 0 : at(0, 0); }  // none lies before it
  QKV_DEVICE int64_t at(int line, int element) const {  // the offset of an element of the first tile
    const int64_t row = task.row + line, last = args.problem.rows - 1;
    return row_offset(array(), row < last ? row : last) + element * step();
  }
};

template <class M>
struct SourceW {
  using Layout = typename Frame<M>::W;
  static constexpr bool kDeep = Frame<M>::kByColumns;
  const LinearArgs& args;
  const LinearTask& task;

  QKV_DEVICE const Matrix& array() const { return args.problem.w; }
  QKV_DEVICE bool async() const { return args.plan.async_w != 0; }
  QKV_DEVICE int64_t step() const { return kDeep ? array().row : array().column; }
  QKV_DEVICE int64_t deep() const { return array().row; }
  QKV_DEVICE int64_t wide() const { return args.problem.columns - task.column; }  // columns that are left
  QKV_DEVICE int64_t origin() const { return at(0, 0); }
  QKV_DEVICE int64_t at(int line, int element) const {
    const int64_t column = kDeep ? line : element, inner = kDeep ? element : line, beyond = kDeep ? wide() - 1 : 0;
    return (task.column + (column < wide() ? column : beyond)) * array().column + inner * deep();
  }
};

// A thread's copies of one operand's tiles, one tile of inner after the other.
template <class M, class Source>
struct TileCopies {
  using E = typename M::Stored;
  using L = typename Source::Layout;
  static constexpr int kPack = Frame<M>::kPack, kDepth = Frame<M>::kDepth, kStep = Frame<M>::kThreads / L::kChunks;
  static constexpr int kEach = L::kLines / kStep;
  static_assert(kStep * kEach == L::kLines && (!L::kSwizzled || kStep % 8 == 0));

  const Source source;
  const char* base;        // of the next tile
  uint32_t offset[kEach];  // from there to this thread's chunks, in bytes
  int place;               // of the first of them in shared memory
  bool whole;              // asynchronous, and there is all of each line

  QKV_DEVICE TileCopies(const LinearArgs& args, const LinearTask& task) : source{args, task} {
    constexpr int kBytes = static_cast<int>(sizeof(E));
    const int64_t origin = source.origin();
    base = source.array().data + origin * kBytes;
    const int line = thread_over(L::kChunks), chunk = thread_index() - line * L::kChunks;
    place = L::offset(line, chunk);
    whole = source.async() && (Source::kDeep || source.wide() >= Frame<M>::kColumns || source.wide() % kPack == 0);
    QKV_UNROLL
    for (int i = 0; i < kEach; ++i) {
      offset[i] = static_cast<uint32_t>((source.at(line + i * kStep, chunk * kPack) - origin) * kBytes);
    }
  }

  // The n-th of `parts` parts of the next tile, where it is whole. left: what there is of inner.
  QKV_DEVICE void copy(char* tile, int64_t left, int n, int parts) const {
    if (!whole || left < kDepth) return;
    QKV_UNROLL
    for (int i = kEach * n / parts; i < kEach * (n + 1) / parts; ++i) {
      copy_async(tile + place + i * kStep * L::kPitch, base + offset[i], 16);
    }
  }

  // The next tile, where it is not, as far as it is there: zeros beyond.
  QKV_DEVICE void copy_edge(char* tile, int64_t left) const {
    if (left <= 0 || (whole && left >= kDepth)) return;
    const int line = thread_over(L::kChunks), chunk = thread_index() - line * L::kChunks;
    const auto& array = source.array();
    const int size = static_cast<int>(itemsize(array.dtype));
    const int64_t first = (source.args.problem.inner - left) * source.deep();
    const int most = count_within((Source::kDeep ? left : source.wide()) - chunk * kPack, kPack);
    QKV_ROLLED
    for (int i = 0; i < kEach; ++i) {
      const int n = Source::kDeep || line + i * kStep < left ? most : 0;
      const char* const from = array.data + (source.at(line + i * kStep, chunk * kPack) + first) * size;
      char* const to = tile + place + i * kStep * L::kPitch;
      if (source.async()) copy_async(to, n > 0 ? from : array.data, n * size);
      else *reinterpret_cast<Pack<E>*>(to) = load_pack<E>(from, array.dtype, source.step(), n);
    }
  }

  QKV_DEVICE void move_on() { base += kDepth * source.deep() * static_cast<int64_t>(sizeof(E)); }
};

template <class M>
struct LinearCopies {
  TileCopies<M, SourceX<M>> x;
  TileCopies<M, SourceW<M>> w;
  int64_t left;  // of inner, that is not yet copied

  QKV_DEVICE LinearCopies(const LinearArgs& args, const LinearTask& task)
      : x(args, task), w(args, task), left(args.problem.inner) {}

  // The n-th part of the copies of the next tile, all of which are a group of their own, empty beyond the last tile.
  QKV_DEVICE void copy(int stage, int n, int parts, LinearShared<M>& shared) {
    x.copy(shared.x[stage], left, n, parts);
    w.copy(shared.w[stage], left, n, parts);
    if (n + 1 < parts) return;
    if (!x.whole || !w.whole || left < Frame<M>::kDepth) {
      x.copy_edge(shared.x[stage], left);
      w.copy_edge(shared.w[stage], left);
    }
    commit_copies();
    x.move_on();
    w.move_on();
    left -= Frame<M>::kDepth;
  }
};

// --- write ---------------------------------------------------------------------------------------------------

template <class A>
QKV_DEVICE void store_as(const RowArray& y, int64_t at, A x) {
  switch (y.dtype) {
    case DType::f32: reinterpret_cast<float*>(y.data)[at] = static_cast<float>(x); break;
    case DType::bf16: reinterpret_cast<uint16_t*>(y.data)[at] = float_to_bf16(static_cast<float>(x)); break;
    default: store_from_double(y.data, y.dtype, at, static_cast<double>(x));
  }
}

// n of four neighbours in a row.
template <class A>
QKV_DEVICE void store_four(const RowArray& y, int64_t at, int n, const A (&x)[4]) {
  if constexpr (sizeof(A) == 4) {
    const bool own = y.column == 1 && n == 4;
    if (own && y.dtype == DType::f32 && reinterpret_cast<uintptr_t>(y.data + at * 4) % 16 == 0) {
      *reinterpret_cast<Pack<float>*>(y.data + at * 4) = {x[0], x[1], x[2], x[3]};
      return;
    }
    if (own && y.dtype != DType::f32 && reinterpret_cast<uintptr_t>(y.data + at * 2) % 8 == 0) {
      const bool half = y.dtype == DType::f16;
      struct alignas(8) Pairs {
        uint32_t low, high;
      };
      *reinterpret_cast<Pairs*>(y.data + at * 2) = {half ? pack<Half>(x[0], x[1]) : pack<Bfloat>(x[0], x[1]),
                                                    half ? pack<Half>(x[2], x[3]) : pack<Bfloat>(x[2], x[3])};
      return;
    }
  }
  QKV_UNROLL
  for (int e = 0; e < 4; ++e) {
    if (e < n) store_as<A>(y, at + e * y.column, x[e]);
  }
}

// Sums, y = x w + b: through shared memory that the loop has left, kPassRows rows at a time. put(row, line): a warp
// writes the row-th of its rows and so on, to a line of kPitch numbers. Warps that shared kDepth have a tile each.
template <class M, class A, class Put>
QKV_DEVICE void write_tile(const Linear& p, const LinearTask& task, char* memory, const Put& put) {
  using F = Frame<M>;
  constexpr int kPitch = F::kColumns + 8, kRows = F::kRows / M::kPasses, kPieces = F::kColumns / 4;
  static_assert(sizeof(A) * kPitch * kRows * M::kDepthWarps <= sizeof(LinearShared<M>));
  static_assert(F::kThreads % kPieces == 0 && kRows % M::kWarpRows == 0);
  A* const tile = reinterpret_cast<A*>(memory);
  const WarpPlace place = warp_place<M>();
  const int piece = thread_index() % kPieces * 4;
  const int64_t column = task.column + piece;
  const int n = count_within(p.columns - column, 4);
  A b[4] = {};
  QKV_UNROLL
  for (int e = 0; e < 4; ++e) {
    if (p.b.data && e < n) b[e] = load_as<A>(p.b.data, p.b.dtype, (column + e) * p.b.column);
  }
  QKV_ROLLED
  for (int first = 0; first < F::kRows; first += kRows) {
    sync_block();
    if (place.row / kRows * kRows == first) {
      put(tile + (place.depth / M::kWarpDepth * kRows + place.row - first) * kPitch + place.column, kPitch);
    }
    sync_block();
    QKV_ROLLED
    for (int i = thread_index() / kPieces; i < kRows; i += F::kThreads / kPieces) {
      const int64_t row = task.row + first + i;
      if (row >= p.rows || n == 0) break;
      A y[4] = {};
      QKV_UNROLL
      for (int d = 0; d < M::kDepthWarps; ++d) {
        QKV_UNROLL
        for (int e = 0; e < 4; ++e) y[e] += tile[(d * kRows + i) * kPitch + piece + e];
      }
      QKV_UNROLL
      for (int e = 0; e < 4; ++e) y[e] += b[e];
      store_four<A>(p.y, row_offset(p.y, row) + column * p.y.column, n, y);
    }
  }
}

}  // namespace qkv::inline QKV_LEVEL
