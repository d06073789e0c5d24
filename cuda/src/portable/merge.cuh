// SPDX-License-Identifier: Apache-2.0
// Parts of the keys put together: m = max m_i, l = sum l_i 2^(c (m_i - m)), o likewise, always in the same order.
// One warp per row (query, head of the group) and 32 columns; 4 (parts + 2) Dv bytes read, little beside the keys
// themselves. But few rows are few warps, and each read waits for the L2 cache: so lanes know of a part each, and a
// lane has the reads of its column under way together.
#pragma once

#include "portable/scores.cuh"

namespace qkv::inline QKV_LEVEL {

template <class A, bool General>
struct Merge {
  using Args = KernelArgs;
  static constexpr int kThreads = 128, kBlocks = 4, kColumns = 32;
  static constexpr int kTogether = 8;  // a divisor of 32: reads of a lane
  static constexpr int64_t kShared = 0;

  QKV_HD static int64_t warps_per_row(const Problem& p) {
    return p.out.data && p.Dv > 0 ? (p.Dv + kColumns - 1) / kColumns : 1;
  }
  QKV_HD static int64_t blocks(const Args& args) {
    const int64_t rows = args.problem.B * args.plan.groups * args.plan.rows, each = kThreads / 32;
    return (rows * warps_per_row(args.problem) + each - 1) / each;
  }

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const Problem& p = args.problem;
    const Plan& plan = args.plan;
    const int lane = thread_index() % 32;
    const int64_t warp = block * (kThreads / 32) + thread_index() / 32, each = warps_per_row(p);
    const int64_t id = divided(warp, each);  // of the row
    const int64_t column = (warp - id * each) * kColumns + lane;
    if (id >= p.B * plan.groups * plan.rows) return;
    const int64_t pair = divided(id, plan.rows), at = id - pair * plan.rows;
    const int64_t batch = divided(pair, plan.groups), group = pair - batch * plan.groups;
    const Sequence seq = sequence(p, batch);
    if (at >= (p.cu_q ? p.cu_q[batch + 1] - p.cu_q[batch] : result_rows(p)) * plan.group_size) return;
    RowId row;
    row.batch = batch;
    row.row = divided(at, plan.group_size);
    row.query = p.rows ? p.rows[row.row] : row.row;
    row.result_head = static_cast<int32_t>(group * plan.group_size + (at - row.row * plan.group_size));
    row.head = p.heads ? static_cast<int32_t>(p.heads[group]) : row.result_head;
    row.alive = row.query < seq.Sq;
    const ScoreRule<A> rule = score_rule<A>(p, General);
    const int64_t parts = seq.Sk > 0 ? divided(seq.Sk + plan.part_keys - 1, plan.part_keys) : 1, size = p.Dv + 2;
    const A* const from = static_cast<const A*>(plan.partial) + id * plan.parts * size;
    A m = -kInf<A>, l = 0;
    for (int64_t i = lane; i < parts; i += 32) m = larger(m, from[i * size]);
    for (int lanes = 1; lanes < 32; lanes *= 2) m = larger(m, shuffle_xor(m, lanes));
    // A part that saw nothing has l = 0; one that only saw NaN has m = -inf and l = NaN, which must stay.
    const auto factor = [&](A own) { return own == -kInf<A> ? static_cast<A>(1) : power_of_two((own - m) * rule.c); };
    A o = 0;
    const A* const mine = from + 2 + (column < p.Dv ? column : 0);
    for (int64_t first = 0; first < parts; first += 32) {
      const int64_t i = first + lane;
      const A own = i < parts ? factor(from[i * size]) : static_cast<A>(0);
      if (i < parts) l = multiply_add(from[i * size + 1], own, l);
      if (!p.out.data || p.Dv == 0) continue;
      const int n = parts - first < 32 ? static_cast<int>(parts - first) : 32;
      for (int e = 0; e < n; e += kTogether) {
        A x[kTogether];
        QKV_UNROLL
        for (int u = 0; u < kTogether; ++u) x[u] = e + u < n ? mine[(first + e + u) * size] : static_cast<A>(0);
        QKV_UNROLL
        for (int u = 0; u < kTogether; ++u) o = multiply_add(x[u], shuffle_from(own, e + u), o);
      }
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) l += shuffle_xor(l, lanes);
    const RowOut<A> end = finish_row(args, rule, seq, row, m, l, warp == id * each && lane == 0);
    if (!p.out.data || column >= p.Dv) return;
    store_element(p, end.at + column * p.out.d, end.empty ? static_cast<A>(0) : o * end.factor);
  }
};

}  // namespace qkv::inline QKV_LEVEL
