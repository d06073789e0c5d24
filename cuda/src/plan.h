// SPDX-License-Identifier: Apache-2.0
// What a kernel is launched with: the problem, with every pointer in device memory, and how its work is cut.
#pragma once

#include "qkv/alignment.h"
#include "tensor_map.h"

namespace qkv {

struct Plan {
  int64_t groups = 0;      // kv heads, or the heads asked for
  int64_t group_size = 1;  // query heads whose rows lie side by side in a tile
  int64_t rows = 0;        // the most rows (query, head of the group) of a batch element and group
  int64_t chunks = 0;      // tiles of rows per batch element and group
  int64_t parts = 1;       // the most that the keys of a sequence are cut into
  int64_t part_keys = 0;   // keys of a part, a multiple of the tile's
  int64_t section = 1;     // (batch element, group) pairs whose tiles are taken in turn: their K and V fit the cache
  int64_t blocks = 0;      // tasks
  int64_t grid = 0;        // blocks that share them; fewer only on Hopper, one for each multiprocessor
  int32_t drawn = 0;       // fewer blocks draw their tasks one by one; else they are dealt out beforehand
  int32_t by_keys = 0;     // statistics: a block owns a tile of keys and takes all rows
  int32_t async_q = 0, async_k = 0, async_v = 0, async_out = 0;  // rows lie on multiples of 16 bytes with unit stride
  int32_t band = 0;  // p - before <= j <= p + after is all that the mask and the bias say, or they are none
  int64_t before = 0, after = 0;
  void* partial = nullptr;     // parts > 1: (B, groups, rows, parts, Dv + 2) A: m, l and o of each part
  void* normaliser = nullptr;  // (B, heads, rows, 2) A: m and 1 / l, for the walk that writes weights
};

// float32 operands as pairs of float16 (portable/halves.cuh).
struct HalvedRange {  // of a batch element and kv head: exponents of the rows of q, k and v, 0 where there are none
  int64_t top[3];     // the largest, biased by 127
  int64_t bottom[3];  // 255 - the smallest
};
struct Halved {
  HalvedRange* range = nullptr;  // (B, Hkv)
  float* q_unit = nullptr;       // (B, Hq, Sq): powers of two
};
QKV_HD constexpr int64_t halved_columns(int64_t columns) { return (columns + 7) / 8 * 8; }

struct KernelArgs {
  Problem problem;
  Plan plan;
  Halved halved;  // forward_mma.cuh takes the heads that are not wide, forward_fma.cuh, if it is given, those that are
};

struct Boxes {  // an array for the copy engine
  TensorMap map;
  int64_t inner;     // batch element b is (b mod inner, b / inner)
  int32_t moves[3];  // 0: all heads are the same, all of b mod inner, of b / inner
  int32_t there;     // 0: the array cannot be taken so
};
struct HopperArgs : KernelArgs {
  Boxes q, k, v, out;
  int32_t modifies;  // scores are more than scale q k^T
  uint32_t* next;    // if plan.drawn: how many tasks were drawn, 0 before the launch
};

struct HalveArgs {
  Problem problem, views;  // whose q, k and v are the pairs
  Halved halved;
};

struct AlignArgs {  // problem's arrays in device memory, and with chunks two more of the size of theirs
  Alignment problem;
  void *top, *share;
};

// The kernels of one dtype and padded head_dim. Each launch returns a cudaError_t, 0 when it was queued.
struct KernelTable {
  DType dtype;
  int head_dim;  // D and Dv at most
  bool any;      // any dtype (f32: all but f64), any score, any D
  struct Tile {
    int rows, keys, threads, shared;  // shared memory in bytes
    int64_t part_keys;                // the most keys of a part, for the sake of the sums' roundings; 0: any number
  } many, few, halved;                // few: a decoding step, whose rows fit few_tiles tiles of this height
  int few_tiles;
  int (*forward)(const KernelArgs&, int few, int general, void* stream);
  int (*merge)(const KernelArgs&, int general, void* stream);
  int (*forward_halved)(const KernelArgs&, int general, void* stream);  // nullptr: no such kernel
  int (*weights)(const KernelArgs&, void* stream);                      // nullptr: that of a smaller head_dim does
  int (*stats)(const KernelArgs&, void* stream);                        // of any, with the smallest head_dim
  int (*align)(const AlignArgs&, void* stream);                         // likewise
};

// The kernel for Hopper of one 16-bit dtype and padded head_dim.
struct HopperTable {
  DType dtype;
  int head_dim;
  KernelTable::Tile tile;
  int (*forward)(const HopperArgs&, void* stream);
};

int halve(const HalveArgs& args, void* stream);  // writes the pairs; a cudaError_t

}  // namespace qkv
