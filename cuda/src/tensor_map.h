// SPDX-License-Identifier: Apache-2.0
// An array as Hopper's copy engine takes it: by boxes of 64 columns, so many heads and rows, in a map of five
// dimensions: columns, heads, rows, and two for the batch elements.
#pragma once

#include <stdint.h>

namespace qkv {

struct alignas(128) TensorMap {
  uint64_t words[16];  // CUtensorMap
};

// What a map is made of. Sizes in elements of 16 bits; strides in bytes, of the dimensions but the first.
struct TensorShape {
  void* data;
  uint64_t size[5], stride[4];
  uint32_t box[5];
};

struct BoxPlace {  // of the first element of a box
  int column, head, row, batch[2];
};

}  // namespace qkv
