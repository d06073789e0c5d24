// SPDX-License-Identifier: Apache-2.0
// The warps that copy K and V: as boxes for the copy engine, or chunk by chunk where it does not take an array
// (boxes.cc).
#pragma once

#include "hopper/tiles_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- copy ----------------------------------------------------------------------------------------------------

QKV_DEVICE BoxPlace box_place(const Boxes& boxes, int64_t batch, int64_t head, int64_t row) {
  int64_t outer = batch;
  if (boxes.inner > 1) outer = static_cast<uint32_t>(batch) / static_cast<uint32_t>(boxes.inner);
  const int64_t inner = batch - outer * boxes.inner;
  const auto place = [&](int i, int64_t x) { return boxes.moves[i] ? static_cast<int>(x) : 0; };
  return {0, place(0, head), static_cast<int>(row), {place(1, inner), place(2, outer)}};
}

// All columns of some rows of a tile that has TileRows, by one thread.
template <class M, int TileRows>
QKV_DEVICE void load_boxes(const Boxes& boxes, BoxPlace at, char* tile, Barrier* barrier) {
  QKV_UNROLL
  for (int block = 0; block < M::kD / 64; ++block, at.column += 64) {
    load_box(tile + block * (TileRows * 128), boxes.map, at, barrier);
  }
}

// Rows of a view by a warp, N of them, from `data` on, those at and beyond the end as 0: to rows first_row ... of a
// tile that has TileRows.
template <class M, int N, int TileRows>
QKV_DEVICE void copy_rows(const View& view, const char* data, int64_t columns, int64_t rows_left, bool async,
                          char* tile, int first_row) {
  constexpr int kChunks = M::kD / 8, kStep = 32 / kChunks;
  const int lane = thread_index() % 32, chunk = lane % kChunks, first = lane / kChunks;
  const int n = within(columns - chunk * 8, 8), rows = within(rows_left, N);
  const int64_t step = kStep * view.s * 2;
  const char* from = data + (first * view.s + chunk * (async ? 8 : 8 * view.d)) * 2;
  char* const to = tile + chunk / 8 * (TileRows * 128) + first_row * 128;
  const auto place = [&](int row) { return to + row * 128 + (chunk % 8 ^ (row & 7)) * 16; };
  if (async && rows == N && columns >= M::kD) {  // all lanes go the same way
    QKV_UNROLL
    for (int i = 0; i < N; i += kStep, from += step) copy_async(place(first + i), from);
    return;
  }
  QKV_ROLLED
  for (int i = first; i < N; i += kStep, from += step) load_chunk(place(i), view, from, i < rows ? n : 0, async);
}

// --- load ----------------------------------------------------------------------------------------------------

// f(place, stretch, i, tile) for all tiles of all tasks, by a warp: the i-th of a stretch; tile counts them. end(tile,
// stretch) after each stretch.
template <class M, class F, class End>
QKV_DEVICE void for_tiles(WgmmaShared<M>& shared, const F& f, const End& end) {
  uint32_t tile = 0, task = 0;
  for (uint32_t turn = 0;; ++turn) {
    wait_full(shared.stretch_full, turn);
    const Stretch<M>& stretch = shared.stretch[turn % M::kStretches];
    if (stretch.stop) return;
    for (int i = 0; i < stretch.count; ++i, ++tile) f(shared.place[task % M::kPlaces], stretch, i, tile);
    end(tile, stretch);
    task += stretch.last;
    arrive(shared.stretch_free, turn);
  }
}

// Is the i-th the one at which the next task is planned? So many tiles before the end: time enough.
template <class M>
QKV_DEVICE bool plans_next(const Stretch<M>& stretch, int i) {
  constexpr int kBefore = 8;
  return stretch.last && i == (stretch.count > kBefore ? stretch.count - kBefore : 0);
}

enum class Operand { K, V };

// All tiles of K, or of V, as soon as there is place, as boxes. Who copies K tells the planner how far it is. The first
// K comes alone, as all blocks begin at once.
template <class M>
QKV_DEVICE void copy_boxes(const Boxes& boxes, Operand of, char (&tiles)[M::kStages][M::kKeyPart],
                           Barrier (&full)[M::kStages], Barrier (&free)[M::kStages], WgmmaShared<M>& shared) {
  uint32_t tasks = 0;
  const auto copy = [&](const TaskPlace<M>& place, const Stretch<M>& stretch, int i, uint32_t tile) {
    const Task& task = place.task;
    Barrier* const barrier = &full[tile % M::kStages];
    wait_free(free, tile);
    if (of == Operand::K && plans_next(stretch, i)) arrive_as_one(shared.ends_soon, tasks);
    if (tile == 0 && of == Operand::V) wait_full(shared.begun, 0);
    sync_warp();  // whoever lags until this tile has come and gone would wait for the wrong phase
    if (thread_index() % 32 == 0) {
      const int64_t row = task.seq.k_row + first_key<M::kKeys>(stretch.entry(i));
      arrive_expecting(barrier, M::kKeyPart);
      load_boxes<M, M::kKeys>(boxes, box_place(boxes, task.batch, task.kv_head, row), tiles[tile % M::kStages],
                              barrier);
    }
    if (tile == 0 && of == Operand::K) {
      wait_full(full, 0);
      arrive_as_one(shared.begun, 0);
    }
  };
  const auto end = [&](uint32_t, const Stretch<M>& stretch) {
    if (of == Operand::K && plans_next(stretch, stretch.count)) arrive_as_one(shared.ends_soon, tasks);  // it is empty
    tasks += stretch.last;
  };
  for_tiles(shared, copy, end);
}

// The same chunk by chunk: a tile is announced when the next is under way.
template <class M>
QKV_DEVICE void copy_chunks(const KernelArgs& args, const View& view, int64_t columns, bool async, Operand of,
                            char (&tiles)[M::kStages][M::kKeyPart], Barrier (&full)[M::kStages],
                            Barrier (&free)[M::kStages], WgmmaShared<M>& shared) {
  const Problem& p = args.problem;
  bool pending = false;  // the tile before is not announced
  uint32_t tasks = 0;
  const auto copy = [&](const TaskPlace<M>& place, const Stretch<M>& stretch, int i, uint32_t tile) {
    const Task& task = place.task;
    const int64_t j0 = first_key<M::kKeys>(stretch.entry(i)), row = task.seq.k_row + j0;
    wait_free(free, tile);
    if (of == Operand::K && plans_next(stretch, i)) arrive_as_one(shared.ends_soon, tasks);
    if (tile == 0 && of == Operand::K) arrive_as_one(shared.begun, 0);
    const char* const from = view.data + (lead_offset(p, view, task.batch) + task.kv_head * view.h + row * view.s) * 2;
    copy_rows<M, M::kKeys, M::kKeys>(view, from, columns, task.key_end - j0, async, tiles[tile % M::kStages], 0);
    commit_copies();
    if (pending) announce<1>(&full[(tile - 1) % M::kStages]);
    pending = true;
  };
  const auto end = [&](uint32_t tile, const Stretch<M>& stretch) {
    if (pending) announce<0>(&full[(tile - 1) % M::kStages]);
    pending = false;
    if (of == Operand::K && plans_next(stretch, stretch.count)) arrive_as_one(shared.ends_soon, tasks);  // it is empty
    tasks += stretch.last;
  };
  for_tiles(shared, copy, end);
}

}  // namespace qkv::inline QKV_LEVEL
