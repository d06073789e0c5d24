// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of rows (qkv/rotation.h), each element as NumPy would compute it: two products, a sum, one rounding
// to the dtype. A pass of its own and no part of the attention's loop: keys would be turned again by each task that
// reads them, and queries turned as their tiles are loaded would save no more than to write and read a copy.
#pragma once

#include "cpu/rows-inl.h"
#include "qkv/rotation.h"

namespace qkv::inline QKV_LEVEL {

// Two loops: from one, GCC 12 makes instructions that fuse the product with the sum, whatever -ffp-contract says.
template <class A, bool kInterleaved>
inline void turn(const A* x, const A* cos, const A* sin, int64_t n, A* __restrict out) {
  constexpr int64_t step = kInterleaved ? 2 : 1;
  const A* const y = x + (kInterleaved ? 1 : n);
  A* const other = out + (kInterleaved ? 1 : n);
  for (int64_t t = 0; t < n; ++t) out[t * step] = x[t * step] * cos[t] - y[t * step] * sin[t];
  for (int64_t t = 0; t < n; ++t) {
    const A a = x[t * step] * sin[t], b = y[t * step] * cos[t];
    other[t * step] = mutant(71) ? a - b : a + b;
  }
}

// Rows first ... end - 1 of all; scratch has 2 D of A.
template <class A>
inline void rotate_as(const Rotation& r, int64_t first, int64_t end, A* scratch) {
  const int64_t size = itemsize(r.dtype);
  const bool same = r.dtype == kDType<A>;
  for (int64_t i = first; i < end; ++i) {
    const int64_t o = i / r.rows, row = i % r.rows;
    const char* const from = r.x + (r.x_at[o] + row * r.x_s) * size;
    char* const to = r.out + i * r.D * size;
    const A* x = reinterpret_cast<const A*>(from);
    if (!same || r.x_d != 1) {
      load_row(from, r.dtype, r.x_d, r.D, scratch);
      x = scratch;
    }
    A* const out = same ? reinterpret_cast<A*>(to) : scratch + r.D;
    const int64_t at = r.angles_at[o] + row * r.angles_s;
    const A *const cos = static_cast<const A*>(r.cos) + at, *const sin = static_cast<const A*>(r.sin) + at;
    if (r.interleaved) turn<A, true>(x, cos, sin, r.n, out);
    else turn<A, false>(x, cos, sin, r.n, out);
    for (int64_t d = 2 * r.n; d < r.D; ++d) out[d] = x[d];
    if (!same) store_row(out, r.D, to, r.dtype, 1);
  }
}

}  // namespace qkv::inline QKV_LEVEL
