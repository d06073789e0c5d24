// SPDX-License-Identifier: Apache-2.0
// Monotonic alignments: the one recurrence over rows of scores that no softmax of a row can express.
#pragma once

#include "qkv/problem.h"

namespace qkv {

// A = float, double for float64. Rows are taken in order; state carries the alignment of the row before.
struct Alignment {
  int64_t heads, rows, keys;  // heads: of all batch elements
  DType dtype;                // f32 or f64
  void* energy;               // (heads, rows, keys) A: in scores, -inf where masked; out the alignment
  void* chunk;                // (heads, rows, keys) A: likewise; out the weights of the chunks. nullptr: none
  int64_t width;              // keys of a chunk; 0: from the first on
  bool hard;                  // stop at the first score above 0, instead of with probability sigmoid(score)
  double* state;              // (heads, keys): the alignment of the row before, then of the last row
};

}  // namespace qkv
