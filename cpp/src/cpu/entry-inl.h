// SPDX-License-Identifier: Apache-2.0
// From a problem to the compiled kernels of this level: A by dtype, NV by how many lanes there are to fill.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/peak-inl.h"
#include "cpu/results-inl.h"

namespace qkv::inline QKV_LEVEL {

inline int64_t chunk_count(const Plan& plan, int64_t rows) {
  return (rows * plan.group_size + plan.task_rows - 1) / plan.task_rows;
}

template <class A>
inline Plan plan_as(const Problem& p, int threads) {
  Plan plan{};
  plan.group_size = p.heads ? 1 : p.Hq / (p.Hkv ? p.Hkv : 1);
  plan.groups = p.heads ? p.n_heads : (plan.group_size ? p.Hkv : 0);
  const int64_t pairs = p.B * plan.groups;
  int64_t rows = result_rows(p);
  if (p.cu_q) {
    rows = 0;
    for (int64_t b = 0; b < p.B; ++b) rows = p.cu_q[b + 1] - p.cu_q[b] > rows ? p.cu_q[b + 1] - p.cu_q[b] : rows;
  }
  plan.task_rows = kTaskRows;  // four tasks a thread even out
  while (plan.task_rows > kLeastTaskRows && (threads > 1 || rows * plan.group_size <= plan.task_rows / 2) &&
         chunk_count(plan, rows) * pairs < 4 * threads) {
    plan.task_rows /= 2;
  }
  plan.chunks = chunk_count(plan, rows);
  plan.parts = 1;
  if (plan.chunks > 0 && !p.lse_in && !p.weights && !has_stats(p) && !two_walks(p.normalizer)) {
    for (int64_t b = 0; b < p.B; ++b) plan.parts = parts(p, plan, b) > plan.parts ? parts(p, plan, b) : plan.parts;
  }
  // The mass a key receives is a sum over all rows: one task adds it up in order.
  plan.tasks = plan.chunks == 0 ? 0 : pairs * (p.stats.received ? 1 : plan.chunks + plan.parts - 1);
  Scratch<A> scratch;
  plan.scratch_bytes = Scratch<A>::carve(p, plan, nullptr, &scratch);
  if (plan.parts > 1) {
    plan.merges = pairs;
    plan.partials_bytes = round_up(pairs * plan.parts * partial_size<A>(p) * static_cast<int64_t>(sizeof(A)), 64);
  }
  return plan;
}

// Task t of a group (all tasks of a group follow each other: its K and V stay in L2). First the further parts of the
// keys of a sequence with few rows, then the chunks of rows, the last first: it has the most keys under a causal mask.
// A merge task is a batch element and group.
template <class A>
inline void run_task_as(const Problem& p, const Plan& plan, int64_t task, void* memory, void* partials, int worker,
                        bool merge) {
  Scratch<A> scratch;
  Scratch<A>::carve(p, plan, static_cast<A*>(memory), &scratch);
  const int64_t turns = merge || p.stats.received ? 1 : plan.chunks + plan.parts - 1;
  const int64_t pair = task / turns, turn = task % turns;
  const int64_t batch = pair / plan.groups, group = pair % plan.groups;
  const bool extra = turn < plan.parts - 1 && !merge;
  const Sequence seq = sequence(p, batch);
  const int64_t rows = own_rows(p, seq) * plan.group_size;
  Part<A> part{plan.parts > 1 ? parts(p, plan, batch) : 1, extra ? turn + 1 : 0, {0, seq.Sk}, nullptr, merge};
  if (merge ? part.count == 1 : part.index >= part.count) return;
  if (part.count > 1) {
    part.partials = static_cast<A*>(partials) + pair * plan.parts * partial_size<A>(p);
    part.keys.first = part.index * kPartKeys;
    if (part.index + 1 < part.count) part.keys.end = part.keys.first + kPartKeys;
  }
  const auto chunk = [&](int64_t index) {
    // A single vector of lanes wastes less when it holds every row; the choice depends on this sequence alone.
    if (rows <= kLanes<A>) run_chunk<A, 1>(p, plan, batch, group, index, scratch, worker, part);
    else run_chunk<A, 2>(p, plan, batch, group, index, scratch, worker, part);
  };
  if (p.stats.received) {
    for (int64_t i = 0; i < plan.chunks && !stopped(p); ++i) chunk(i);
  } else {
    chunk(extra || merge ? 0 : turns - 1 - turn);
  }
}

inline Plan plan(const Problem& p, int threads) {
  return p.dtype == DType::f64 ? plan_as<double>(p, threads) : plan_as<float>(p, threads);
}
inline void run_task(const Problem& p, const Plan& plan, int64_t task, void* scratch, void* partials, int worker) {
  if (p.dtype == DType::f64) run_task_as<double>(p, plan, task, scratch, partials, worker, false);
  else run_task_as<float>(p, plan, task, scratch, partials, worker, false);
}
inline void run_merge(const Problem& p, const Plan& plan, int64_t task, void* scratch, void* partials, int worker) {
  if (p.dtype == DType::f64) run_task_as<double>(p, plan, task, scratch, partials, worker, true);
  else run_task_as<float>(p, plan, task, scratch, partials, worker, true);
}

inline constexpr KernelTable make_table(const char* level) {
  return {level, kVectorBytes, kKeys, plan, run_task, run_merge, fma_loop, read_loop};
}

}  // namespace qkv::inline QKV_LEVEL
