// SPDX-License-Identifier: Apache-2.0
// From a problem to the compiled kernels of this level: A by dtype, NV by how many lanes there are to fill.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/peak-inl.h"
#include "cpu/results-inl.h"

namespace qkv::QKV_LEVEL {

template <class A>
inline int64_t scratch_bytes_as(const Problem& p) {
  Scratch<A> s;
  return Scratch<A>::carve(p, nullptr, &s);
}

template <class A>
inline void run_task_as(const Problem& p, int64_t task, void* memory, int worker) {
  Scratch<A> scratch;
  Scratch<A>::carve(p, static_cast<A*>(memory), &scratch);
  const TaskGrid g = task_grid(p);
  // The chunks with the most keys under a causal mask are the last: they go first.
  const int64_t pairs = p.B * g.groups, pair = task % pairs, turn = task / pairs;
  const int64_t batch = pair / g.groups, group = pair % g.groups;
  const int64_t rows = p.rows ? p.n_rows : sequence(p, batch).Sq;
  const auto chunk = [&](int64_t index) {
    // A single vector of lanes wastes less when it holds every row; the choice depends on this sequence alone.
    if (rows * g.group_size <= kLanes<A>) run_chunk<A, 1>(p, g, batch, group, index, scratch, worker);
    else run_chunk<A, 2>(p, g, batch, group, index, scratch, worker);
  };
  if (p.stats.received) {
    for (int64_t i = 0; i < g.chunks && !stopped(p); ++i) chunk(i);
  } else {
    chunk(g.chunks - 1 - turn);
  }
}

inline int64_t task_count(const Problem& p) { return task_grid(p).count; }
inline int64_t scratch_bytes(const Problem& p) {
  return p.dtype == DType::f64 ? scratch_bytes_as<double>(p) : scratch_bytes_as<float>(p);
}
inline void run_task(const Problem& p, int64_t task, void* scratch, int worker) {
  if (p.dtype == DType::f64) run_task_as<double>(p, task, scratch, worker);
  else run_task_as<float>(p, task, scratch, worker);
}

inline constexpr KernelTable make_table(const char* level) {
  return {level, kVectorBytes, kTaskRows, kKeys, task_count, scratch_bytes, run_task, fma_loop, read_loop};
}

}  // namespace qkv::QKV_LEVEL
