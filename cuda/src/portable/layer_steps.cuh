// SPDX-License-Identifier: Apache-2.0
// What a layer does to rows and elements between its products, in any strides and dtypes.
//
// Norm       y = (x - mean) / sqrt(variance + eps) * weight + bias: a warp per row, which it reads three times, the
//            last two from a cache. The variance is of what is centred: nothing cancels.
// Elements   y = x, x + other, relu(x) or gelu(x): a thread per kEach neighbours in a row.
// Numerics   A = float or double, one rounding at the end.
// References Ba, Kiros & Hinton 2016 (arXiv 1607.06450); Hendrycks & Gimpel 2016 (arXiv 1606.08415).
#pragma once

#include "portable/linear_tiles.cuh"

namespace qkv::inline QKV_LEVEL {

template <class A>
QKV_DEVICE A sum_of_warp(A x) {
  QKV_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

template <class A>
struct NormRows {
  using Args = NormArgs;
  static constexpr int kThreads = 128, kBlocks = 1, kRows = kThreads / 32;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const Norm& p = args.problem;
    const int lane = thread_index() % 32;
    const int64_t row = block * kRows + thread_index() / 32;
    if (row >= p.rows) return;  // the whole warp
    const int64_t from = row_offset(p.x, row), to = row_offset(p.y, row);
    const auto x = [&](int64_t c) { return load_as<A>(p.x.data, p.x.dtype, from + c * p.x.column); };
    const A n = static_cast<A>(p.columns);
    A sum = 0, squares = 0;
    for (int64_t c = lane; c < p.columns; c += 32) sum += x(c);
    const A mean = sum_of_warp(sum) / n;
    for (int64_t c = lane; c < p.columns; c += 32) squares = multiply_add(x(c) - mean, x(c) - mean, squares);
    const A deviation = static_cast<A>(sqrt(sum_of_warp(squares) / n + static_cast<A>(p.eps)));
    for (int64_t c = lane; c < p.columns; c += 32) {
      A y = (x(c) - mean) / deviation * load_as<A>(p.weight.data, p.weight.dtype, c * p.weight.column);
      if (p.bias.data) y += load_as<A>(p.bias.data, p.bias.dtype, c * p.bias.column);
      store_as<A>(p.y, to + c * p.y.column, y);
    }
  }
};

template <class A>
QKV_DEVICE A apply(Op op, A x, A other) {
  switch (op) {
    case Op::copy: return x;
    case Op::add: return x + other;
    case Op::relu: return x < 0 ? static_cast<A>(0) : x;
    case Op::gelu: return x / 2 * (1 + static_cast<A>(erf(x * static_cast<A>(0.70710678118654752440))));
  }
  return x;
}

template <class A>
struct Elements {
  using Args = ElementwiseArgs;
  static constexpr int kThreads = 128, kBlocks = 1, kEach = 4;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static int64_t pieces(const Elementwise& p) { return (p.columns + kEach - 1) / kEach; }

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const Elementwise& p = args.problem;
    const int64_t at = block * kThreads + thread_index(), each = pieces(p), row = at / each, first = at % each * kEach;
    if (row >= p.rows) return;
    const int64_t from = row_offset(p.x, row), to = row_offset(p.y, row);
    const int64_t other = p.other.data ? row_offset(p.other, row) : 0;
    for (int64_t c = first; c < first + kEach && c < p.columns; ++c) {
      const A x = load_as<A>(p.x.data, p.x.dtype, from + c * p.x.column);
      const A z = p.other.data ? load_as<A>(p.other.data, p.other.dtype, other + c * p.other.column) : 0;
      store_as<A>(p.y, to + c * p.y.column, apply(p.op, x, z));
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
