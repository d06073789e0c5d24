// SPDX-License-Identifier: Apache-2.0
// Which tiles of keys does a tile of rows see, and which keys within them? The questions of qkv/mask.h, asked by all
// threads at once: tiles of none are not in the list, tiles of all run without a mask, the others get one word of bits
// per row and 32 keys.
#pragma once

#include "portable/lanes.cuh"

namespace qkv::inline QKV_LEVEL {

QKV_HD constexpr int mask_words(int keys) { return (keys + 31) / 32; }

constexpr uint32_t kPartial = 1u << 31;  // in an entry of the list: some key of the tile is hidden from some row

template <int Keys>
QKV_DEVICE int64_t first_key(uint32_t entry) {
  return static_cast<int64_t>(entry & ~kPartial) * Keys;
}

template <int Threads>
struct TileList {
  uint32_t tile[Threads];  // visible tiles of this stretch of Threads tiles, ascending
  int32_t in_warp[Threads / 32];
};

// The tiles first_tile ... first_tile + Threads - 1, below end_tile, that are visible; returns how many. All of so many
// threads call it.
template <int Keys, int Threads, int R, class Sync = void()>
QKV_DEVICE int list_tiles(const KernelArgs& args, const Task& task, const Lanes<R>& lanes, int64_t first_tile,
                          TileList<Threads>& list, int thread = thread_index(), const Sync& sync = sync_block,
                          int64_t end_tile = INT64_MAX) {
  const Problem& p = args.problem;
  const int warp = thread / 32;
  const int64_t tile = first_tile + thread, j0 = tile * Keys;
  Cover cover = Cover::None;
  if (j0 < task.key_end && tile < end_tile && lanes.first <= lanes.last) {
    const int64_t j1 = (j0 + Keys < task.key_end ? j0 + Keys : task.key_end) - 1;
    cover = mask_cover(p.program, task.batch, {lanes.first, lanes.last, j0, j1});
    const bool hides = p.mask.data || (p.bias.data && !p.distances.plain);
    if (cover == Cover::All && (hides || j1 - j0 + 1 < Keys)) cover = Cover::Some;
  }
  const bool visible = cover != Cover::None;
  const uint32_t votes = ballot(visible);
  if (thread % 32 == 0) list.in_warp[warp] = count_bits(votes);
  sync();
  int before = 0, count = 0;
  for (int w = 0; w < Threads / 32; ++w) {
    if (w < warp) before += list.in_warp[w];
    count += list.in_warp[w];
  }
  before += count_bits(votes & ((1u << (thread % 32)) - 1));
  if (visible) list.tile[before] = static_cast<uint32_t>(tile) | (cover == Cover::Some ? kPartial : 0);
  sync();
  return count;
}

// Which of the keys first ... first + 31 a row sees, by the mask program, the mask array and the end of the keys. A
// bias of -inf shows in the scores.
template <int R>
QKV_DEVICE uint32_t seen_keys(const KernelArgs& args, const Task& task, const Lanes<R>& lanes, int row, int64_t first) {
  const Problem& p = args.problem;
  const int64_t left = task.key_end - first;
  if (!lanes.alive[row] || left <= 0) return 0;
  uint32_t seen = left < 32 ? ~uint32_t{0} >> (32 - static_cast<int>(left)) : ~uint32_t{0};
  seen &= mask_bits(p.program, task.batch, lanes.position[row], first);
  if (!p.mask.data || !seen) return seen;
  const auto* x = reinterpret_cast<const uint8_t*>(p.mask.data) + lanes.mask[row] + first * p.mask.d;
  uint32_t kept = 0;
  for (int t = 0; t < 32; ++t) {
    if (seen >> t & 1) kept |= static_cast<uint32_t>(x[t * p.mask.d] != 0) << t;
  }
  return kept;
}

// bits[row][w]: of the keys j0 + 32 w ... + 31. By `threads` threads.
template <int Keys, int R>
QKV_DEVICE void look(const KernelArgs& args, const Task& task, const Lanes<R>& lanes, int64_t j0,
                     uint32_t (&bits)[R][mask_words(Keys)], int thread, int threads) {
  QKV_ROLLED
  for (int i = thread; i < R * mask_words(Keys); i += threads) {
    bits[i % R][i / R] = seen_keys(args, task, lanes, i % R, j0 + i / R * 32);
  }
}

}  // namespace qkv::inline QKV_LEVEL
