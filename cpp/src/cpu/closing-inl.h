// SPDX-License-Identifier: Apache-2.0
// What a task will write and the worker's next task will read, asked for while the task's last products run.
//
// Rows of Q and of the output are touched once per task: with few keys for each (a mask, short sequences), waiting for
// them takes longer than the products. Asked for in the last kClosingBlocks blocks of keys; sooner, K and V would push
// them out of L2 again.
#pragma once

#include "cpu/small-sums-inl.h"
#include "cpu/walk-inl.h"

namespace qkv::inline QKV_LEVEL {

// Without the blocks at either end that no row sees.
template <class A, int NV>
inline Keys trim(const Problem& p, int64_t batch, Keys keys, int tiles, const Tile<A, NV>* tile) {
  if (p.program.n == 0) return keys;
  const auto unseen = [&](int64_t j0) {
    const int64_t end = j0 + kKeys < keys.end ? j0 + kKeys : keys.end;
    return if_seen(p, batch, {j0, end, keys.head}, tiles, tile).end == 0;
  };
  while (keys.first < keys.end && unseen((keys.end - 1) / kKeys * kKeys)) keys.end = (keys.end - 1) / kKeys * kKeys;
  while (keys.first < keys.end && unseen(keys.first)) keys.first += kKeys;
  return keys;
}

constexpr int kLeastClosingTiles = 4;  // a chunk of fewer is over sooner

struct Closing {
  static constexpr int kMost = 12;
  Ahead stream[kMost];
  int count = 0;

  void add(const View& view, int64_t at, int64_t rows, int64_t columns, int64_t turns) {
    if (!view.data || count == kMost) return;
    const Ahead a = ahead(view, {view.data + at * itemsize(view.dtype), rows}, {}, columns, turns);
    if (a.left == 0) return;
    stream[count] = a;
    if (count > 0) stream[count - 1].beside = &stream[count];
    ++count;
  }
  Ahead* first() { return count > 0 ? stream : nullptr; }
};

// For chunk `chunk` of a group, which walks `keys`. Tasks run in order, so a worker's next is likely `threads` further.
template <class A, int NV>
inline void find_closing(const Problem& p, const Plan& plan, int64_t pair, int64_t chunk, const Keys& keys, int tiles,
                         const Tile<A, NV>* tile, Closing& closing) {
  if (p.cu_q || p.rows || p.heads || plan.chunks == 0) return;
  const int64_t blocks = (keys.end - keys.first + kKeys - 1) / kKeys;
  const int64_t walk = blocks < kClosingBlocks ? blocks : kClosingBlocks;
  const int64_t often = turns(p, tile[0], tiles, false) * walk / 2 + 1;  // a mask ends some tiles early
  const int64_t queries = plan.task_rows / plan.group_size;
  const auto rows_at = [&](const View& view, int64_t of_pair, int64_t member, int64_t row) {
    return lead_offset(p, view, of_pair / plan.groups) + (of_pair % plan.groups * plan.group_size + member) * view.h +
           row * view.s;
  };
  const auto add_rows = [&](const View& view, int64_t of_pair, int64_t of_chunk, int64_t columns) {
    const int64_t row = of_chunk * queries, left = p.Sq - row;
    for (int64_t member = 0; member < plan.group_size; ++member) {
      closing.add(view, rows_at(view, of_pair, member, row), left < queries ? left : queries, columns, often);
    }
  };
  add_rows(p.out, pair, chunk, p.Dv);
  const int64_t next = pair * plan.chunks + (plan.chunks - 1 - chunk) + plan.threads;
  const int64_t next_pair = next / plan.chunks;
  if (next_pair >= p.B * plan.groups) return;
  add_rows(p.q, next_pair, plan.chunks - 1 - next % plan.chunks, p.D);
  if (next_pair == pair) return;  // else K and V are others, too
  const int64_t batch = next_pair / plan.groups, group = next_pair % plan.groups;
  const int64_t most = int64_t{2} * kKeys, n = p.Sk < most ? p.Sk : most;
  closing.add(p.k, lead_offset(p, p.k, batch) + group * p.k.h, n, p.D, often);
  closing.add(p.v, lead_offset(p, p.v, batch) + group * p.v.h, n, p.Dv, often);
}

}  // namespace qkv::inline QKV_LEVEL
