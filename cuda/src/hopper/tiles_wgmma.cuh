// SPDX-License-Identifier: Apache-2.0
// What forward_wgmma.cuh works on: sizes, what a block shares, and the warps that plan and copy.
//
// A block works off tasks one after the other. One of its warps plans: which rows has the next task, which tiles of
// keys do they see? It copies Q too. One warp copies K, one V, one guards V, and two or three warpgroups compute. Who
// plans is up to a task ahead, and the copies up to kStages tiles: nobody waits for the beginning of a task or for its
// end.
//
// Copies are boxes for the copy engine; arrays that it does not take (boxes.cc) are copied chunk by chunk.
//
// The guard: where some row does not wholly see a tile, a value that is not finite becomes 0 before the product, and
// what it adds to the rows that see it is kept until the end of the task. So whoever computes need not ask.
#pragma once

#include "device/hopper.cuh"
#include "portable/results_mma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class Element, int HeadDim>
struct WgmmaTile {
  using T = Element;
  using Out = uint16_t;
  static constexpr int kD = HeadDim;
  static constexpr bool kPairs = false, kFew = false, kHopper = true;
  // Warpgroups of 64 rows each; at D = 64 three, since exponentials take as long as products there.
  static constexpr int kGroups = kD == 64 ? 3 : 2, kThreads = kGroups * 128;
  static constexpr int kCopiers = 128, kAll = kThreads + kCopiers;
  // Registers of a thread: at the start, and when the copying warpgroup has given what the others take.
  static constexpr int kAtStart = 65536 / kAll / 8 * 8;
  static constexpr int kCopying = kGroups == 2 ? 56 : 32, kComputing = kGroups == 2 ? 224 : 160;
  static_assert(kThreads * (kComputing - kAtStart) <= kCopiers * (kAtStart - kCopying), "who takes more waits forever");
  static constexpr int kParts = 1, kKeyWarps = 1, kRowTiles = 1, kRows = kGroups * 64;
  static constexpr int kStages = kD == 64 ? 3 : 2, kQueries = kD == 256 ? 1 : 2;
  static constexpr int kKeys = kD == 256 ? 64 : 128, kWarpKeys = kKeys;
  static constexpr int kLift = Element::kDType == DType::bf16 ? 0 : 15;
  static constexpr float kSlack = kLift > 0 ? 0 : 8;
  static constexpr int kQPart = kRows * kD * 2, kKeyPart = kKeys * kD * 2;
  static constexpr int kKeyTiles = kKeys / 8, kColumnTiles = kD / 8;
  static constexpr int kStretches = 4;
  static constexpr bool kTurns = kD < 256;
  QKV_DEVICE static int group() { return thread_index() / 128; }
  // Barriers 1, 2 ... 4 (turns) and 5 ... 7.
  QKV_DEVICE static void sync() { sync_threads<kThreads>(1); }
  QKV_DEVICE static void sync_group() { sync_threads<128>(5 + group()); }
};

// The warpgroups begin their products in turn, so that one's softmax runs beside another's products.
template <class M>
QKV_DEVICE void take_turn(int group) {
  if constexpr (M::kTurns) sync_threads<256>(2 + group);
}
template <class M>
QKV_DEVICE void pass_turn(int group) {
  if constexpr (M::kTurns) arrive_threads<256>(group + 1 < M::kGroups ? group + 3 : 2);
}

template <class M>
struct Stretch {  // of the tiles of a task, which may have several
  TileList<32> tiles;
  int32_t count;
  bool last;  // of its task
  bool stop;  // there is nothing more to do

  // The last tile comes first: under a causal mask that one takes longest, and its V can be guarded in good time.
  QKV_DEVICE uint32_t entry(int i) const { return tiles.tile[count - 1 - i]; }
};

// What values that are not finite add to the columns of a row, as odd_sum has it: 16 columns a word.
template <class M>
using OddSums = uint32_t[M::kD / 16];

template <class M>
struct TaskPlace {
  Lanes<M::kRows> lanes;
  Task task;
  int64_t low[M::kRows], high[M::kRows];  // keys that a row sees at most; all of them, where the mask is a band
};

template <class M>
struct WgmmaShared {  // rings: each place is filled, used and free again, turn by turn
  char q[M::kQueries][M::kQPart];
  char k[M::kStages][M::kKeyPart];
  char v[M::kStages][M::kKeyPart];
  Seen<M> seen;                   // the guard's
  OddSums<M> odd_sums[M::kRows];  // of a task, if it is odd
  bool odd;
  uint32_t bits[M::kRows][mask_words(M::kKeys)];  // keys that a row sees, for whoever computes
  Stretch<M> stretch[M::kStretches];
  TaskPlace<M> place[2];
  Barrier stretch_full[M::kStretches], stretch_free[M::kStretches], place_free[2];
  Barrier q_full[M::kQueries], q_free[M::kQueries];
  Barrier out_full[M::kQueries];  // where Q was
  Barrier k_full[M::kStages], k_free[M::kStages], v_full[M::kStages], v_free[M::kStages], guarded[M::kStages];
};

// --- rings ---------------------------------------------------------------------------------------------------

template <int N>
QKV_DEVICE void wait_full(Barrier (&full)[N], uint32_t turn) {
  wait_phase(&full[turn % N], turn / N);
}
template <int N>
QKV_DEVICE void wait_free(Barrier (&free)[N], uint32_t turn) {
  wait_phase(&free[turn % N], turn / N + 1);  // the phase before the first has passed already
}
// A warp arrives as one.
template <int N>
QKV_DEVICE void arrive(Barrier (&barriers)[N], uint32_t turn) {
  sync_warp();
  if (thread_index() % 32 == 0) arrive(&barriers[turn % N]);
}
// What a warp wrote without the copy engine is there for products: its copies that it has not waited for are `pending`.
template <int Pending>
QKV_DEVICE void announce(Barrier* full) {
  wait_copies<Pending>();
  show_to_products();
  sync_warp();
  if (thread_index() % 32 == 0) arrive(full);
}

template <class M>
QKV_DEVICE void make_barriers(WgmmaShared<M>& shared) {
  constexpr int kWarps = M::kThreads / 32;  // that compute
  for (int i = 0; i < M::kStretches; ++i) {
    make_barrier(&shared.stretch_full[i], 1);
    make_barrier(&shared.stretch_free[i], kWarps + 3);
  }
  for (int i = 0; i < 2; ++i) make_barrier(&shared.place_free[i], 1);
  for (int i = 0; i < M::kQueries; ++i) {
    make_barrier(&shared.q_full[i], 1);
    make_barrier(&shared.q_free[i], 1);
    make_barrier(&shared.out_full[i], kWarps);
  }
  for (int i = 0; i < M::kStages; ++i) {
    make_barrier(&shared.k_full[i], 1);
    make_barrier(&shared.v_full[i], 1);
    make_barrier(&shared.guarded[i], 1);
    make_barrier(&shared.k_free[i], kWarps);
    make_barrier(&shared.v_free[i], kWarps + 1);
  }
}

// --- copy ----------------------------------------------------------------------------------------------------

QKV_DEVICE BoxPlace box_place(const Boxes& boxes, int64_t batch, int64_t head, int64_t row) {
  const int64_t outer = boxes.inner > 1 ? divided(batch, boxes.inner) : batch, inner = batch - outer * boxes.inner;
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

// --- plan ----------------------------------------------------------------------------------------------------

// False: there is nothing to do.
template <class M>
QKV_DEVICE bool plan_task(const KernelArgs& args, int64_t id, int thread, TaskPlace<M>& place) {
  if (thread == 0) place.task = task_of(args, id, M::kRows);
  sync_warp();
  const bool some = place.task.first_row < place.task.rows && place.task.part < place.task.parts;
  if (!some) {
    sync_warp();  // all have looked
    return false;
  }
  const Task& task = place.task;
  const Plan& plan = args.plan;
  fill_lanes(args, task, place.lanes, thread, 32, sync_warp);
  QKV_ROLLED
  for (int i = thread; i < M::kRows; i += 32) {
    const bool alive = place.lanes.alive[i];
    const int64_t p = alive ? place.lanes.position[i] : 0;
    const int64_t low = plan.band ? saturating_add(p, -plan.before) : 0;
    const int64_t high = plan.band ? saturating_add(p, plan.after) : task.key_end - 1;
    place.low[i] = low < task.key_first ? task.key_first : low;
    place.high[i] = !alive ? -1 : (high < task.key_end - 1 ? high : task.key_end - 1);
  }
  return true;
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
  if (plan.band && place.lanes.first <= place.lanes.last) {
    const int64_t lowest = saturating_add(place.lanes.first, -plan.before);
    const int64_t highest = saturating_add(place.lanes.last, plan.after);
    low = lowest > low ? lowest : low;
    high = highest < high ? highest : high;
  }
  const int64_t first = task.key_first / M::kKeys;
  return high < low ? TileRange{first, first} : TileRange{low / M::kKeys, high / M::kKeys + 1};
}

// All rows of Q by the planner: as boxes of 64 rows, as those of K where they follow each other, or one by one.
template <class M>
QKV_DEVICE void copy_queries(const HopperArgs& args, const TaskPlace<M>& place, int lane, char* q, Barrier* full) {
  constexpr int kAtOnce = M::kKeys / 2, kChunks = M::kD / 8;
  const Problem& p = args.problem;
  const Lanes<M::kRows>& lanes = place.lanes;
  if (args.q.there) {
    if (lane > 0) return;
    arrive_expecting(full, M::kQPart);
    BoxPlace at = box_place(args.q, place.task.batch, lanes.head[0], place.task.seq.q_row + lanes.query[0]);
    QKV_ROLLED
    for (int first = 0; first < M::kRows; first += 64, at.row += 64 / static_cast<int>(args.plan.group_size)) {
      load_boxes<M, M::kRows>(args.q, at, q + first * 128, full);
    }
    return;
  }
  const bool async = args.plan.async_q;
  const char* const data = p.q.data + (lead_offset(p, p.q, place.task.batch) + place.task.seq.q_row * p.q.s) * 2;
  if (args.plan.group_size == 1 && !p.rows) {
    const char* const from = data + (lanes.head[0] * p.q.h + lanes.query[0] * p.q.s) * 2;
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
      const bool alive = lanes.alive[row];
      const int64_t at = alive ? lanes.head[row] * p.q.h + lanes.query[row] * p.q.s + column : 0;
      load_chunk(q + chunk_offset<M>(row, chunk), p.q, data + at * 2, alive ? n : 0, async);
    }
  }
  commit_copies();
  announce<0>(full);
}

// Tasks block, block + grid ..., every other time counted from the end, as tasks may become smaller from first to last.
template <class M>
QKV_DEVICE void plan_tasks(const HopperArgs& args, int64_t block, WgmmaShared<M>& shared) {
  const int thread = thread_index() % 32;
  const int64_t grid = args.plan.grid;
  uint32_t turn = 0, tasks = 0;  // stretches and tasks so far
  bool back = false;
  for (int64_t first = 0; first < args.plan.blocks; first += grid, back = !back) {
    const int64_t id = first + (back ? grid - 1 - block : block);
    if (id >= args.plan.blocks) continue;
    wait_free(shared.place_free, tasks);
    TaskPlace<M>& place = shared.place[tasks % 2];
    if (!plan_task(args, id, thread, place)) continue;
    const auto [first_tile, end_tile] = tiles_in_reach(args, place);
    bool begins = true;
    for (int64_t end = end_tile;; end -= 32) {
      const bool last = end - first_tile <= 32;
      const int64_t tile = last ? first_tile : end - 32;
      wait_free(shared.stretch_free, turn);
      Stretch<M>& stretch = shared.stretch[turn % M::kStretches];
      int count = list_tiles<M::kKeys>(args, place.task, place.lanes, tile, stretch.tiles, thread, sync_warp, end);
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
        copy_queries(args, place, thread, shared.q[tasks % M::kQueries], &shared.q_full[tasks % M::kQueries]);
        begins = false;
      }
      if (last) break;
    }
    ++tasks;
  }
  wait_free(shared.stretch_free, turn);
  if (thread == 0) shared.stretch[turn % M::kStretches].stop = true;
  arrive(shared.stretch_full, turn);
}

// --- load ----------------------------------------------------------------------------------------------------

// f(place, entry, tile) for all tiles of all tasks, by a warp; tile counts them. end(tile, last) after each
// stretch: is it the last of its task?
template <class M, class F, class End>
QKV_DEVICE void for_tiles(WgmmaShared<M>& shared, const F& f, const End& end) {
  uint32_t tile = 0, task = 0;
  for (uint32_t turn = 0;; ++turn) {
    wait_full(shared.stretch_full, turn);
    const Stretch<M>& stretch = shared.stretch[turn % M::kStretches];
    if (stretch.stop) return;
    for (int i = 0; i < stretch.count; ++i, ++tile) f(shared.place[task % 2], stretch.entry(i), tile);
    end(tile, stretch.last);
    task += stretch.last;
    arrive(shared.stretch_free, turn);
  }
}

// All tiles of K, or of V, as soon as there is place. Chunk by chunk a tile is announced when the next is under way.
template <class M>
QKV_DEVICE void copy_tiles(const KernelArgs& args, const Boxes& boxes, const View& view, int64_t columns, bool async,
                           char (&tiles)[M::kStages][M::kKeyPart], Barrier (&full)[M::kStages],
                           Barrier (&free)[M::kStages], WgmmaShared<M>& shared) {
  const Problem& p = args.problem;
  bool pending = false;  // the tile before is not announced
  const auto copy = [&](const TaskPlace<M>& place, uint32_t entry, uint32_t tile) {
    const Task& task = place.task;
    const int64_t j0 = first_key<M::kKeys>(entry), row = task.seq.k_row + j0;
    char* const to = tiles[tile % M::kStages];
    Barrier* const barrier = &full[tile % M::kStages];
    wait_free(free, tile);
    if (boxes.there) {
      if (thread_index() % 32 == 0) {
        arrive_expecting(barrier, M::kKeyPart);
        load_boxes<M, M::kKeys>(boxes, box_place(boxes, task.batch, task.kv_head, row), to, barrier);
      }
      sync_warp();  // nobody runs ahead: whoever lags two phases behind waits for the wrong one
      return;
    }
    const char* const from = view.data + (lead_offset(p, view, task.batch) + task.kv_head * view.h + row * view.s) * 2;
    copy_rows<M, M::kKeys, M::kKeys>(view, from, columns, task.key_end - j0, async, to, 0);
    commit_copies();
    if (pending) announce<1>(&full[(tile - 1) % M::kStages]);
    pending = true;
  };
  const auto end = [&](uint32_t tile, bool) {
    if (pending) announce<0>(&full[(tile - 1) % M::kStages]);
    pending = false;
  };
  for_tiles(shared, copy, end);
}

// --- guard ---------------------------------------------------------------------------------------------------

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
