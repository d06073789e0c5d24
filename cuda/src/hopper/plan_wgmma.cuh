// SPDX-License-Identifier: Apache-2.0
// The warp that plans: which rows has the next task, and which tiles of keys do they see? It copies their Q, too.
#pragma once

#include "hopper/copy_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// Where the rows of a warpgroup go. Those beyond the living are beyond the array, too, but where another sequence
// follows.
template <class M>
QKV_DEVICE void place_results(const HopperArgs& args, int group, TaskPlace<M>& place) {
  const int first = group * 64, needed = args.problem.cu_q ? first + 64 : first + 1;
  const bool boxed = args.out.there && args.plan.parts == 1 && place.lanes.live >= needed;
  place.boxed[group] = boxed;
  if (!boxed) return;
  const RowId id = row_id(place, first);
  place.out[group] = box_place(args.out, id.batch, id.result_head, place.task.seq.q_row + id.row);
}

QKV_DEVICE Run run_of(const KernelArgs& args, const Task& task, int most) {
  const Problem& p = args.problem;
  const int64_t heads = args.plan.group_size, left = task.rows - task.first_row;
  Run run;
  run.heads = static_cast<int32_t>(heads);
  run.live = within(left, most);
  run.row = heads == 1 ? task.first_row : divided(task.first_row, heads);
  run.skipped = static_cast<int32_t>(task.first_row - run.row * heads);
  run.result_head = static_cast<int32_t>(task.group * heads);
  run.head = p.heads ? static_cast<int32_t>(p.heads[task.group]) : run.result_head;
  const int64_t end = run.row + static_cast<uint32_t>(run.skipped + run.live + run.heads - 1) / run.heads;
  run.first = task.seq.offset + run.row;
  run.last = task.seq.offset + (end < task.seq.Sq ? end : task.seq.Sq) - 1;
  return run;
}

// False: there is nothing to do.
template <class M>
QKV_DEVICE bool plan_task(const HopperArgs& args, int64_t id, int thread, TaskPlace<M>& place) {
  if (thread == 0) place.task = task_of(args, id, M::kRows);
  sync_warp();
  const Task& task = place.task;
  const bool some = task.first_row < task.rows && task.part < task.parts;
  if (some) {
    if constexpr (M::kGeneral) {
      fill_lanes(args, task, place.lanes, thread, 32, sync_warp);
    } else {
      if (thread == 0) static_cast<Run&>(place.lanes) = run_of(args, task, M::kRows);
      sync_warp();
    }
    if (thread < M::kGroups) place_results(args, thread, place);
  }
  sync_warp();  // all have looked
  return some;
}

struct TileRange {
  int64_t first, end;
};

// The tiles that some row may see.
template <class M>
QKV_DEVICE TileRange tiles_in_reach(const KernelArgs& args, const TaskPlace<M>& place) {
  const Task& task = place.task;
  const Plan& plan = args.plan;
  int64_t low = task.key_first, high = task.key_end - 1;
  if (place.lanes.first > place.lanes.last) high = low - 1;  // nobody lives
  else if (plan.band) {
    const int64_t lowest = saturating_add(place.lanes.first, -plan.before);
    const int64_t highest = saturating_add(place.lanes.last, plan.after);
    low = lowest > low ? lowest : low;
    high = highest < high ? highest : high;
  }
  const int64_t first = task.key_first / M::kKeys;
  return high < low ? TileRange{first, first} : TileRange{low / M::kKeys, high / M::kKeys + 1};
}

// The tiles first ... end - 1 where the mask is a band; at most 32.
template <class M>
QKV_DEVICE int list_band(const Plan& plan, const TaskPlace<M>& place, int64_t first, int64_t end, int lane,
                         TileList<32>& list) {
  const int count = static_cast<int>(end - first);
  const int64_t all_low = saturating_add(place.lanes.last, -plan.before);
  int64_t all_high = saturating_add(place.lanes.first, plan.after);  // keys that all rows see
  if (all_high > place.task.key_end - 1) all_high = place.task.key_end - 1;
  if (lane < count) {
    const int64_t tile = first + lane, j0 = tile * M::kKeys;
    const bool partial = j0 < all_low || j0 + M::kKeys - 1 > all_high;
    list.tile[lane] = static_cast<uint32_t>(tile) | (partial ? kPartial : 0);
  }
  return count;
}

// All rows of Q by the planner: as boxes of 64 rows, as those of K where they follow each other, or one by one.
template <class M>
QKV_DEVICE void copy_queries(const HopperArgs& args, const TaskPlace<M>& place, int lane, char* q, Barrier* full) {
  constexpr int kAtOnce = M::kKeys / 2, kChunks = M::kD / 8;
  const Problem& p = args.problem;
  const RowId top = row_id(place, 0);
  if (args.q.there) {
    if (lane > 0) return;
    arrive_expecting(full, M::kQPart);
    BoxPlace at = box_place(args.q, top.batch, top.head, place.task.seq.q_row + top.query);
    QKV_ROLLED
    for (int first = 0; first < M::kRows; first += 64, at.row += 64 / static_cast<int>(args.plan.group_size)) {
      load_boxes<M, M::kRows>(args.q, at, q + first * 128, full);
    }
    return;
  }
  const bool async = args.plan.async_q;
  const char* const data = p.q.data + (lead_offset(p, p.q, place.task.batch) + place.task.seq.q_row * p.q.s) * 2;
  if (args.plan.group_size == 1 && !p.rows) {
    const char* const from = data + (top.head * p.q.h + top.query * p.q.s) * 2;
    const int64_t rows = place.task.seq.Sq - place.task.first_row;
    QKV_ROLLED
    for (int first = 0; first < M::kRows; first += kAtOnce) {
      copy_rows<M, kAtOnce, M::kRows>(p.q, from + first * p.q.s * 2, p.D, rows - first, async, q, first);
    }
  } else {
    const int chunk = lane % kChunks, n = within(p.D - chunk * 8, 8);
    const int64_t column = chunk * (async ? 8 : 8 * p.q.d);
    QKV_ROLLED
    for (int row = lane / kChunks; row < M::kRows; row += 32 / kChunks) {
      const RowId id = row_id(place, row);
      const int64_t at = id.alive ? id.head * p.q.h + id.query * p.q.s + column : 0;
      load_chunk(q + chunk_offset<M>(row, chunk), p.q, data + at * 2, id.alive ? n : 0, async);
    }
  }
  commit_copies();
  announce<0>(full);
}

// The n-th task of a block, by a warp; beyond the last where there is none. Its first has the block's own number. Then
// the next that nobody has drawn; or, dealt out beforehand, block + grid, block + 2 grid ..., every other time counted
// from the end, as tasks may become smaller from first to last.
QKV_DEVICE int64_t next_task(const HopperArgs& args, int64_t block, int64_t n) {
  const int64_t grid = args.plan.grid;
  if (!args.plan.drawn) return n * grid + (n % 2 ? grid - 1 - block : block);
  uint32_t drawn = 0;
  if (thread_index() % 32 == 0) drawn = atomic_add(args.next, 1);
  return grid + shuffle_from(drawn, 0);
}

template <class M>
QKV_DEVICE void plan_tasks(const HopperArgs& args, int64_t block, WgmmaShared<M>& shared) {
  const int thread = thread_index() % 32;
  uint32_t turn = 0, tasks = 0;  // stretches and tasks so far
  int64_t n = 0;                 // tasks of this block, those with nothing to do included
  for (int64_t id = block; id < args.plan.blocks; id = next_task(args, block, ++n)) {
    wait_free(shared.place_free, tasks);
    TaskPlace<M>& place = shared.place[tasks % M::kPlaces];
    if (!plan_task(args, id, thread, place)) continue;
    const auto [first_tile, end_tile] = tiles_in_reach(args, place);
    bool begins = true;
    for (int64_t end = end_tile;; end -= 32) {
      const bool last = end - first_tile <= 32;
      const int64_t tile = last ? first_tile : end - 32;
      wait_free(shared.stretch_free, turn);
      Stretch<M>& stretch = shared.stretch[turn % M::kStretches];
      int count = 0;
      if constexpr (M::kGeneral) {
        count = list_tiles<M::kKeys>(args, place.task, place.lanes, tile, stretch.tiles, thread, sync_warp, end);
      } else {
        count = list_band(args.plan, place, tile, end, thread, stretch.tiles);
      }
      if (count == 0 && !last) continue;
      if (count == 0 && begins) {  // a tile of which nothing is seen: no task is without one
        count = 1;
        if (thread == 0) stretch.tiles.tile[0] = static_cast<uint32_t>(first_tile) | kPartial;
      }
      if (thread == 0) {
        stretch.count = count;
        stretch.last = last;
        stretch.stop = false;
      }
      arrive(shared.stretch_full, turn++);
      if (begins) {
        wait_free(shared.q_free, tasks);
        sync_warp();  // as where K and V are copied: whoever lags would wait for the wrong phase
        copy_queries(args, place, thread, shared.q[tasks % M::kQueries], &shared.q_full[tasks % M::kQueries]);
        begins = false;
      }
      if (last) break;
    }
    wait_full(shared.ends_soon, tasks);  // what is drawn late is drawn by whoever is first done
    ++tasks;
  }
  wait_free(shared.stretch_free, turn);
  if (thread == 0) shared.stretch[turn % M::kStretches].stop = true;
  arrive(shared.stretch_full, turn);
}

}  // namespace qkv::inline QKV_LEVEL
