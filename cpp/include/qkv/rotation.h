// SPDX-License-Identifier: Apache-2.0
// Rotary embedding: pairs of columns of a row turn by the angles of its position.
#pragma once

#include "qkv/problem.h"

namespace qkv {

// out[a] = x[a] cos - x[b] sin, out[b] = x[a] sin + x[b] cos for the pairs (a, b) of each row: n of them, (t, t + n),
// or (2 t, 2 t + 1) where interleaved. The columns after them are copied. A = float, double for float64.
struct Rotation {
  int64_t outer, rows, D, n;  // outer: heads of all batch elements
  DType dtype;                // of x and out
  const char* x;              // (outer, rows, D)
  const int64_t* x_at;        // (outer,) where its rows begin, in elements
  int64_t x_s, x_d;
  const void *cos, *sin;     // (..., rows, n) A, contiguous rows
  const int64_t* angles_at;  // (outer,) likewise
  int64_t angles_s;
  char* out;  // (outer, rows, D), contiguous
  bool interleaved;
};

}  // namespace qkv
