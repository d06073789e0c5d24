// SPDX-License-Identifier: Apache-2.0
// From a problem to the compiled kernels of this level: A by dtype, NV by how many lanes there are to fill.
#pragma once

#include "cpu/alignment-inl.h"
#include "cpu/kernel_table.h"
#include "cpu/parts-inl.h"
#include "cpu/peak-inl.h"
#include "cpu/rope-inl.h"

namespace qkv::inline QKV_LEVEL {

inline int64_t chunk_count(const Plan& plan, int64_t rows) {
  return (rows * plan.group_size + plan.task_rows - 1) / plan.task_rows;
}

// Of the results of one head of a sequence.
inline int64_t most_rows(const Problem& p) {
  if (!p.cu_q) return result_rows(p);
  int64_t most = 0;
  for (int64_t b = 0; b < p.B; ++b) most = p.cu_q[b + 1] - p.cu_q[b] > most ? p.cu_q[b + 1] - p.cu_q[b] : most;
  return most;
}

// What all tasks of a plan have in common.
inline Plan begin_plan(const Problem& p, bool dots) {
  Plan plan{};
  plan.pairs = dots && p.dtype == DType::bf16;
  plan.group_size = p.heads ? 1 : p.Hq / (p.Hkv ? p.Hkv : 1);
  plan.groups = p.heads ? p.n_heads : (plan.group_size ? p.Hkv : 0);
  plan.keys_seen = keys_seen(p.program);
  plan_scale(p, plan);
  return plan;
}

inline Sequence longest_sequence(const Problem& p) {
  Sequence longest{};
  longest.Sq = most_rows(p);
  longest.Sk = longest_keys(p);
  return longest;
}

// As with_vectors and place_tile choose.
template <class A>
inline Choice choose_as(const Problem& p, bool dots) {
  const Plan plan = begin_plan(p, dots);
  const int64_t rows = most_rows(p) * plan.group_size;
  const int vectors = tile_vectors<A>(p, rows), lanes = vectors * kLanes<A>;
  const bool one = vectors == 1;
  if (p.score == Score::additive) return {"additive scores, queries in the lanes", lanes, nullptr};
  if (one && few_rows(p, rows)) return {"few rows, head_dim in the lanes", lanes, nullptr};
  if (!one && reads_split<A, 2>(p, plan, longest_sequence(p)))
    return {"float as three bfloat16 in tile registers, queries in the lanes", lanes, nullptr};
  if (!reads_pairs<A>(p, plan)) return {"queries in the lanes", lanes, nullptr};
  return {kTileUnit ? "bfloat16 in tile registers, queries in the lanes" : "pairs of bfloat16, queries in the lanes",
          lanes, nullptr};
}

// The sequences with few queries, as parts of their keys.
template <class A>
inline void plan_parts(const Problem& p, int threads, Plan& plan) {
  bool whole = true;  // no rows are left for the chunks
  int64_t lanes = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence seq = sequence(p, b);
    const Cut<A> c = cut<A>(p, plan, seq);
    plan.parts = c.parts > plan.parts ? c.parts : plan.parts;
    lanes = c.lanes > lanes ? c.lanes : lanes;
    whole = whole && (p.cu_q ? seq.Sq : result_rows(p)) * plan.group_size <= c.lanes;
  }
  if (plan.parts == 0) return;
  if (whole) plan.chunks = 0;
  const bool heads_inside = (p.k.h < 0 ? -p.k.h : p.k.h) < (p.k.s < 0 ? -p.k.s : p.k.s);
  const int64_t most = kTaskRows / round_up(lanes, kLanes<A>);
  plan.part_heads = !heads_inside ? 1 : (plan.groups < most ? plan.groups : most);
  const auto tasks = [&] { return p.B * ((plan.groups + plan.part_heads - 1) / plan.part_heads) * plan.parts; };
  while (plan.part_heads > 1 && tasks() < 4 * threads) plan.part_heads /= 2;
  plan.part_run = tasks() / (16 * threads);  // long runs: what follows is known and fetched ahead
  if (plan.part_run < 1) plan.part_run = 1;
  if (plan.part_run > plan.parts) plan.part_run = plan.parts;
  plan.part_sets = (plan.groups + plan.part_heads - 1) / plan.part_heads;
  plan.part_runs = (plan.parts + plan.part_run - 1) / plan.part_run;
  plan.part_tasks = p.B * plan.part_sets * plan.part_runs;
  plan.worker_rows = plan.part_heads * lanes;
  if (plan.parts == 1) return;
  plan.merges = p.B * plan.groups;
  plan.partial_size = partial_size<A>(p, lanes);
  plan.partials_bytes = round_up(plan.merges * plan.parts * plan.partial_size * static_cast<int64_t>(sizeof(A)), 64);
}

template <class A>
inline Plan plan_as(const Problem& p, int threads, bool dots) {
  Plan plan = begin_plan(p, dots);
  plan.threads = threads;
  const int64_t pairs = p.B * plan.groups;
  const int64_t rows = most_rows(p);
  plan.task_rows = kTaskRows;  // four tasks a thread even out
  const int64_t least = reads_split<A, 2>(p, plan, longest_sequence(p)) ? kLeastSplitRows : kLeastTaskRows;
  while (plan.task_rows > least && (threads > 1 || rows * plan.group_size <= plan.task_rows / 2) &&
         chunk_count(plan, rows) * pairs < 4 * threads) {
    plan.task_rows /= 2;
  }
  plan.chunks = chunk_count(plan, rows);
  if (plan.chunks > 0 && pairs > 0) plan_parts<A>(p, threads, plan);
  if (plan.chunks > 0 && plan.task_rows > plan.worker_rows) plan.worker_rows = plan.task_rows;
  // The mass a key receives is a sum over all rows: one task adds it up in order.
  plan.tasks = plan.part_tasks + (p.stats.received && plan.chunks > 0 ? pairs : pairs * plan.chunks);
  plan_scratch<A>(p, plan);
  return plan;
}

// The choice depends on this sequence alone.
template <class A, class Run>
inline void with_vectors(const Problem& p, int64_t rows, const Run& run) {
  const int vectors = tile_vectors<A>(p, rows);
  if (vectors == 1) return run(Constant<1>{});
  if constexpr (kTileVectors<A> > 2) {
    if (vectors > 2) return run(Constant<kTileVectors<A>>{});
  }
  run(Constant<2>{});
}

// First the parts, all heads of a run of them before the next, then the chunks: all of a group follow each other (its K
// and V stay in L2), the last first: it has the most keys under a causal mask.
template <class A>
inline void run_task_as(const Problem& p, const Plan& plan, int64_t task, void* memory, void* partials, int worker) {
  const Scratch<A> scratch(plan, memory);
  if (task < plan.part_tasks) {
    const int64_t of_runs = task / plan.part_sets, set = task % plan.part_sets;
    PartRun run{of_runs / plan.part_runs, set * plan.part_heads, plan.part_heads, 0, 0};
    run.first = of_runs % plan.part_runs * plan.part_run;
    if (run.groups > plan.groups - run.group) run.groups = plan.groups - run.group;
    const Sequence seq = sequence(p, run.batch);
    const int64_t parts = cut<A>(p, plan, seq).parts;
    run.end = run.first + plan.part_run < parts ? run.first + plan.part_run : parts;
    if (run.first >= run.end) return;
    A* const own = static_cast<A*>(partials) + (run.batch * plan.groups + run.group) * plan.parts * plan.partial_size;
    with_vectors<A>(p, own_rows(p, seq) * plan.group_size,
                    [&](auto NV) { run_parts<A, NV.value>(p, plan, run, own, scratch, worker); });
    return;
  }
  const int64_t turns = p.stats.received ? 1 : plan.chunks;
  const int64_t pair = (task - plan.part_tasks) / turns, turn = (task - plan.part_tasks) % turns;
  const int64_t batch = pair / plan.groups, group = pair % plan.groups;
  const Sequence seq = sequence(p, batch);
  const int64_t done = plan.parts > 0 ? cut<A>(p, plan, seq).lanes : 0;  // by parts
  with_vectors<A>(p, own_rows(p, seq) * plan.group_size, [&](auto NV) {
    const auto chunk = [&](int64_t i) { run_chunk<A, NV.value>(p, plan, batch, group, i, done, scratch, worker); };
    if (p.stats.received) {
      for (int64_t i = 0; i < plan.chunks && !stopped(p); ++i) chunk(i);
    } else {
      chunk(turns - 1 - turn);
    }
  });
}

// A task of the second round is a batch element and group.
template <class A>
inline void run_merge_as(const Problem& p, const Plan& plan, int64_t task, void* memory, const void* partials) {
  const Scratch<A> scratch(plan, memory);
  const int64_t batch = task / plan.groups, group = task % plan.groups;
  const Sequence seq = sequence(p, batch);
  if (cut<A>(p, plan, seq).parts < 2) return;
  const A* const own = static_cast<const A*>(partials) + task * plan.parts * plan.partial_size;
  with_vectors<A>(p, own_rows(p, seq) * plan.group_size,
                  [&](auto NV) { merge_parts<A, NV.value>(p, plan, batch, group, own, scratch); });
}

// Tile registers serve float alone: their level leaves what is float64, and what has no products, to v4 instead of
// compiling it again.
inline Plan plan(const Problem& p, int threads, bool dots) {
  if (p.dtype != DType::f64) return plan_as<float>(p, threads, dots);
  if constexpr (kTileUnit) return v4_table.plan(p, threads, dots);
  else return plan_as<double>(p, threads, dots);
}
inline Choice choose(const Problem& p, bool dots) {
  if (p.dtype != DType::f64) return choose_as<float>(p, dots);
  if constexpr (kTileUnit) {
    Choice choice = v4_table.choose(p, dots);
    choice.level = v4_table.level;
    return choice;
  } else {
    return choose_as<double>(p, dots);
  }
}
inline void run_task(const Problem& p, const Plan& plan, int64_t task, void* scratch, void* partials, int worker) {
  if (p.dtype != DType::f64) run_task_as<float>(p, plan, task, scratch, partials, worker);
  else if constexpr (kTileUnit) v4_table.run_task(p, plan, task, scratch, partials, worker);
  else run_task_as<double>(p, plan, task, scratch, partials, worker);
}
inline void run_merge(const Problem& p, const Plan& plan, int64_t task, void* scratch, const void* partials) {
  if (p.dtype != DType::f64) run_merge_as<float>(p, plan, task, scratch, partials);
  else if constexpr (kTileUnit) v4_table.run_merge(p, plan, task, scratch, partials);
  else run_merge_as<double>(p, plan, task, scratch, partials);
}

inline int64_t align_bytes(const Alignment& x) {
  if constexpr (kTileUnit) return v4_table.align_bytes(x);
  AlignmentScratch<float> single;
  AlignmentScratch<double> wide;
  return x.dtype == DType::f64 ? AlignmentScratch<double>::carve(x, nullptr, &wide)
                               : AlignmentScratch<float>::carve(x, nullptr, &single);
}
inline void align(const Alignment& x, int64_t head, void* scratch) {
  if constexpr (kTileUnit) v4_table.align(x, head, scratch);
  else if (x.dtype == DType::f64) align_as<double>(x, head, scratch);
  else align_as<float>(x, head, scratch);
}
inline void rotate(const Rotation& r, int64_t first, int64_t end, void* scratch) {
  if constexpr (kTileUnit) v4_table.rotate(r, first, end, scratch);
  else if (r.dtype == DType::f64) rotate_as<double>(r, first, end, static_cast<double*>(scratch));
  else rotate_as<float>(r, first, end, static_cast<float*>(scratch));
}

// `dots`: the processor has a dot of bfloat16.
inline constexpr KernelTable make_table(const char* level, bool dots) {
  return {level,     dots,        kVectorBytes, kKeys,  plan,     choose,   run_task,
          run_merge, align_bytes, align,        rotate, fma_loop, read_loop};
}

}  // namespace qkv::inline QKV_LEVEL
