// SPDX-License-Identifier: Apache-2.0
// What forward_wgmma.cuh works on: sizes, what a block shares, and the warps that plan and copy.
//
// A block works off tasks one after the other. One of its warps plans: which rows has the next task, which tiles of
// keys do they see? It copies Q too. One warp copies K, two V, and two or three warpgroups compute. Who plans is up to
// a task ahead, and the copies up to kStages tiles: nobody waits for the beginning of a task or for its end.
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
  static constexpr bool kTurns = kD < 256, kHalves = kD == 256;
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
};

template <class M>
struct TaskPlace {
  Lanes<M::kRows> lanes;
  Task task;
  const char *k, *v;        // of key 0
  const char* q[M::kRows];  // of the living rows, and of the first
  char* out[M::kRows];      // nullptr: none
};

template <class M>
struct WgmmaShared {  // rings: each place is filled, used and free again, turn by turn
  char q[M::kQueries][M::kQPart];
  char k[M::kStages][M::kKeyPart];
  char v[M::kStages][M::kKeyPart];
  Seen<M> seen;
  Stretch<M> stretch[2];
  TaskPlace<M> place[2];
  Barrier stretch_full[2], stretch_free[2], q_full[M::kQueries], q_free[M::kQueries];
  Barrier k_full[M::kStages], k_free[M::kStages], v_full[M::kStages], v_free[M::kStages];
  uint32_t vote;
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
template <int N>
QKV_DEVICE void arrive(Barrier (&barriers)[N], uint32_t turn) {
  arrive(&barriers[turn % N]);
}
// This thread's share of a tile is there: when its copies have come, or, without such, what it wrote.
template <int N>
QKV_DEVICE void fill(Barrier (&full)[N], uint32_t turn, bool async) {
  if (async) arrive_with_copies(&full[turn % N]);
  else arrive(full, turn);
}
// Until an operand of products is there.
template <int N>
QKV_DEVICE void wait_operand(Barrier (&full)[N], uint32_t turn) {
  wait_full(full, turn);
  show_to_products();
}

template <class M>
QKV_DEVICE void make_barriers(WgmmaShared<M>& shared) {
  for (int i = 0; i < 2; ++i) {
    make_barrier(&shared.stretch_full[i], 32);
    make_barrier(&shared.stretch_free[i], M::kThreads + 3 * 32);
  }
  for (int i = 0; i < M::kQueries; ++i) {
    make_barrier(&shared.q_full[i], 32);
    make_barrier(&shared.q_free[i], M::kThreads);
  }
  for (int i = 0; i < M::kStages; ++i) {
    make_barrier(&shared.k_full[i], M::kHalves ? 2 * 32 : 32);
    make_barrier(&shared.v_full[i], 2 * 32);
    make_barrier(&shared.k_free[i], M::kThreads);
    make_barrier(&shared.v_free[i], M::kThreads);
  }
}

// --- copy ----------------------------------------------------------------------------------------------------

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
  const Problem& p = args.problem;
  if (thread == 0) {
    Task& t = place.task;
    t = task_of(args, id, M::kRows);
    place.k = p.k.data + (lead_offset(p, p.k, t.batch) + t.kv_head * p.k.h + t.seq.k_row * p.k.s) * 2;
    place.v = p.v.data + (lead_offset(p, p.v, t.batch) + t.kv_head * p.v.h + t.seq.k_row * p.v.s) * 2;
  }
  sync_warp();
  const bool some = place.task.first_row < place.task.rows && place.task.part < place.task.parts;
  if (!some) {
    sync_warp();  // all have looked
    return false;
  }
  const Task& task = place.task;
  fill_lanes(args, task, place.lanes, thread, 32, sync_warp);
  const int64_t lead = lead_offset(p, p.q, task.batch) + task.seq.q_row * p.q.s;
  const int64_t out_lead = lead_offset(p, p.out, task.batch) + task.seq.q_row * p.out.s;
  for (int i = thread; i < M::kRows; i += 32) {
    const int64_t at = lead + place.lanes.head[i] * p.q.h + place.lanes.query[i] * p.q.s;
    place.q[i] = place.lanes.alive[i] || i == 0 ? p.q.data + at * 2 : nullptr;
    const int64_t to = out_lead + place.lanes.result_head[i] * p.out.h + place.lanes.row[i] * p.out.s;
    place.out[i] = p.out.data && i < place.lanes.live ? p.out.data + to * 2 : nullptr;
  }
  return true;
}

// All rows of Q by the planner: where they follow each other, as those of K.
template <class M>
QKV_DEVICE void copy_queries(const KernelArgs& args, const TaskPlace<M>& place, int lane, char* q) {
  constexpr int kAtOnce = M::kKeys / 2, kChunks = M::kD / 8;
  const Problem& p = args.problem;
  const bool async = args.plan.async_q;
  if (args.plan.group_size == 1 && !p.rows) {
    const int64_t rows = place.task.seq.Sq - place.task.first_row;
    QKV_ROLLED
    for (int first = 0; first < M::kRows; first += kAtOnce) {
      copy_rows<M, kAtOnce, M::kRows>(p.q, place.q[0] + first * p.q.s * 2, p.D, rows - first, async, q, first);
    }
    return;
  }
  const int chunk = lane % kChunks, n = within(p.D - chunk * 8, 8);
  const int64_t column = chunk * (async ? 8 : 8 * p.q.d) * 2;
  QKV_ROLLED
  for (int row = lane / kChunks; row < M::kRows; row += 32 / kChunks) {
    const char* const from = place.q[row];
    load_chunk(q + chunk_offset<M>(row, chunk), p.q, from + column, place.lanes.alive[row] ? n : 0, async);
  }
}

// Tasks block, block + grid ..., every other time counted from the end, as tasks may become smaller from first to last.
template <class M>
QKV_DEVICE void plan_tasks(const KernelArgs& args, int64_t block, WgmmaShared<M>& shared) {
  const int thread = thread_index() % 32;
  const int64_t grid = args.plan.grid;
  uint32_t turn = 0, tasks = 0;  // stretches and tasks so far
  bool back = false;
  for (int64_t first = 0; first < args.plan.blocks; first += grid, back = !back) {
    const int64_t id = first + (back ? grid - 1 - block : block);
    if (id >= args.plan.blocks) continue;
    wait_free(shared.stretch_free, turn);  // and so the task before the last has been done
    TaskPlace<M>& place = shared.place[tasks % 2];
    if (!plan_task(args, id, thread, place)) continue;
    const Task& task = place.task;
    bool begins = true;
    for (int64_t tile = task.key_first / M::kKeys;; tile += 32) {
      wait_free(shared.stretch_free, turn);
      Stretch<M>& stretch = shared.stretch[turn % 2];
      const bool last = (tile + 32) * M::kKeys >= task.key_end;
      const int count = list_tiles<M::kKeys>(args, task, place.lanes, tile, stretch.tiles, thread, sync_warp);
      if (count == 0 && !last) continue;
      if (thread == 0) {
        stretch.count = count;
        stretch.last = last;
        stretch.stop = false;
      }
      arrive(shared.stretch_full, turn++);
      if (begins) {
        wait_free(shared.q_free, tasks);
        copy_queries(args, place, thread, shared.q[tasks % M::kQueries]);
        fill(shared.q_full, tasks, args.plan.async_q);
        begins = false;
      }
      if (last) break;
    }
    ++tasks;
  }
  wait_free(shared.stretch_free, turn);
  if (thread == 0) shared.stretch[turn % 2].stop = true;
  arrive(shared.stretch_full, turn);
}

// --- load ----------------------------------------------------------------------------------------------------

// All tiles of K, or the half of each of V that begins with `row`, as soon as there is place.
template <class M, bool Keys>
QKV_DEVICE void copy_tiles(const KernelArgs& args, int row, WgmmaShared<M>& shared) {
  constexpr int kRows = Keys ? M::kKeys : M::kKeys / 2;
  const View& view = Keys ? args.problem.k : args.problem.v;
  const bool async = Keys ? args.plan.async_k : args.plan.async_v;
  uint32_t tile = 0, task = 0;
  for (uint32_t turn = 0;; ++turn) {
    wait_full(shared.stretch_full, turn);
    const Stretch<M>& stretch = shared.stretch[turn % 2];
    if (stretch.stop) break;
    const TaskPlace<M>& place = shared.place[task % 2];
    for (int i = 0; i < stretch.count; ++i, ++tile) {
      const int64_t j0 = first_key<M::kKeys>(stretch.tiles.tile[i]) + row;
      wait_free(Keys ? shared.k_free : shared.v_free, tile);
      copy_rows<M, kRows, M::kKeys>(view, (Keys ? place.k : place.v) + j0 * view.s * 2,
                                    Keys ? args.problem.D : args.problem.Dv, place.task.key_end - j0, async,
                                    (Keys ? shared.k : shared.v)[tile % M::kStages], row);
      fill(Keys ? shared.k_full : shared.v_full, tile, async);
    }
    task += stretch.last;
    arrive(shared.stretch_free, turn);
  }
}

// The same by three warps which take the halves of K and V in turn: faster by a tenth or more at D = 256, where little
// else is done beside the products; slower where K has to come early.
template <class M>
QKV_DEVICE void copy_halves(const KernelArgs& args, int warp, WgmmaShared<M>& shared) {
  const Problem& p = args.problem;
  uint32_t tiles = 0, task = 0, half = static_cast<uint32_t>(warp);  // of the stretch: four a tile, two of K, two of V
  for (uint32_t turn = 0;; ++turn) {
    wait_full(shared.stretch_full, turn);
    const Stretch<M>& stretch = shared.stretch[turn % 2];
    if (stretch.stop) break;
    const TaskPlace<M>& place = shared.place[task % 2];
    const auto count = static_cast<uint32_t>(stretch.count);
    for (; half / 4 < count; half += 3) {
      const uint32_t tile = tiles + half / 4;
      const bool keys = half / 2 % 2 == 0, async = keys ? args.plan.async_k : args.plan.async_v;
      const int row = static_cast<int>(half % 2) * (M::kKeys / 2);
      const View& view = keys ? p.k : p.v;
      const int64_t j0 = first_key<M::kKeys>(stretch.tiles.tile[half / 4]) + row;
      wait_free(keys ? shared.k_free : shared.v_free, tile);
      copy_rows<M, M::kKeys / 2, M::kKeys>(view, (keys ? place.k : place.v) + j0 * view.s * 2, keys ? p.D : p.Dv,
                                           place.task.key_end - j0, async,
                                           (keys ? shared.k : shared.v)[tile % M::kStages], row);
      fill(keys ? shared.k_full : shared.v_full, tile, async);
    }
    tiles += count;
    half -= 4 * count;
    task += stretch.last;
    arrive(shared.stretch_free, turn);
  }
}

}  // namespace qkv::inline QKV_LEVEL
