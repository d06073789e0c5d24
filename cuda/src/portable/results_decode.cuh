// SPDX-License-Identifier: Apache-2.0
// The walk over the keys of decode_fma.cuh, and what a block leaves behind: out and lse, or its part of them.
#pragma once

#include "portable/decode_fma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- write ---------------------------------------------------------------------------------------------------

// The softmaxes of all groups of lanes put together, in order: shared.m becomes the factor of each.
template <class M>
QKV_DEVICE void merge_streams(typename M::A c, const DecodeRows<M>& rows, DecodeShared<M>& shared,
                              RowEnds<typename M::A>& ends) {
  using A = typename M::A;
  const Lane<M> lane;
  const int stream = thread_index() / M::kLanes, row = thread_index();
  sync_block();  // nobody reads K or V any more
  QKV_UNROLL
  for (int r = 0; r < M::kRows; ++r) {
    QKV_UNROLL
    for (int i = 0; i < M::kPacks; ++i) {
      *reinterpret_cast<Pack<A>*>(&shared.o[stream][r][(lane.t + i * M::kLanes) * M::kPack]) = rows.o[r][i];
    }
  }
  if (lane.t < M::kRows) {
    shared.m[stream][lane.t] = rows.m;
    shared.l[stream][lane.t] = rows.l;
  }
  sync_block();
  if (row < M::kRows) {
    A m = -kInf<A>, l = 0;
    for (int i = 0; i < M::kStreams; ++i) m = larger(m, shared.m[i][row]);
    for (int i = 0; i < M::kStreams; ++i) {
      // What saw nothing has l = 0; what only saw NaN has m = -inf and l = NaN, which must stay.
      A& own = shared.m[i][row];
      own = own == -kInf<A> ? static_cast<A>(1) : power_of_two((own - m) * c);
      l = multiply_add(shared.l[i][row], own, l);
    }
    ends.m[row] = m;
    ends.l[row] = l;
  }
  sync_block();
}

template <class M>
QKV_DEVICE void write_rows(const KernelArgs& args, const ScoreRule<typename M::A>& rule, const DecodeRows<M>& rows,
                           DecodeShared<M>& shared) {
  using A = typename M::A;
  const Problem& p = args.problem;
  const Plan& plan = args.plan;
  const Task& task = shared.task;
  RowEnds<A> ends(shared.ends, M::kRows);
  merge_streams(rule.c, rows, shared, ends);
  A* partial = nullptr;
  const int64_t size = p.Dv + 2, next = plan.parts * size;  // of a row, from one to the next
  if (plan.parts > 1) {
    const int64_t id = (task.batch * plan.groups + task.group) * plan.rows + task.first_row;
    partial = static_cast<A*>(plan.partial) + id * next + task.part * size;
    if (thread_index() < shared.lanes.live) {
      partial[thread_index() * next] = ends.m[thread_index()];
      partial[thread_index() * next + 1] = ends.l[thread_index()];
    }
  } else {
    finish_rows<A, M::kThreads>(args, task, rule, shared.lanes, ends);
    if (!p.out.data) return;
  }
  QKV_ROLLED
  for (int i = thread_index(); i < shared.lanes.live * M::kD; i += M::kThreads) {
    const int row = i / M::kD, column = i % M::kD;
    if (column >= p.Dv) continue;
    A o = 0;
    QKV_UNROLL
    for (int s = 0; s < M::kStreams; ++s) o = multiply_add(shared.o[s][row][column], shared.m[s][row], o);
    if (partial) {
      partial[row * next + 2 + column] = o;
    } else {
      const RowOut<A> end = ends.out[row];
      store_element(p, end.at + column * p.out.d, end.empty ? static_cast<A>(0) : o * end.factor);
    }
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

// Copies run ahead in the order K0 V0 K1 V1 ... by kStages steps; a group that has no step left is empty, so that the
// number of groups to wait for is always the same.
template <class M, bool General>
QKV_DEVICE void walk_steps(const KernelArgs& args, const ScoreRule<typename M::A>& rule, const RowPacks<M>& q,
                           DecodeShared<M>& shared, DecodeRows<M>& rows) {
  using A = typename M::A;
  constexpr int kPending = 2 * M::kStages - 1;
  const Problem& p = args.problem;
  const Task& task = shared.task;
  const Lane<M> lane;
  const bool values = p.Dv > 0, modified = General && shared.lanes.alive[lane.row];
  const Source<M> keys(p, p.k, p.D, task, args.plan.async_k), columns(p, p.v, p.Dv, task, args.plan.async_v);
  const RowTerms<A> terms = modified ? row_terms<A>(p, shared.lanes, lane.row) : RowTerms<A>{};
  for (int64_t first = task.key_first / M::kKeys; first * M::kKeys < task.key_end; first += M::kThreads) {
    const int count = list_tiles<M::kKeys>(args, task, shared.lanes, first, shared.list) * M::kSteps;
    const auto first_key = [&](int i) {
      if (i >= count) return task.key_end;
      const int64_t tile = (shared.list.tile[i / M::kSteps] & ~kPartial) * int64_t{M::kKeys};
      return tile + thread_index() / 32 * 32 + i % M::kSteps * M::kStep;
    };
    const auto load = [&](const Source<M>& source, int64_t j0, Slots<M>& to) {
      if (j0 < task.key_end) source.load(j0, task.key_end, to);
      commit_copies();
    };
    for (int i = 0; i < M::kStages; ++i) {
      const int64_t j0 = first_key(i);
      load(keys, j0, shared.k[i]);
      load(columns, j0, shared.v[i]);
    }
    uint32_t seen = 0;
    for (int i = 0; i < count; ++i) {
      if (i % M::kSteps == 0) {
        const bool partial = (shared.list.tile[i / M::kSteps] & kPartial) != 0;
        seen = partial ? seen_keys(args, task, shared.lanes, lane.row, first_key(i)) : ~uint32_t{0};
      }
      A s[M::kKeysOf];
      wait_copies<kPending>();
      score_step<M>(q, shared.k[i % M::kStages], s);
      const int64_t next = first_key(i + M::kStages);
      load(keys, next, shared.k[i % M::kStages]);
      if (modified) {
        const int64_t j0 = first_key(i) + lane.group;
        modify_row(p, rule, terms, task.key_end, j0, [](int u) { return u * M::kGroups; }, s);
      }
      const bool hidden = mask_step<M>(seen >> (i % M::kSteps * M::kStep), s);
      const A alpha = softmax_step<M>(rule.c, s, rows);
      wait_copies<kPending>();
      if (values) {
        if (hidden) accumulate_step<M, true>(shared.v[i % M::kStages], alpha, s, rows);
        else accumulate_step<M, false>(shared.v[i % M::kStages], alpha, s, rows);
      }
      load(columns, next, shared.v[i % M::kStages]);
    }
  }
}

// --- bodies --------------------------------------------------------------------------------------------------

template <class T, int D, bool General>
struct FmaDecode {
  using M = DecodeTile<T, D>;
  using Args = KernelArgs;
  static constexpr int kThreads = M::kThreads, kBlocks = 2;
  static constexpr int64_t kShared = sizeof(DecodeShared<M>);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<DecodeShared<M>*>(memory);
    if (thread_index() == 0) shared.task = task_of(args, block, M::kRows);
    sync_block();
    if (shared.task.first_row >= shared.task.rows || shared.task.part >= shared.task.parts) return;
    fill_lanes(args, shared.task, shared.lanes);
    clear_slots(shared);
    RowPacks<M> q;
    load_queries<M>(args, shared, q);
    const ScoreRule<T> rule = score_rule<T>(args.problem, General);
    DecodeRows<M> rows;
    rows.m = -kInf<T>;
    rows.l = 0;
    QKV_UNROLL
    for (int i = 0; i < 64 / static_cast<int>(sizeof(T)) * 4; ++i) {
      rows.o[i / M::kPack / M::kPacks][i / M::kPack % M::kPacks].x[i % M::kPack] = 0;
    }
    walk_steps<M, General>(args, rule, q, shared, rows);
    write_rows<M>(args, rule, rows, shared);
  }
};

}  // namespace qkv::inline QKV_LEVEL
