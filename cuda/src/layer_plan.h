// SPDX-License-Identifier: Apache-2.0
// What the kernels of a layer's steps are launched with, and their table.
#pragma once

#include "qkv/layers.h"

namespace qkv {

enum class LinearSize { Few, Some, Many };  // of a product: Few rows, as in decoding; Many tiles of the largest kind

struct LinearPlan {
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t section_tiles = 1;         // rows of tiles whose blocks run together
  int32_t by_columns = 0;            // what lies side by side in w are the elements of a column
  int32_t async_x = 0, async_w = 0;  // lines lie on multiples of 16 bytes with unit stride
};

struct LinearArgs {
  Linear problem;
  LinearPlan plan;
};

struct NormArgs {
  Norm problem;
};

struct ElementwiseArgs {
  Elementwise problem;
};

// The products of one kind. Each launch returns a cudaError_t, 0 when it was queued.
struct LinearTable {
  const char* kernel;  // its name, for explain
  struct Tile {
    int rows, columns;
  } tile[3];    // by size
  int element;  // bytes of what lies in shared memory
  int enough;   // tiles of the largest kind, that keep a GPU busy
  int (*linear)(const LinearArgs&, LinearSize size, void* stream);
};

struct LayerTable {
  LinearTable f16, bf16;  // x and w of this dtype
  LinearTable f32, f64;   // of any dtypes: what is computed in float or double
  int (*norm)(const NormArgs&, void* stream);
  int (*elementwise)(const ElementwiseArgs&, void* stream);
};

extern const LayerTable portable_layers;

}  // namespace qkv
