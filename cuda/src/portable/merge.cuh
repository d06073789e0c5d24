// SPDX-License-Identifier: Apache-2.0
// Parts of the keys put together: m = max m_i, l = sum l_i 2^(c (m_i - m)), o likewise, in the order of the parts.
// One warp per row (query, head of the group); 4 (parts + 2) Dv bytes read, little beside the keys themselves.
#pragma once

#include "portable/scores.cuh"

namespace qkv::inline QKV_LEVEL {

template <class A, bool General>
struct Merge {
  using Args = KernelArgs;
  static constexpr int kThreads = 128, kBlocks = 4, kRows = kThreads / 32;  // rows of a block
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const Problem& p = args.problem;
    const Plan& plan = args.plan;
    const int lane = thread_index() % 32;
    const int64_t id = block * kRows + thread_index() / 32;  // of the row
    if (id >= p.B * plan.groups * plan.rows) return;
    const int64_t pair = id / plan.rows, at = id % plan.rows, batch = pair / plan.groups, group = pair % plan.groups;
    const Sequence seq = sequence(p, batch);
    if (at >= (p.cu_q ? p.cu_q[batch + 1] - p.cu_q[batch] : result_rows(p)) * plan.group_size) return;
    RowId row;
    row.batch = batch;
    row.row = at / plan.group_size;
    row.query = p.rows ? p.rows[row.row] : row.row;
    row.result_head = static_cast<int32_t>(group * plan.group_size + at % plan.group_size);
    row.head = p.heads ? static_cast<int32_t>(p.heads[group]) : row.result_head;
    row.alive = row.query < seq.Sq;
    const ScoreRule<A> rule = score_rule<A>(p, General);
    const int64_t parts = seq.Sk > 0 ? (seq.Sk + plan.part_keys - 1) / plan.part_keys : 1, size = p.Dv + 2;
    const A* from = static_cast<const A*>(plan.partial) + id * plan.parts * size;
    A m = -kInf<A>, l = 0;
    for (int64_t i = 0; i < parts; ++i) m = larger(m, from[i * size]);
    // A part that saw nothing has l = 0; one that only saw NaN has m = -inf and l = NaN, which must stay.
    const auto factor = [&](int64_t i) {
      const A own = from[i * size];
      return own == -kInf<A> ? static_cast<A>(1) : power_of_two((own - m) * rule.c);
    };
    for (int64_t i = 0; i < parts; ++i) l = multiply_add(from[i * size + 1], factor(i), l);
    const RowOut<A> end = finish_row(args, rule, seq, row, m, l, lane == 0);
    if (!p.out.data) return;
    for (int64_t d = lane; d < p.Dv; d += 32) {
      A o = 0;
      for (int64_t i = 0; i < parts; ++i) o = multiply_add(from[i * size + 2 + d], factor(i), o);
      store_element(p, end.at + d * p.out.d, end.empty ? static_cast<A>(0) : o * end.factor);
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
