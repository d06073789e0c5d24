// SPDX-License-Identifier: Apache-2.0
// Which rows a block holds: a task is a tile of rows (query, head of the group), query-major, of a batch element and
// group, and a range of keys. The heads of a group lie side by side and read K and V together, as on the CPU.
#pragma once

#include "device/intrinsics.cuh"
#include "plan.h"

namespace qkv::inline QKV_LEVEL {

enum class Height { Many, Few };  // of a tile: Few for a decoding step, whose rows fit one low tile

struct Task {
  int64_t batch, group, first_row, part;
  int64_t rows;  // of this sequence and group
  int64_t key_first, key_end;
  int64_t parts;  // of this sequence
  int64_t kv_head;
  Sequence seq;
};

// Of numbers that are not negative; in 64 bits a division is a hundred instructions.
QKV_DEVICE int64_t divided(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Blocks take the pairs (batch element, group) in sections whose K and V fit the L2 cache; within a section the last
// chunks come first, which have the most keys under a causal mask; parts of the same rows follow each other.
QKV_DEVICE Task task_of(const KernelArgs& args, int64_t block, int tile_rows) {
  const Problem& p = args.problem;
  const Plan& plan = args.plan;
  Task t;
  const auto over = [](int64_t a, int64_t b) {  // there are less than 2^31 blocks
    return static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
  };
  const int64_t tile = plan.parts == 1 ? block : over(block, plan.parts), pairs = p.B * plan.groups;
  t.part = block - tile * plan.parts;
  const int64_t first_pair = over(tile, plan.section * plan.chunks) * plan.section;
  const int64_t in_section = pairs - first_pair < plan.section ? pairs - first_pair : plan.section;
  const int64_t rest = tile - first_pair * plan.chunks, chunk = over(rest, in_section);
  const int64_t pair = first_pair + rest - chunk * in_section;
  t.batch = over(pair, plan.groups);
  t.group = pair - t.batch * plan.groups;
  t.first_row = (plan.chunks - 1 - chunk) * tile_rows;
  t.seq = sequence(p, t.batch);
  t.rows = (p.cu_q ? p.cu_q[t.batch + 1] - p.cu_q[t.batch] : result_rows(p)) * plan.group_size;
  t.parts = plan.parts > 1 && t.seq.Sk > 0 ? divided(t.seq.Sk + plan.part_keys - 1, plan.part_keys) : 1;
  t.key_first = t.part * plan.part_keys;
  t.key_end = t.part + 1 < t.parts ? t.key_first + plan.part_keys : t.seq.Sk;
  t.kv_head = p.heads ? p.heads[t.group] / (p.Hq / p.Hkv) : t.group;
  return t;
}

// Of the rows (query, head of the group) of a tile, query-major, counted from the first query's first head.
struct RowHead {
  uint32_t row, head;
};
QKV_DEVICE RowHead row_head(uint32_t at, uint32_t heads) {
  const uint32_t row = heads == 1 ? at : at / heads;
  return {row, at - row * heads};
}

template <int R>
struct Lanes {               // of a tile of R rows, in shared memory
  int64_t row[R];            // result row
  int64_t query[R];          // index in q, mask, bias
  int64_t position[R];       // absolute position p
  int64_t mask[R], bias[R];  // element offsets of its rows, where they are given
  int64_t first, last;       // range of positions of the living
  int32_t head[R];           // query head
  int32_t result_head[R];
  int32_t live;   // rows 0 ... live - 1 are results; the others are padding of the tile
  bool alive[R];  // false for a padding query
};

// All but `mask` and `bias`, by whole warps, of which this is thread `thread` and there are `threads`.
template <int R, class Sync>
QKV_DEVICE void fill_rows(const KernelArgs& args, const Task& task, Lanes<R>& lanes, int thread, int threads,
                          const Sync& sync) {
  const Problem& p = args.problem;
  const int64_t left = task.rows - task.first_row;
  if (thread == 0) {
    lanes.first = INT64_MAX;
    lanes.last = INT64_MIN;
    lanes.live = static_cast<int32_t>(left < R ? (left < 0 ? 0 : left) : R);
  }
  sync();
  const auto size = static_cast<uint32_t>(args.plan.group_size);
  const int64_t top = size == 1 ? task.first_row : divided(task.first_row, size);
  const auto skipped = static_cast<uint32_t>(task.first_row - top * size);  // heads of the first row
  int64_t first = INT64_MAX, last = INT64_MIN;  // of a warp: one atomic operation each, which take turns
  QKV_ROLLED
  for (int i = thread; i < R; i += threads) {
    const RowHead at = row_head(skipped + static_cast<uint32_t>(i), size);
    const int64_t row = top + at.row;
    bool alive = false;
    if (i < left) {
      const int64_t query = p.rows ? p.rows[row] : row, position = task.seq.offset + query;
      const auto head = static_cast<int32_t>(task.group * size + at.head);
      lanes.row[i] = row;
      lanes.query[i] = query;
      lanes.result_head[i] = head;
      lanes.head[i] = p.heads ? static_cast<int32_t>(p.heads[task.group]) : head;
      lanes.position[i] = position;
      alive = query < task.seq.Sq;
      if (alive) {
        first = position < first ? position : first;
        last = position > last ? position : last;
      }
    }
    lanes.alive[i] = alive;
  }
  for (int with = 1; with < 32; with *= 2) {
    const int64_t lower = shuffle_xor(first, with), upper = shuffle_xor(last, with);
    first = lower < first ? lower : first;
    last = upper > last ? upper : last;
  }
  if (thread % 32 == 0 && first <= last) {
    if (threads == 32) {
      lanes.first = first;
      lanes.last = last;
    } else {
      atomic_min(&lanes.first, first);
      atomic_max(&lanes.last, last);
    }
  }
  sync();
}

// All of them.
template <int R, class Sync>
QKV_DEVICE void fill_lanes(const KernelArgs& args, const Task& task, Lanes<R>& lanes, int thread, int threads,
                           const Sync& sync) {
  const Problem& p = args.problem;
  fill_rows(args, task, lanes, thread, threads, sync);
  if (!p.mask.data && !p.bias.data) return;
  QKV_ROLLED
  for (int i = thread; i < R; i += threads) {
    if (!lanes.alive[i]) continue;
    const auto row_of = [&](const View& view) {
      return lead_offset(p, view, task.batch) + lanes.head[i] * view.h + lanes.query[i] * view.s;
    };
    if (p.mask.data) lanes.mask[i] = row_of(p.mask);
    if (p.bias.data) lanes.bias[i] = row_of(p.bias);
  }
  sync();
}
template <int R>
QKV_DEVICE void fill_lanes(const KernelArgs& args, const Task& task, Lanes<R>& lanes) {  // by the block
  fill_lanes(args, task, lanes, thread_index(), R, sync_block);
}

}  // namespace qkv::inline QKV_LEVEL
