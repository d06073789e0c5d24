// SPDX-License-Identifier: Apache-2.0
// The steps of a layer around its attention, for arrays in GPU memory: a product with a matrix, a norm of each row, and
// what happens to each element. (For arrays in host memory they are NumPy's.)
#pragma once

#include "qkv/problem.h"

namespace qkv {

struct RowArray {        // (..., columns); the dimensions before the last are a list of rows
  char* data = nullptr;  // nullptr: not given
  DType dtype = DType::f32;
  int n_dims = 0;  // of the list, after merging
  int64_t extent[kMaxLead] = {}, step[kMaxLead] = {};
  int64_t column = 1;  // steps in elements, also zero or negative
};

struct Matrix {          // or a vector, whose row is 0
  char* data = nullptr;  // nullptr: not given
  DType dtype = DType::f32;
  int64_t row = 0, column = 1;
};

// Everything is computed in float, or in double where an array is float64, and rounded once.
struct LayerStep {
  const char* function = "linear";  // for messages
  int device = 0;                   // that all arrays are on
  void* stream = nullptr;
  int64_t rows = 0, columns = 0;  // of the result
};

struct Linear : LayerStep {  // y = x w + b
  int64_t inner = 0;
  RowArray x;  // (rows, inner)
  Matrix w;    // (inner, columns)
  Matrix b;    // (columns,)
  RowArray y;  // (rows, columns)
};

struct Norm : LayerStep {  // y = (x - mean) / sqrt(variance + eps) * weight + bias
  RowArray x;
  Matrix weight, bias;  // (columns,)
  double eps = 0;
  RowArray y;
};

enum class Op : int32_t {
  copy,  // x
  add,   // x + other
  relu,  // max(x, 0), NaN for NaN
  gelu,  // x / 2 (1 + erf(x / sqrt 2))
};

struct Elementwise : LayerStep {
  Op op = Op::copy;
  RowArray x, other, y;
};

inline namespace QKV_LEVEL {

QKV_HD inline int64_t row_offset(const RowArray& a, int64_t row) {
  int64_t offset = 0;
  QKV_ROLLED
  for (int t = a.n_dims - 1; t > 0; --t) {
    offset += row % a.extent[t] * a.step[t];
    row /= a.extent[t];
  }
  return offset + row * a.step[0];  // 0 without dimensions
}

}  // namespace QKV_LEVEL

}  // namespace qkv
