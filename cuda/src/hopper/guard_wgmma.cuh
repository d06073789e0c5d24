// SPDX-License-Identifier: Apache-2.0
// The warp that guards V.
//
// Where some row does not wholly see a tile, a value that is not finite becomes 0 before the product, and what it adds
// to the rows that see it is kept until the end of the task. So whoever computes need not ask.
#pragma once

#include "hopper/copy_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// Of the odd values that were taken out of a tile: what do they add to the rows that see them? By a warp.
template <class M>
QKV_DEVICE void keep_odd_sums(const KernelArgs& args, const TaskPlace<M>& place, uint32_t task, int64_t j0, int lane,
                              WgmmaShared<M>& shared) {
  constexpr int kWords = M::kD / 16;
  Seen<M>& seen = shared.seen;
  if (shared.odd != task + 1) {
    if (task > 0) wait_full(shared.place_free, task - 1);  // those of the task before have been used
    for (int i = lane; i < M::kRows * kWords; i += 32) shared.odd_sums[i / kWords][i % kWords] = 0;
    sync_warp();  // all have looked
    if (lane == 0) shared.odd = task + 1;
  }
  if constexpr (M::kGeneral) look<M::kKeys>(args, place.task, place.lanes, j0, seen.bits, lane, 32);
  QKV_ROLLED
  for (int i = lane; i < M::kRows * mask_words(M::kKeys); i += 32) {
    const int row = i % M::kRows, word = i / M::kRows;
    const int64_t first = j0 + word * 32;
    if constexpr (M::kGeneral) {
      seen.gone[row][word] = hidden_by_bias(args.problem, place.lanes, row, first, seen.bits[row][word]);
    } else {
      const KeyRange keys = seen_keys(args.plan, place, row);
      seen.bits[row][word] = range_bits(keys.low, keys.high, first);
      seen.gone[row][word] = 0;
    }
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
  sync_warp();  // all have looked
}

template <class M>
QKV_DEVICE void guard_values(const HopperArgs& args, WgmmaShared<M>& shared) {
  const int lane = thread_index() % 32;
  uint32_t task = 0, guards = 0;  // tiles that some row does not wholly see
  const auto guard = [&](const TaskPlace<M>& place, const Stretch<M>& stretch, int i, uint32_t tile) {
    char* const v = shared.v[tile % M::kStages];
    const uint32_t entry = stretch.entry(i);
    wait_full(shared.v_full, tile);
    if (entry & kPartial) {
      if (any_in_warp(!finite_tile<M>(v, lane, 32))) {
        take_out_odd<M>(v, shared.seen.odd, lane, 32, sync_warp);
        show_to_products();
        keep_odd_sums(args, place, task, first_key<M::kKeys>(entry), lane, shared);
      }
      arrive(shared.guarded, guards++);
    }
    arrive(shared.v_free, tile);
  };
  const auto end = [&](uint32_t, const Stretch<M>& stretch) {
    if (stretch.last) arrive(shared.place_free, task++);
  };
  for_tiles(shared, guard, end);
}

}  // namespace qkv::inline QKV_LEVEL
