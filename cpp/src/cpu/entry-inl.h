// SPDX-License-Identifier: Apache-2.0
// From a problem to the compiled kernels of this level: A by dtype, NV by how many lanes there are to fill.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/peak-inl.h"
#include "cpu/results-inl.h"

namespace qkv::inline QKV_LEVEL {

template <class A>
inline int64_t scratch_bytes_as(const Problem& p) {
  Scratch<A> s;
  return Scratch<A>::carve(p, nullptr, &s);
}

template <class A>
inline void run_task_as(const Problem& p, int64_t task, void* memory, void* partials, int worker, bool merge) {
  Scratch<A> scratch;
  Scratch<A>::carve(p, static_cast<A*>(memory), &scratch);
  const TaskGrid g = task_grid(p);
  // Tasks 0 ... count - 1 are the chunks of rows: the last first, which have the most keys under a causal mask. The
  // others are further parts of the keys of sequences with few rows. A merge task is a batch element and group.
  const int64_t pairs = p.B * g.groups, pair = task % pairs, turn = task / pairs;
  const int64_t batch = pair / g.groups, group = pair % g.groups;
  const bool extra = task >= g.count;
  const Sequence seq = sequence(p, batch);
  const int64_t rows = own_rows(p, seq) * g.group_size;
  Part<A> part{g.parts > 1 ? parts(p, g, batch) : 1, extra ? turn - g.chunks + 1 : 0, {0, seq.Sk}, nullptr, merge};
  if (merge ? part.count == 1 : part.index >= part.count) return;
  if (part.count > 1) {
    part.partials = static_cast<A*>(partials) + pair * g.parts * partial_size<A>(p);
    part.keys.first = part.index * kPartKeys;
    if (part.index + 1 < part.count) part.keys.end = part.keys.first + kPartKeys;
  }
  const auto chunk = [&](int64_t index) {
    // A single vector of lanes wastes less when it holds every row; the choice depends on this sequence alone.
    if (rows <= kLanes<A>) run_chunk<A, 1>(p, g, batch, group, index, scratch, worker, part);
    else run_chunk<A, 2>(p, g, batch, group, index, scratch, worker, part);
  };
  if (p.stats.received) {
    for (int64_t i = 0; i < g.chunks && !stopped(p); ++i) chunk(i);
  } else {
    chunk(extra || merge ? 0 : g.chunks - 1 - turn);
  }
}

inline int64_t task_count(const Problem& p) {
  const TaskGrid g = task_grid(p);
  return g.count + (g.count ? p.B * g.groups * (g.parts - 1) : 0);
}
inline int64_t merge_count(const Problem& p) {
  const TaskGrid g = task_grid(p);
  return g.parts > 1 && g.count ? p.B * g.groups : 0;
}
template <class A>
inline int64_t partial_bytes_as(const Problem& p) {
  const TaskGrid g = task_grid(p);
  return g.parts > 1 ? p.B * g.groups * g.parts * partial_size<A>(p) * static_cast<int64_t>(sizeof(A)) : 0;
}
inline int64_t scratch_bytes(const Problem& p) {
  return p.dtype == DType::f64 ? scratch_bytes_as<double>(p) : scratch_bytes_as<float>(p);
}
inline int64_t partial_bytes(const Problem& p) {
  return round_up(p.dtype == DType::f64 ? partial_bytes_as<double>(p) : partial_bytes_as<float>(p), 64);
}
inline void run_task(const Problem& p, int64_t task, void* scratch, void* partials, int worker) {
  if (p.dtype == DType::f64) run_task_as<double>(p, task, scratch, partials, worker, false);
  else run_task_as<float>(p, task, scratch, partials, worker, false);
}
inline void run_merge(const Problem& p, int64_t task, void* scratch, void* partials, int worker) {
  if (p.dtype == DType::f64) run_task_as<double>(p, task, scratch, partials, worker, true);
  else run_task_as<float>(p, task, scratch, partials, worker, true);
}

inline constexpr KernelTable make_table(const char* level) {
  return {level,         kVectorBytes,  kTaskRows, kKeys,     task_count, merge_count,
          scratch_bytes, partial_bytes, run_task,  run_merge, fma_loop,   read_loop};
}

}  // namespace qkv::inline QKV_LEVEL
