// SPDX-License-Identifier: Apache-2.0
// The walk over the keys, and what a block leaves behind: out and lse, or its part of them; in a second walk with the
// normaliser known, the weights.
#pragma once

#include "portable/guard_mma.cuh"
#include "portable/halves.cuh"

namespace qkv::inline QKV_LEVEL {

// Takes the lift off l and O, and the scale of pairs off O: exact.
template <class M>
QKV_DEVICE void lower_rows(float v_unit, Rows<M>& rows) {
  if constexpr (M::kLift > 0) {
    constexpr float kFactor = 1.0f / static_cast<float>(1 << M::kLift);
    const float unit = M::kPairs ? kFactor * v_unit : kFactor;
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) {
      QKV_UNROLL
      for (int half = 0; half < 2; ++half) rows.l[r][half] *= kFactor;
      QKV_UNROLL
      for (int i = 0; i < M::kColumnTiles * 4; ++i) rows.o[r][i / 4][i % 4] *= unit;
    }
  }
}

// l of a row, until here of each lane's columns alone.
template <class M>
QKV_DEVICE void add_lanes(Rows<M>& rows) {
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    float& l = rows.l[i / 2][i % 2];
    l += shuffle_xor(l, 1);
    l += shuffle_xor(l, 2);
  }
}

// --- write ---------------------------------------------------------------------------------------------------

// Warps that shared the keys of a tile put their rows together in the first of them, through `memory`, in order.
template <class M>
QKV_DEVICE void merge_warps(float c, char* memory, Rows<M>& rows) {
  constexpr int kFloats = M::kColumnTiles * 4 + 4;
  auto* kept = reinterpret_cast<float*>(memory);
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  static_assert(M::kRowTiles == 1 && sizeof(float) * kFloats * 32 * 3 <= 2 * sizeof(MmaShared<M>::k));
  sync_block();
  if (warp > 0) {
    float* to = kept + (warp - 1) * kFloats * 32 + lane;
    QKV_UNROLL
    for (int i = 0; i < M::kColumnTiles * 4; ++i) to[i * 32] = rows.o[0][i / 4][i % 4];
    QKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      to[(M::kColumnTiles * 4 + half) * 32] = rows.m[0][half];
      to[(M::kColumnTiles * 4 + 2 + half) * 32] = rows.l[0][half];
    }
  }
  sync_block();
  if (warp > 0) return;
  for (int other = 0; other < 3; ++other) {
    const float* from = kept + other * kFloats * 32 + lane;
    float own[2], theirs[2];
    QKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float m1 = rows.m[0][half], m2 = from[(M::kColumnTiles * 4 + half) * 32], m = larger(m1, m2);
      // What saw nothing has l = 0; what only saw NaN has m = -inf and l = NaN, which must stay.
      own[half] = m1 == -kInf<float> ? 1.0f : power_of_two((m1 - m) * c);
      theirs[half] = m2 == -kInf<float> ? 1.0f : power_of_two((m2 - m) * c);
      rows.m[0][half] = m;
      rows.l[0][half] = rows.l[0][half] * own[half] + from[(M::kColumnTiles * 4 + 2 + half) * 32] * theirs[half];
    }
    QKV_UNROLL
    for (int i = 0; i < M::kColumnTiles * 4; ++i) {
      float& o = rows.o[0][i / 4][i % 4];
      o = o * own[i % 4 / 2] + from[i * 32] * theirs[i % 4 / 2];
    }
  }
}

template <class M>
QKV_DEVICE void write_partial(const KernelArgs& args, const Task& task, int row, int r, int half, const Place& at,
                              const Rows<M>& rows) {
  const Problem& p = args.problem;
  const Plan& plan = args.plan;
  const int64_t id = (task.batch * plan.groups + task.group) * plan.rows + task.first_row + row;
  float* to = static_cast<float*>(plan.partial) + (id * plan.parts + task.part) * (p.Dv + 2);
  if (at.t == 0) {
    to[0] = rows.m[r][half];
    to[1] = rows.l[r][half];
  }
  QKV_UNROLL
  for (int d = 0; d < M::kColumnTiles; ++d) {
    QKV_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int64_t column = d * 8 + at.t * 2 + e;
      if (column < p.Dv) to[2 + column] = rows.o[r][d][half * 2 + e];
    }
  }
}

// Of a chunk of 16 bytes of a row of O, where Q was: swizzled as all tiles are.
template <class M>
QKV_DEVICE int out_offset(int row, int chunk) {
  return row * M::kD * static_cast<int>(sizeof(typename M::Out)) + (chunk ^ (row & 7)) * 16;
}

// What finish_rows left, and O as it is to be: both in shared memory that the loop has left.
template <class M>
QKV_DEVICE void copy_rows(const Problem& p, const MmaShared<M>& shared, const RowEnds<float>& ends) {
  using T = typename M::Out;
  constexpr int kEach = 16 / sizeof(T), kChunks = M::kD / kEach;
  const bool chunks = p.out.d == 1 && reinterpret_cast<uintptr_t>(p.out.data) % 16 == 0;
  QKV_ROLLED
  for (int i = thread_index(); i < M::kRows * kChunks; i += M::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t left = p.Dv - chunk * kEach;
    if (row >= shared.lanes.live || left <= 0) continue;
    const auto x = *reinterpret_cast<const Chunk<T>*>(shared.q + out_offset<M>(row, chunk));
    auto* const to = reinterpret_cast<T*>(p.out.data) + ends.out[row].at + chunk * kEach * p.out.d;
    if (chunks && left >= kEach && ends.out[row].at % kEach == 0) {
      *reinterpret_cast<Chunk<T>*>(to) = x;
      continue;
    }
    QKV_UNROLL
    for (int e = 0; e < kEach; ++e) {
      if (e < left) to[e * p.out.d] = x.x[e];
    }
  }
}

template <class M>
QKV_DEVICE void write_whole(const KernelArgs& args, const ScoreRule<float>& rule, const Place& at, bool has_rows,
                            MmaShared<M>& shared, Rows<M>& rows) {
  RowEnds<float> ends(shared.v[0], M::kRows);
  static_assert(sizeof(shared.v[0]) >= M::kRows * (2 * sizeof(float) + sizeof(RowOut<float>)));
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int row = at.row0 + i / 2 * 16 + i % 2 * 8 + at.g;
    if (!has_rows || at.t > 0) continue;
    ends.m[row] = rows.m[i / 2][i % 2];
    ends.l[row] = rows.l[i / 2][i % 2];
  }
  finish_rows<float, M::kThreads>(args, shared.task, rule, shared.lanes, ends, M::sync);
  if (!args.problem.out.data) return;
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int row = at.row0 + i / 2 * 16 + i % 2 * 8 + at.g;
    if (!has_rows || row >= shared.lanes.live) continue;
    const RowOut<float> end = ends.out[row];
    QKV_UNROLL
    for (int d = 0; d < M::kColumnTiles; ++d) {
      const float* o = rows.o[i / 2][d] + i % 2 * 2;
      const float x = end.empty ? 0.0f : o[0] * end.factor, y = end.empty ? 0.0f : o[1] * end.factor;
      if constexpr (M::kPairs) {
        char* const to = shared.q + out_offset<M>(row, d * 2 + at.t / 2) + at.t % 2 * 8;
        *reinterpret_cast<float*>(to) = x;
        *reinterpret_cast<float*>(to + 4) = y;
      } else {
        *reinterpret_cast<uint32_t*>(shared.q + out_offset<M>(row, d) + at.t * 4) = pack<typename M::T>(x, y);
      }
    }
  }
  M::sync();
  copy_rows(args.problem, shared, ends);
}

// All threads call it; only the first warp of those that shared keys has rows.
template <class M>
QKV_DEVICE void write_rows(const KernelArgs& args, const ScoreRule<float>& rule, const Place& at, MmaShared<M>& shared,
                           Rows<M>& rows) {
  const bool has_rows = M::kKeyWarps == 1 || thread_index() < 32;
  add_lanes(rows);
  if (args.plan.parts == 1) {
    write_whole(args, rule, at, has_rows, shared, rows);
    return;
  }
  QKV_UNROLL
  for (int i = 0; i < M::kRowTiles * 2; ++i) {
    const int row = at.row0 + i / 2 * 16 + i % 2 * 8 + at.g;
    if (has_rows && row < shared.lanes.live) write_partial(args, shared.task, row, i / 2, i % 2, at, rows);
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

// Copies run ahead in the order K0 V0 K1 V1 ... by kStages tiles of each; a group that has no tile left is empty, so
// that the number of groups to wait for is always the same.
template <class M, bool General>
QKV_DEVICE void walk(const KernelArgs& args, const ScoreRule<float>& rule, MmaShared<M>& shared, Rows<M>& rows) {
  constexpr int kPending = 2 * (M::kStages - 1);
  const Task& task = shared.task;
  const Place at = place_of_thread<M>();
  const bool values = args.problem.Dv > 0;
  for (int64_t first = task.key_first / M::kKeys; first * M::kKeys < task.key_end; first += M::kThreads) {
    const int count = list_tiles<M::kKeys>(args, task, shared.lanes, first, shared.list);
    const auto load_k = [&](int i) {
      if (i < count) load_keys<M>(args, shared, shared.list.tile[i], shared.k[i % M::kStages]);
      commit_copies();
    };
    const auto load_v = [&](int i) {
      if (values && i < count) load_values<M>(args, shared, shared.list.tile[i], shared.v[i % M::kStages]);
      commit_copies();
    };
    for (int i = 0; i < M::kStages; ++i) {
      load_k(i);
      if (i + 1 < M::kStages) load_v(i);
    }
    for (int i = 0; i < count; ++i) {
      char *k = shared.k[i % M::kStages], *v = shared.v[i % M::kStages];
      const bool partial = (shared.list.tile[i] & kPartial) != 0;
      const int64_t j0 = first_key<M::kKeys>(shared.list.tile[i]);
      wait_copies<kPending>();
      sync_block();  // K has come, and nobody reads the V that the next copy replaces
      load_v(i + M::kStages - 1);
      if (partial) look_closer(args, task, shared.lanes, j0, shared.seen);
      Scores<M> s;
      score_tile<M>(shared_address(shared.q), shared_address(k), at, shared, s);
      if constexpr (General) modify_scores<M>(args, task, rule, shared.lanes, j0, s);
      wait_copies<kPending>();
      sync_block();  // V has come, the bits stand, and nobody reads this K any more
      load_k(i + M::kStages);
      if (partial) mask_scores(at, shared.seen, s);
      float alpha[M::kRowTiles][2];
      if (raise_maximum<M>(rule.c, s, rows, alpha)) rescale<M>(alpha, rows);
      if (!partial && values) {  // in a piece: the exponentials of one row tile run beside the products of another
        weigh<M>(rule.c, s, rows);
        accumulate<M>(shared_address(v), at, s, rows);
        continue;
      }
      weigh<M>(rule.c, s, rows);
      if (!values) continue;
      const bool odd = !M::kPairs && any_in_block(!finite_tile<M>(v, thread_index(), M::kThreads));  // pairs are finite
      if (odd) take_out_odd<M>(v, shared.seen.odd, thread_index(), M::kThreads, sync_block);
      accumulate<M>(shared_address(v), at, s, rows);
      if (odd) put_back_odd(shared.seen, at, rows);
    }
  }
  commit_copies();  // of Q, where no tile was visible: a block may not end while copies are under way
  wait_copies<0>();
}

template <class M>
QKV_DEVICE void take_units(const KernelArgs& args, MmaShared<M>& shared) {
  const HalvedRange& range = range_of(args, shared.task);
  const Lanes<M::kRows>& lanes = shared.lanes;
  const int row = thread_index();
  static_assert(M::kRows <= M::kThreads);
  if (row == 0) shared.v_unit = unit_of(range.top[2]);
  if (row >= M::kRows) return;
  float unit = 0;
  if (lanes.alive[row]) {
    const int64_t at = (shared.task.batch * args.problem.Hq + lanes.head[row]) * args.problem.Sq + lanes.query[row];
    unit = args.halved.q_unit[at] * unit_of(range.top[1]);
  }
  shared.unit[row] = unit;
}

// False for a block that has nothing to do.
template <class M>
QKV_DEVICE bool begin(const KernelArgs& args, int64_t block, MmaShared<M>& shared) {
  const Problem& p = args.problem;
  if (thread_index() == 0) {
    Task& t = shared.task;
    t = task_of(args, block, M::kRows);
    const int64_t k = lead_offset(p, p.k, t.batch) + t.kv_head * p.k.h + t.seq.k_row * p.k.s;
    const int64_t v = lead_offset(p, p.v, t.batch) + t.kv_head * p.v.h + t.seq.k_row * p.v.s;
    shared.k_data = p.k.data + k * 2;
    shared.v_data = p.v.data ? p.v.data + v * 2 : nullptr;
  }
  sync_block();
  if (shared.task.first_row >= shared.task.rows || shared.task.part >= shared.task.parts) return false;
  if constexpr (M::kPairs) {
    if (is_wide(range_of(args, shared.task))) return false;
  }
  fill_lanes(args, shared.task, shared.lanes);
  if constexpr (M::kPairs) take_units(args, shared);
  load_queries<M>(args, shared.task, shared.lanes, shared.q);
  return true;
}

// --- bodies --------------------------------------------------------------------------------------------------

template <class T, int D, Height H, bool General>
struct MmaForward {
  using M = MmaTile<T, D, H>;
  using Args = KernelArgs;
  static constexpr int kThreads = M::kThreads, kBlocks = D == 64 ? 3 : 2;
  static constexpr int64_t kShared = sizeof(MmaShared<M>);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<MmaShared<M>*>(memory);
    if (!begin(args, block, shared)) return;
    const ScoreRule<float> rule = score_rule<float>(args.problem, General);
    Rows<M> rows;
    QKV_UNROLL
    for (int r = 0; r < M::kRowTiles; ++r) {
      QKV_UNROLL
      for (int i = 0; i < M::kColumnTiles * 4; ++i) rows.o[r][i / 4][i % 4] = 0;
      QKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        rows.m[r][half] = -kInf<float>;
        rows.l[r][half] = 0;
      }
    }
    walk<M, General>(args, rule, shared, rows);
    lower_rows(shared.v_unit, rows);
    if constexpr (M::kKeyWarps > 1) merge_warps<M>(rule.c, shared.k[0], rows);
    sync_block();  // nobody reads Q, K or V any more
    write_rows<M>(args, rule, place_of_thread<M>(), shared, rows);
  }
};

// p = 2^(c (s - m) - shift) factor, exactly 0 where masked; what no tile reaches is 0 already.
template <class T, int D>
struct MmaWeights {
  using M = MmaTile<T, D, Height::Many>;
  using Args = KernelArgs;
  static constexpr int kThreads = M::kThreads, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(MmaShared<M>);

  QKV_DEVICE static void write_tile(const Args& args, const Task& task, const ScoreRule<float>& rule, int64_t j0,
                                    const Lanes<M::kRows>& lanes, const Scores<M>& s) {
    const Problem& p = args.problem;
    const Place at = place_of_thread<M>();
    QKV_UNROLL
    for (int i = 0; i < M::kRowTiles * 2; ++i) {
      const int r = i / 2, half = i % 2, row = at.row0 + r * 16 + half * 8 + at.g;
      if (!lanes.alive[row]) continue;
      const int64_t id = result_index(p, task.batch, lanes.result_head[row], lanes.row[row]);
      const Normaliser<float> norm = normaliser<float>(args, id);
      QKV_UNROLL
      for (int n = 0; n < M::kKeyTiles; ++n) {
        QKV_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int64_t j = j0 + at.key0 + n * 8 + at.t * 2 + e;
          const float x = s.x[r][n][half * 2 + e];
          if (j < task.key_end) static_cast<float*>(p.weights)[id * p.Sk + j] = weight(p, norm, rule.c, x);
        }
      }
    }
  }

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<MmaShared<M>*>(memory);
    if (!begin(args, block, shared)) return;
    const Task& task = shared.task;
    const Place at = place_of_thread<M>();
    const ScoreRule<float> rule = score_rule<float>(args.problem, true);
    for (int64_t first = 0; first * M::kKeys < task.key_end; first += M::kThreads) {
      const int count = list_tiles<M::kKeys>(args, task, shared.lanes, first, shared.list);
      for (int i = 0; i < count; ++i) {
        const int64_t j0 = first_key<M::kKeys>(shared.list.tile[i]);
        load_keys<M>(args, shared, shared.list.tile[i], shared.k[0]);
        commit_copies();
        look_closer(args, task, shared.lanes, j0, shared.seen);
        wait_copies<0>();
        sync_block();
        Scores<M> s;
        score_tile<M>(shared_address(shared.q), shared_address(shared.k[0]), at, shared, s);
        modify_scores<M>(args, task, rule, shared.lanes, j0, s);
        mask_scores(at, shared.seen, s);
        write_tile(args, task, rule, j0, shared.lanes, s);
        sync_block();
      }
    }
    commit_copies();
    wait_copies<0>();
  }
};

}  // namespace qkv::inline QKV_LEVEL
