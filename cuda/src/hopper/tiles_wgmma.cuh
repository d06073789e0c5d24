// SPDX-License-Identifier: Apache-2.0
// What forward_wgmma.cuh works on: sizes, what a block shares, and how its warps hand over to each other.
//
// A block works off tasks one after the other. One of its warps plans: which rows has the next task, which tiles of
// keys do they see? It copies Q too. One warp copies K, one V, one guards V, and two or three warpgroups compute. Who
// plans is up to a task ahead, and the copies up to kStages tiles: nobody waits for the beginning of a task or for its
// end.
#pragma once

#include "device/hopper.cuh"
#include "portable/results_mma.cuh"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

// General: masks that are no bands, scores that are more than scale q k^T.
template <class Element, int HeadDim, bool General>
struct WgmmaTile {
  using T = Element;
  using Out = uint16_t;
  static constexpr int kD = HeadDim;
  static constexpr bool kGeneral = General, kPairs = false, kFew = false, kHopper = true;
  // Warpgroups of 64 rows each; at D = 64 three, since exponentials take as long as products there.
  static constexpr int kGroups = kD == 64 ? 3 : 2, kThreads = kGroups * 128;
  static constexpr int kCopiers = 128, kAll = kThreads + kCopiers;
  // Registers of a thread: at the start, and when the copying warpgroup has given what the others take.
  static constexpr int kAtStart = 65536 / kAll / 8 * 8;
  static constexpr int kComputing = kD == 64 ? 160 : (kD == 128 ? 208 : 216);
  static constexpr int kCopying = (kAtStart * kAll - kComputing * kThreads) / kCopiers;
  static_assert(kCopying % 8 == 0 && kCopying >= 24, "as many as there are, in eights");
  static constexpr int kParts = 1, kKeyWarps = 1, kRowTiles = 1, kRows = kGroups * 64;
  static constexpr int kStages = kD == 64 ? 3 : 2, kQueries = kD == 256 ? 1 : 2;
  static constexpr int kKeys = kD == 256 ? 64 : 128, kWarpKeys = kKeys;
  static constexpr int kLift = Element::kDType == DType::bf16 ? 0 : 15;
  static constexpr float kSlack = kLift > 0 ? 0 : 8;
  static constexpr int kQPart = kRows * kD * 2, kKeyPart = kKeys * kD * 2;
  static constexpr int kKeyTiles = kKeys / 8, kColumnTiles = kD / 8;
  static constexpr int kStretches = 4, kPlaces = kGeneral ? 2 : 4;
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

// The rows of a task, query-major, all of whose queries follow each other: each follows from the first. Lanes has them
// one by one.
struct Run {
  int64_t row;                // the first, and a query
  int64_t first, last;        // range of positions of the living
  int32_t skipped, heads;     // heads of the first that are not in this tile; heads of a group
  int32_t head, result_head;  // the first of the group
  int32_t live;
};

template <int R, bool General>
struct TaskRows : Run {};
template <int R>
struct TaskRows<R, true> : Lanes<R> {};

template <class M>
struct TaskPlace {
  TaskRows<M::kRows, M::kGeneral> lanes;
  Task task;
  BoxPlace out[M::kGroups];  // where the rows of a warpgroup go, if they go as a box
  bool boxed[M::kGroups];
};

// Of row i of the tile.
template <class M>
QKV_DEVICE RowId row_id(const TaskPlace<M>& place, int i) {
  const auto& lanes = place.lanes;
  if constexpr (M::kGeneral) {
    return {place.task.batch, lanes.row[i], lanes.query[i], lanes.head[i], lanes.result_head[i], lanes.alive[i]};
  } else {
    const RowHead at = row_head(static_cast<uint32_t>(lanes.skipped + i), static_cast<uint32_t>(lanes.heads));
    const auto head = static_cast<int32_t>(at.head);
    const int64_t row = lanes.row + at.row;
    const bool alive = i < lanes.live && row < place.task.seq.Sq;
    return {place.task.batch, row, row, lanes.head + head, lanes.result_head + head, alive};
  }
}

struct KeyRange {
  int64_t low, high;
};
// The keys that row i sees, where the mask is a band.
template <class M>
QKV_DEVICE KeyRange seen_keys(const Plan& plan, const TaskPlace<M>& place, int i) {
  const RowId id = row_id(place, i);
  const Task& task = place.task;
  const int64_t p = task.seq.offset + id.query;
  const int64_t low = saturating_add(p, -plan.before), high = saturating_add(p, plan.after);
  return {low < task.key_first ? task.key_first : low,
          !id.alive ? -1 : (high < task.key_end - 1 ? high : task.key_end - 1)};
}

template <class M>
struct WgmmaShared {  // rings: each place is filled, used and free again, turn by turn
  char q[M::kQueries][M::kQPart];
  char k[M::kStages][M::kKeyPart];
  char v[M::kStages][M::kKeyPart];
  Seen<M> seen;  // the guard's
  OddSums<M> odd_sums[M::kRows];
  uint32_t odd;                                   // 1 + the task that they are of
  uint32_t bits[M::kRows][mask_words(M::kKeys)];  // keys that a row sees, for whoever computes
  Stretch<M> stretch[M::kStretches];
  TaskPlace<M> place[M::kPlaces];
  Barrier stretch_full[M::kStretches], stretch_free[M::kStretches], place_free[M::kPlaces];
  Barrier ends_soon[M::kPlaces];  // a task: few of its tiles are not under way
  Barrier begun[1];               // the first tile of K has come; not k_full, whose phases go on
  Barrier q_full[M::kQueries], q_free[M::kQueries];
  Barrier k_full[M::kStages], k_free[M::kStages], v_full[M::kStages], v_free[M::kStages];
  Barrier guarded[M::kStages];  // of those tiles alone that are: each phase of a barrier has somebody who waits for it
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
// Each lane of a warp for itself: what it wrote is there, what it read may go.
template <int N>
QKV_DEVICE void arrive(Barrier (&barriers)[N], uint32_t turn) {
  arrive(&barriers[turn % N]);
}
// A warp as one, where no lane wrote or read anything: the copy engine and products did, or nobody.
template <int N>
QKV_DEVICE void arrive_as_one(Barrier (&barriers)[N], uint32_t turn) {
  sync_warp();
  if (thread_index() % 32 == 0) arrive(&barriers[turn % N]);
}
// What a warp wrote without the copy engine is there for products: its copies that it has not waited for are `pending`.
template <int Pending>
QKV_DEVICE void announce(Barrier* full) {
  wait_copies<Pending>();
  show_to_products();
  arrive(full);
}

template <class M>
QKV_DEVICE void make_barriers(const HopperArgs& args, WgmmaShared<M>& shared) {
  constexpr int kWarps = M::kThreads / 32;                                      // that compute
  const auto copier = [](const Boxes& boxes) { return boxes.there ? 1 : 32; };  // one lane, or all
  shared.odd = 0;
  for (int i = 0; i < M::kStretches; ++i) {
    make_barrier(&shared.stretch_full[i], 32);
    make_barrier(&shared.stretch_free[i], M::kThreads + 3 * 32);
  }
  for (int i = 0; i < M::kPlaces; ++i) {
    make_barrier(&shared.place_free[i], M::kThreads + 32);
    make_barrier(&shared.ends_soon[i], 1);
  }
  make_barrier(&shared.begun[0], 1);
  for (int i = 0; i < M::kQueries; ++i) {
    make_barrier(&shared.q_full[i], copier(args.q));
    make_barrier(&shared.q_free[i], kWarps);
  }
  for (int i = 0; i < M::kStages; ++i) {
    make_barrier(&shared.k_full[i], copier(args.k));
    make_barrier(&shared.v_full[i], copier(args.v));
    make_barrier(&shared.guarded[i], 32);
    make_barrier(&shared.k_free[i], kWarps);
    make_barrier(&shared.v_free[i], kWarps + 32);
  }
}

}  // namespace qkv::inline QKV_LEVEL
