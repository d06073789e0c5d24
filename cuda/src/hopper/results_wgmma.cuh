// SPDX-License-Identifier: Apache-2.0
// The walk over the keys on Hopper, and what a task leaves behind: as in results_mma.cuh, whose end it shares.
#pragma once

#include "hopper/forward_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// From scores to weights. Returns whether l and O belong to another m now: by alpha.
template <class M, bool General>
QKV_DEVICE bool weigh_tile(const KernelArgs& args, const ScoreRule<float>& rule, const TaskPlace<M>& place,
                           const Place& at, uint32_t entry, Seen<M>& seen, Scores<M>& s, Rows<M>& rows,
                           float (&alpha)[M::kRowTiles][2]) {
  const int64_t j0 = first_key<M::kKeys>(entry);
  if constexpr (General) modify_scores<M>(args, place.task, rule, place.lanes, j0, s);
  if (entry & kPartial) {
    M::sync();  // the bits of the tile before have been used
    look_closer(args, place.task, place.lanes, j0, seen);
    M::sync();
    mask_scores(at, seen, s);
  }
  const bool moved = raise_maximum<M>(rule.c, s, rows, alpha);
  weigh<M>(rule.c, s, rows);
  return moved;
}

// Does some thread of the warpgroups with rows say so?
template <class M>
QKV_DEVICE bool any_with_rows(bool x, uint32_t& vote) {
  M::sync();
  if (thread_index() == 0) vote = 0;
  M::sync();
  if (x) atomic_or(&vote, 1);
  M::sync();
  return vote != 0;
}

// What is not finite in a V that some row does not wholly see joins O before the product of the rest.
template <class M>
QKV_DEVICE void guard_values(const Place& at, char* v, WgmmaShared<M>& shared, Rows<M>& rows) {
  if (!any_with_rows<M>(!finite_tile<M>(v), shared.vote)) return;
  take_out_odd<M>(v, shared.seen.odd);
  show_to_products();
  M::sync();
  put_back_odd(shared.seen, at, rows);
}

template <class M>
QKV_DEVICE void pack_tile(const Scores<M>& s, Weights<M>& p) {
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles; n += 2) pack_weights<M>(s.x[0][n], s.x[0][n + 1], p.a[n / 2], 0);
}

template <class M>
QKV_DEVICE void clear(Rows<M>& rows) {
  QKV_UNROLL
  for (int i = 0; i < M::kColumnTiles * 4; ++i) rows.o[0][i / 4][i % 4] = 0;
  QKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    rows.m[0][half] = -kInf<float>;
    rows.l[0][half] = 0;
  }
}

// What the rows of a warp leave behind: out by way of the shared memory that held their Q.
template <class M>
QKV_DEVICE void leave_rows(const KernelArgs& args, const ScoreRule<float>& rule, const TaskPlace<M>& place, Place at,
                           char* memory, Rows<M>& rows) {
  using T = typename M::Out;
  constexpr int kChunks = M::kD / 8, kAtOnce = 4;
  const Problem& p = args.problem;
  const Lanes<M::kRows>& lanes = place.lanes;
  at = {unknown(at.g), unknown(at.t), unknown(at.row0), at.key0};  // else 32 addresses wait in memory for this
  lower_rows(1.0f, rows);
  add_lanes(rows);
  M::sync_group();  // nobody reads Q any more
  QKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = at.row0 + half * 8 + at.g;
    if (row >= lanes.live) continue;
    if (args.plan.parts > 1) {
      write_partial(args, place.task, row, 0, half, at, rows);
      continue;
    }
    const RowId id{place.task.batch, lanes.row[row],         lanes.query[row],
                   lanes.head[row],  lanes.result_head[row], lanes.alive[row]};
    const RowOut<float> end = finish_row(args, rule, place.task.seq, id, rows.m[0][half], rows.l[0][half], at.t == 0);
    QKV_UNROLL
    for (int d = 0; d < M::kColumnTiles; ++d) {
      const float* o = rows.o[0][d] + half * 2;
      const float x = end.empty ? 0.0f : o[0] * end.factor, y = end.empty ? 0.0f : o[1] * end.factor;
      *reinterpret_cast<uint32_t*>(memory + chunk_offset<M>(row, d) + at.t * 4) = pack<typename M::T>(x, y);
    }
  }
  if (args.plan.parts > 1 || !p.out.data) return;
  sync_warp();
  const bool chunks = args.plan.async_out && p.Dv % 8 == 0;
  QKV_ROLLED
  for (int first = at.g * 4 + at.t; first < 16 * kChunks; first += 32 * kAtOnce) {
    Chunk<T> x[kAtOnce];
    char* to[kAtOnce];
    QKV_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n * 32, row = at.row0 + i / kChunks;
      x[n] = *reinterpret_cast<const Chunk<T>*>(memory + chunk_offset<M>(row, i % kChunks));
      to[n] = place.out[row];
    }
    QKV_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n * 32, column = i % kChunks * 8;
      if (!to[n] || column >= p.Dv) continue;
      if (chunks) *reinterpret_cast<Chunk<T>*>(to[n] + column * 2) = x[n];
      if (chunks) continue;
      const auto* const from = reinterpret_cast<const T*>(memory + chunk_offset<M>(at.row0 + i / kChunks, i % kChunks));
      QKV_ROLLED
      for (int e = 0; e < 8 && column + e < p.Dv; ++e) reinterpret_cast<T*>(to[n])[(column + e) * p.out.d] = from[e];
    }
  }
}

// All tasks of a block. The product of a tile's V is begun after that of the next K, and runs while its scores become
// weights.
template <class M, bool General>
QKV_DEVICE void use_tiles(const KernelArgs& args, WgmmaShared<M>& shared) {
  const int group = shuffle_from(M::group(), 0);  // the same in all lanes, which the compiler cannot know
  const Place at = place_of_thread<M>();
  const ScoreRule<float> rule = score_rule<float>(args.problem, General);
  const auto q = [&](uint32_t task) {
    return rows_of(shared_address(shared.q[task % M::kQueries]) + group * 64 * 128);
  };
  const auto k = [&](uint32_t tile) { return rows_of(shared_address(shared.k[tile % M::kStages])); };
  const auto v = [&](uint32_t tile) { return columns_of(shared_address(shared.v[tile % M::kStages]), M::kKeys * 128); };
  Rows<M> rows;
  Scores<M> s;
  Weights<M> p;
  float alpha[M::kRowTiles][2];
  uint32_t tile = 0, task = 0, entry = 0;  // the next tile and task; the last tile's entry
  bool begins = true, under_way = false;   // a task; a tile whose weights are there
  for (uint32_t turn = 0;; ++turn) {
    wait_full(shared.stretch_full, turn);
    const Stretch<M>& stretch = shared.stretch[turn % 2];
    if (stretch.stop) break;
    const TaskPlace<M>& place = shared.place[task % 2];
    const auto guard = [&] {
      if (!(entry & kPartial)) return;
      wait_operand(shared.v_full, tile - 1);
      guard_values<M>(at, shared.v[(tile - 1) % M::kStages], shared, rows);
    };
    if (begins) {
      clear(rows);
      wait_operand(shared.q_full, task);
      begins = false;
    }
    int i = 0;
    if (!under_way && stretch.count > 0) {  // apart: products behind a condition would wait for each other
      entry = stretch.tiles.tile[0];
      wait_operand(shared.k_full, tile);
      begin_scores(q(task), k(tile), s);
      wait_products<0>();
      arrive(shared.k_free, tile);
      if (weigh_tile<M, General>(args, rule, place, at, entry, shared.seen, s, rows, alpha)) rescale<M>(alpha, rows);
      pack_tile(s, p);
      under_way = true;
      ++tile;
      ++i;
    }
    for (; i < stretch.count; ++i, ++tile) {
      guard();
      entry = stretch.tiles.tile[i];
      wait_operand(shared.k_full, tile);
      take_turn<M>(group);
      begin_scores(q(task), k(tile), s);
      wait_operand(shared.v_full, tile - 1);
      begin_accumulate(v(tile - 1), p, rows);
      pass_turn<M>(group);
      wait_products<1>();
      arrive(shared.k_free, tile);
      const bool moved = weigh_tile<M, General>(args, rule, place, at, entry, shared.seen, s, rows, alpha);
      wait_products<0>();
      arrive(shared.v_free, tile - 1);
      if (moved) rescale<M>(alpha, rows);
      pack_tile(s, p);
    }
    if (stretch.last) {
      if (under_way) {
        guard();
        wait_operand(shared.v_full, tile - 1);
        begin_accumulate(v(tile - 1), p, rows);
        wait_products<0>();
        arrive(shared.v_free, tile - 1);
      }
      leave_rows(args, rule, place, at, shared.q[task % M::kQueries], rows);
      arrive(shared.q_free, task++);
      begins = true;
      under_way = false;
    }
    arrive(shared.stretch_free, turn);
  }
}

template <class T, int D, bool General>
struct WgmmaForward {
  using M = WgmmaTile<T, D>;
  using Args = KernelArgs;
  static constexpr int kThreads = M::kAll, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(WgmmaShared<M>);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<WgmmaShared<M>*>(memory);
    if (thread_index() == 0) make_barriers(shared);
    sync_block();
    if (thread_index() >= M::kThreads) {
      give_registers<M::kCopying>();
      const int warp = (thread_index() - M::kThreads) / 32;
      if (warp == 0) plan_tasks(args, block, shared);
      else if constexpr (M::kHalves) copy_halves(args, warp - 1, shared);
      else if (warp == 1) copy_tiles<M, true>(args, 0, shared);
      else copy_tiles<M, false>(args, (warp - 2) * (M::kKeys / 2), shared);
      commit_copies();
      wait_copies<0>();  // a block may not end while copies are under way
    } else {
      take_registers<M::kComputing>();
      if (M::group() == M::kGroups - 1) pass_turn<M>(M::kGroups - 1);  // the first begins
      use_tiles<M, General>(args, shared);
      if (M::group() == 0) take_turn<M>(0);  // the last has passed it on
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
