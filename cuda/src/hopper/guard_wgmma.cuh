// SPDX-License-Identifier: Apache-2.0
// The warp that guards V, and stores what tasks leave.
//
// Where some row does not wholly see a tile, a value that is not finite becomes 0 before the product, and what it adds
// to the rows that see it is kept until the end of the task. So whoever computes need not ask.
#pragma once

#include "hopper/copy_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// Of the odd values that were taken out of a tile: what do they add to the rows that see them? By a warp.
template <class M>
QKV_DEVICE void keep_odd_sums(const KernelArgs& args, const TaskPlace<M>& place, int64_t j0, int lane,
                              WgmmaShared<M>& shared) {
  constexpr int kWords = M::kD / 16;
  Seen<M>& seen = shared.seen;
  if (!shared.odd) {
    for (int i = lane; i < M::kRows * kWords; i += 32) shared.odd_sums[i / kWords][i % kWords] = 0;
    sync_warp();  // all have looked
    if (lane == 0) shared.odd = true;
  }
  look<M::kKeys>(args, place.task, place.lanes, j0, seen.bits, lane, 32);
  QKV_ROLLED
  for (int i = lane; i < M::kRows * mask_words(M::kKeys); i += 32) {
    const int row = i % M::kRows, word = i / M::kRows;
    seen.gone[row][word] = hidden_by_bias(args.problem, place.lanes, row, j0 + word * 32, seen.bits[row][word]);
  }
  sync_warp();
  QKV_ROLLED
  for (int i = lane; i < M::kRows * kWords; i += 32) {
    uint32_t sums = 0;
    QKV_ROLLED
    for (int c = 0; c < 16; ++c) {
      sums |= odd_sum(seen, Place{0, 0, 0, 0}, i / kWords, i % kWords * 16 + c) << (c * 2);
    }
    shared.odd_sums[i / kWords][i % kWords] |= sums;
  }
}

// Can rows first ... + 63 of a tile be written as boxes? Those beyond the living are beyond the array, too, but where
// another sequence follows.
template <class M>
QKV_DEVICE bool stores_boxes(const HopperArgs& args, const TaskPlace<M>& place, int first) {
  return args.out.there && args.plan.parts == 1 && (!args.problem.cu_q || place.lanes.live >= first + 64);
}

// By one thread.
template <class M>
QKV_DEVICE void store_rows(const HopperArgs& args, const TaskPlace<M>& place, const char* out) {
  const Lanes<M::kRows>& lanes = place.lanes;
  QKV_ROLLED
  for (int first = 0; first < lanes.live; first += 64) {
    if (!stores_boxes(args, place, first)) continue;
    BoxPlace to =
        box_place(args.out, place.task.batch, lanes.result_head[first], place.task.seq.q_row + lanes.row[first]);
    QKV_ROLLED
    for (; to.column < args.problem.Dv; to.column += 64) {
      store_box(out + to.column / 64 * (M::kRows * 128) + first * 128, args.out.map, to);
    }
  }
  wait_boxes_read();
}

// It also writes out what a task has left where its Q was.
template <class M>
QKV_DEVICE void guard_values(const HopperArgs& args, WgmmaShared<M>& shared) {
  const int lane = thread_index() % 32;
  uint32_t task = 0;
  bool begins = true;
  const auto guard = [&](const TaskPlace<M>& place, uint32_t entry, uint32_t tile) {
    char* const v = shared.v[tile % M::kStages];
    if (begins && lane == 0) shared.odd = false;
    begins = false;
    wait_full(shared.v_full, tile);
    if (entry & kPartial && any_in_warp(!finite_tile<M>(v, lane, 32))) {
      take_out_odd<M>(v, shared.seen.odd, lane, 32, sync_warp);
      show_to_products();
      keep_odd_sums(args, place, first_key<M::kKeys>(entry), lane, shared);
    }
    arrive(shared.guarded, tile);
    arrive(shared.v_free, tile);
  };
  const auto end = [&](uint32_t, bool last) {
    begins = last;
    if (!last) return;
    wait_full(shared.out_full, task);
    if (lane == 0) store_rows(args, shared.place[task % 2], shared.q[task % M::kQueries]);
    arrive(shared.q_free, task);
    arrive(shared.place_free, task++);
  };
  for_tiles(shared, guard, end);
}

}  // namespace qkv::inline QKV_LEVEL
