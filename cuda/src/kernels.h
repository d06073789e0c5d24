// SPDX-License-Identifier: Apache-2.0
// Which kernel runs a problem, and how its work is cut.
#pragma once

#include <string>

#include "plan.h"
#include "runtime.h"

namespace qkv::cuda {

struct Choice {
  const KernelTable* table = nullptr;
  bool few = false;      // a decoding step: the rows of a batch element and group fit few_tiles tiles of few rows
  bool general = false;  // scores with softcap, bias or ALiBi, of any kind, or a scale that the exponent cannot carry
  bool forward = true;   // out, lse or the normaliser is wanted
  bool halved = false;   // float32 as pairs of float16, on tensor cores
  const HopperTable* hopper = nullptr;  // in place of the portable kernel
  const KernelTable::Tile& tile() const {
    return hopper ? hopper->tile : (halved ? table->halved : (few ? table->few : table->many));
  }
};

// nullptr with a reason when no kernel was compiled for it.
const KernelTable* find_table(const Problem& p, std::string& reason);
const KernelTable& weights_table(const Problem& p, const KernelTable& table);  // whose kernel writes weights
const KernelTable& align_table(DType dtype);                                   // f32 or f64
Choice choose(const Problem& p, const KernelTable& table, const DeviceFacts& facts);

// Reads lengths and offsets, which must still be in host memory.
Plan make_plan(const Problem& p, const Choice& choice, const DeviceFacts& facts);
// The walk that writes weights takes the keys in one part, and tiles of many rows.
Plan weights_plan(const Problem& p, const Plan& plan, const KernelTable& table);

// The same for statistics of rows; for those of keys a block per tile of keys, which walks over all rows.
Plan stats_plan(const Problem& p, const Plan& plan, const KernelTable& table, bool by_keys);

// How the rows of q, k and v, by now in device memory, may be read.
void set_alignment(const Problem& on_device, Plan& plan);

// Of the same parts of the keys, for the heads that pairs of float16 cannot hold.
Plan fma_plan(const Plan& plan, const KernelTable& table);

// q, k and v of `pairs` and what goes with them, from `data` on; how many bytes that takes.
int64_t place_pairs(const Problem& p, char* data, Problem& pairs, Halved& halved);
int64_t range_bytes(const Problem& p);

int64_t partial_bytes(const Problem& p, const Plan& plan);
int64_t normaliser_bytes(const Problem& p);

}  // namespace qkv::cuda
