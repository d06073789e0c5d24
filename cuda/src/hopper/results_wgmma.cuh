// SPDX-License-Identifier: Apache-2.0
// The walk over the keys on Hopper, and what a task leaves behind: as in results_mma.cuh, whose end it shares.
#pragma once

#include "hopper/forward_wgmma.cuh"
#include "hopper/guard_wgmma.cuh"
#include "hopper/plan_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// The mask where it is a band: which keys a row sees is known.
template <class M>
QKV_DEVICE void mask_band(const Plan& plan, const TaskPlace<M>& place, const Place& at, int64_t j0, Scores<M>& s) {
  QKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    const KeyRange keys = seen_keys(plan, place, at.row0 + half * 8 + at.g);
    const int low = within(keys.low - j0, M::kKeys), end = within(keys.high + 1 - j0, M::kKeys);
    const bool from_within = any_in_warp(low > 0);
    const auto key = [&](int i) { return i / 2 * 8 + i % 2; };  // counted from this thread's first
    QKV_UNROLL
    for (int i = 0; i < M::kKeyTiles * 2; ++i) {
      float& x = s.x[0][i / 2][half * 2 + i % 2];
      x = key(i) < end - at.t * 2 ? x : -kInf<float>;
    }
    if (!from_within) continue;
    QKV_UNROLL
    for (int i = 0; i < M::kKeyTiles * 2; ++i) {
      float& x = s.x[0][i / 2][half * 2 + i % 2];
      x = key(i) >= low - at.t * 2 ? x : -kInf<float>;
    }
  }
}

// Scores as they are to be, and the maximum of their rows. Returns whether l and O belong to another m now: by alpha.
template <class M>
QKV_DEVICE bool finish_scores(const HopperArgs& args, const ScoreRule<float>& rule, const TaskPlace<M>& place,
                              const Place& at, uint32_t entry, uint32_t (&bits)[M::kRows][mask_words(M::kKeys)],
                              Scores<M>& s, Rows<M>& rows, float (&alpha)[M::kRowTiles][2]) {
  const int64_t j0 = first_key<M::kKeys>(entry);
  if constexpr (M::kGeneral) {
    if (args.modifies) modify_scores<M>(args, place.task, rule, place.lanes, j0, s);
    if (entry & kPartial) {
      M::sync();  // the bits of the tile before have been used
      look<M::kKeys>(args, place.task, place.lanes, j0, bits, thread_index(), M::kThreads);
      M::sync();
      mask_scores<M>(at, bits, [](int, int, uint32_t) {}, s);
    }
  } else {
    if (entry & kPartial) mask_band(args.plan, place, at, j0, s);
  }
  return raise_maximum<M>(rule.c, s, rows, alpha);
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

// The rows of a warp from shared memory to out, where the copy engine does not.
template <class M>
QKV_DEVICE void write_out(const KernelArgs& args, const TaskPlace<M>& place, const Place& at, const char* memory) {
  using T = typename M::Out;
  constexpr int kChunks = M::kD / 8;
  const Problem& p = args.problem;
  const int64_t lead = lead_offset(p, p.out, place.task.batch) + place.task.seq.q_row * p.out.s;
  const bool chunks = args.plan.async_out && p.Dv % 8 == 0;
  sync_warp();
  QKV_ROLLED
  for (int i = at.g * 4 + at.t; i < 16 * kChunks; i += 32) {
    const int row = at.row0 + i / kChunks, column = i % kChunks * 8;
    if (row >= place.lanes.live || column >= p.Dv) continue;
    const RowId id = row_id(place, row);
    const int64_t to = lead + id.result_head * p.out.h + id.row * p.out.s;
    auto* const out = reinterpret_cast<T*>(p.out.data) + to;
    const auto x = *reinterpret_cast<const Chunk<T>*>(memory + chunk_offset<M>(row, i % kChunks));
    if (chunks) *reinterpret_cast<Chunk<T>*>(out + column) = x;
    QKV_UNROLL
    for (int e = 0; e < 8 && !chunks; ++e) {
      if (column + e < p.Dv) out[(column + e) * p.out.d] = x.x[e];
    }
  }
}

// What was not finite joins the rows that saw it.
template <class M>
QKV_DEVICE void add_odd_sums(const OddSums<M>* odd_sums, const Place& at, Rows<M>& rows) {
  constexpr float inf = kInf<float>;
  QKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    QKV_UNROLL
    for (int i = 0; i < M::kColumnTiles * 2; ++i) {
      const uint32_t sums = odd_sums[at.row0 + half * 8 + at.g][i / 4] >> (i / 2 % 2 * 16 + at.t * 4 + i % 2 * 2);
      float& o = rows.o[0][i / 2][half * 2 + i % 2];
      if (sums & 1) o += inf;
      if (sums & 2) o -= inf;
    }
  }
}

// What the rows of a warp leave behind; out by way of the shared memory that held their Q.
template <class M>
QKV_DEVICE void leave_rows(const HopperArgs& args, const ScoreRule<float>& rule, const TaskPlace<M>& place, Place at,
                           const OddSums<M>* odd_sums, char* memory, Rows<M>& rows) {
  at = {unknown(at.g), unknown(at.t), unknown(at.row0), at.key0};  // else 32 addresses wait in memory for this
  lower_rows(1.0f, rows);
  add_lanes(rows);
  if (odd_sums) add_odd_sums(odd_sums, at, rows);
  const auto row_of = [&](int half) { return at.row0 + half * 8 + at.g; };
  if (args.plan.parts > 1) {
    QKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (row_of(half) < place.lanes.live) write_partial(args, place.task, row_of(half), 0, half, at, rows);
    }
    return;
  }
  const Problem& p = args.problem;
  const bool plain = !p.lse && !p.sinks && !p.gate.data && !args.plan.normaliser;  // for most there is less to do
  RowOut<float> end[2];
  QKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    const RowId id = row_id(place, row_of(half));
    const float l = rows.l[0][half], factor = l == 0 || !id.alive ? 0.0f : 1 / l;
    end[half] = {0, factor, factor == 0};
    if (!plain && row_of(half) < place.lanes.live) {
      end[half] = finish_row(args, rule, place.task.seq, id, rows.m[0][half], rows.l[0][half], at.t == 0);
    }
  }
  if (!p.out.data) return;
  M::sync_group();  // nobody reads Q any more
  const int lane = at.g * 4 + at.t, own_row = at.row0 + lane % 16;
  QKV_UNROLL
  for (int d = 0; d < M::kColumnTiles; d += 2) {
    uint32_t x[4];  // of 8 x 8 each: both halves of d, then of d + 1
    QKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* const o = rows.o[0][d + i / 2] + i % 2 * 2;
      const float factor = end[i % 2].factor;
      x[i] = end[i % 2].empty ? 0 : pack<typename M::T>(o[0] * factor, o[1] * factor);
    }
    store_matrices(shared_address(memory + chunk_offset<M>(own_row, d + lane / 16)), x);
  }
  const int group = at.row0 / 64;
  if (!place.boxed[group]) write_out(args, place, at, memory);
  show_to_products();  // to the copy engine, which stores it, or brings the next Q there
  M::sync_group();
  if (place.boxed[group] && thread_index() % 128 == 0) {
    BoxPlace to = place.out[group];
    QKV_UNROLL
    for (int block = 0; block < M::kD / 64; ++block, to.column += 64) {
      if (to.column < p.Dv) store_box(memory + block * (M::kRows * 128) + group * 64 * 128, args.out.map, to);
    }
    commit_boxes();
  }
  sync_warp();
}

// All tasks of a block. The product of a tile's V is begun with that of the next K, and runs while its scores become
// weights. So it is from task to task: rows are left beside the first product of the next.
template <class M>
QKV_DEVICE void use_tiles(const HopperArgs& args, WgmmaShared<M>& shared) {
  constexpr bool kEarly = M::kQueries > 1;        // the next Q has come before a task leaves its rows where its own was
  const int group = shuffle_from(M::group(), 0);  // the same in all lanes, which the compiler cannot know
  const Place at = place_of_thread<M>();
  const ScoreRule<float> rule = score_rule<float>(args.problem, M::kGeneral && args.modifies);
  const auto q = [&](uint32_t task) {
    return rows_of(shared_address(shared.q[task % M::kQueries]) + group * 64 * 128);
  };
  const auto k = [&](uint32_t tile) { return rows_of(shared_address(shared.k[tile % M::kStages])); };
  const auto v = [&](uint32_t tile) { return columns_of(shared_address(shared.v[tile % M::kStages]), M::kKeys * 128); };
  const auto stretch = [&](uint32_t turn) -> const Stretch<M>& {
    wait_full(shared.stretch_full, turn);
    return shared.stretch[turn % M::kStretches];
  };
  Rows<M> rows;
  Scores<M> s;
  Weights<M> p;
  float alpha[M::kRowTiles][2];
  uint32_t turn = 0, tile = 0, guards = 0;  // the next; guards: tiles that are guarded
  bool partial = false;                     // the tile before
  const auto wait_values = [&] {
    wait_full(shared.v_full, tile - 1);
    if (partial) wait_full(shared.guarded, guards - 1);
  };
  const auto free_queries = [&](uint32_t task) {  // where a task has left its rows
    wait_boxes_read();                            // of this thread: most have none
    arrive_as_one(shared.q_free, task);
  };
  if (stretch(turn).stop) return;
  wait_full(shared.q_full, 0);
  wait_full(shared.k_full, 0);
  begin_scores(q(0), k(0), s);
  wait_products<0>();
  for (uint32_t task = 0;; ++task) {  // scores of its first tile are there
    const TaskPlace<M>& place = shared.place[task % M::kPlaces];
    bool guarded = false;  // some tile
    const auto finish = [&](uint32_t entry) {
      const bool moved = finish_scores(args, rule, place, at, entry, shared.bits, s, rows, alpha);
      weigh<M>(rule.c, s, rows);
      return moved;
    };
    const auto pack = [&](uint32_t entry) {
      pack_tile(s, p);
      partial = (entry & kPartial) != 0;
      guarded = guarded || partial;
      guards += partial;
      ++tile;
    };
    arrive_as_one(shared.k_free, tile);
    clear(rows);
    const uint32_t first = stretch(turn).entry(0);
    finish(first);
    pack(first);
    if (kEarly && task > 0) free_queries(task - 1);
    bool last = false;
    for (int i = 1; !last; i = 0) {
      const Stretch<M>& now = stretch(turn);
      const int count = now.count;
      for (; i < count; ++i) {
        const uint32_t entry = now.entry(i);
        wait_full(shared.k_full, tile);
        wait_values();
        take_turn<M>(group);
        begin_scores(q(task), k(tile), s);
        begin_accumulate(v(tile - 1), p, rows);
        pass_turn<M>(group);
        wait_products<1>();
        arrive_as_one(shared.k_free, tile);
        const bool moved = finish(entry);
        wait_products<0>();
        arrive_as_one(shared.v_free, tile - 1);
        if (moved) rescale<M>(alpha, rows);
        pack(entry);
      }
      last = now.last;
      arrive(shared.stretch_free, turn++);
    }
    wait_values();
    const bool stop = stretch(turn).stop;  // then the product of the next K is one of what is there, for nothing
    if (kEarly && !stop) {
      wait_full(shared.q_full, task + 1);
      wait_full(shared.k_full, tile);
    }
    begin_accumulate(v(tile - 1), p, rows);
    if constexpr (kEarly) {
      const SharedMatrix there = rows_of(shared_address(shared.v[(tile - 1) % M::kStages]));
      begin_scores(stop ? there : q(task + 1), stop ? there : k(tile), s);
    }
    wait_products<kEarly ? 1 : 0>();
    if (!stop) arrive_as_one(shared.v_free, tile - 1);
    leave_rows(args, rule, place, at, guarded && shared.odd == task + 1 ? shared.odd_sums : nullptr,
               shared.q[task % M::kQueries], rows);
    arrive(shared.place_free, task);
    if (!kEarly || stop) free_queries(task);
    if constexpr (!kEarly) {
      if (stop) return;
      wait_full(shared.q_full, task + 1);
      wait_full(shared.k_full, tile);
      begin_scores(q(task + 1), k(tile), s);
    }
    wait_products<0>();
    if (stop) return;
  }
}

template <class T, int D, bool General>
struct WgmmaForward {
  using M = WgmmaTile<T, D, General>;
  using Args = HopperArgs;
  static constexpr int kThreads = M::kAll, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(WgmmaShared<M>);
  static_assert(kShared <= 227 * 1024, "a block of a Hopper GPU may have no more");

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<WgmmaShared<M>*>(memory);
    if (thread_index() == 0) {
      make_barriers(args, shared);
      show_to_products();  // to the copy engine
    }
    sync_block();
    if (thread_index() >= M::kThreads) {
      give_registers<M::kCopying>();
      const int warp = (thread_index() - M::kThreads) / 32;
      const Problem& p = args.problem;
      const Plan& plan = args.plan;
      if (warp == 0) {
        plan_tasks(args, block, shared);
      } else if (warp == 1) {
        if (args.k.there) copy_boxes(args.k, Operand::K, shared.k, shared.k_full, shared.k_free, shared);
        else copy_chunks(args, p.k, p.D, plan.async_k, Operand::K, shared.k, shared.k_full, shared.k_free, shared);
      } else if (warp == 2) {
        if (args.v.there) copy_boxes(args.v, Operand::V, shared.v, shared.v_full, shared.v_free, shared);
        else copy_chunks(args, p.v, p.Dv, plan.async_v, Operand::V, shared.v, shared.v_full, shared.v_free, shared);
      } else {
        guard_values(args, shared);
      }
    } else {
      take_registers<M::kComputing>();
      if (M::group() == M::kGroups - 1) pass_turn<M>(M::kGroups - 1);  // the first begins
      use_tiles(args, shared);
      if (M::group() == 0) take_turn<M>(0);  // the last has passed it on
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
