// SPDX-License-Identifier: Apache-2.0
// The walk over the keys on Hopper, and what a block leaves behind: as in results_mma.cuh, whose end it shares.
#pragma once

#include "hopper/forward_wgmma.cuh"

namespace qkv::inline QKV_LEVEL {

// From scores to weights. Returns whether l and O belong to another m now: by alpha.
template <class M, bool General>
QKV_DEVICE bool weigh_tile(const KernelArgs& args, const ScoreRule<float>& rule, const Place& at, uint32_t entry,
                           WgmmaShared<M>& shared, Scores<M>& s, Rows<M>& rows, float (&alpha)[M::kRowTiles][2]) {
  const int64_t j0 = first_key<M::kKeys>(entry);
  if constexpr (General) modify_scores<M>(args, shared.task, rule, shared.lanes, j0, s);
  if (entry & kPartial) {
    look_closer<M>(args, j0, shared);
    mask_scores<M>(at, shared, s);
  }
  const bool moved = raise_maximum<M>(rule.c, s, rows, alpha);
  weigh<M>(rule.c, s, rows);
  return moved;
}

// What is not finite in a V that some row does not wholly see joins O before the product of the rest.
template <class M>
QKV_DEVICE void guard_values(const Place& at, uint32_t entry, char* v, WgmmaShared<M>& shared, Rows<M>& rows) {
  if (!(entry & kPartial)) return;
  if (!any_with_rows(!finite_tile<M>(v), shared)) return;
  take_out_odd<M>(v, shared.odd);
  show_to_products();
  M::sync();
  put_back_odd<M>(shared, at, rows);
}

template <class M>
QKV_DEVICE void pack_tile(const Scores<M>& s, Weights<M>& p) {
  QKV_UNROLL
  for (int n = 0; n < M::kKeyTiles; n += 2) pack_weights<M>(s.x[0][n], s.x[0][n + 1], p.a[n / 2], 0);
}

// One list of tiles, of which there is at least one; `before` tiles came earlier. The product of a tile's V is begun
// after that of the next K, and runs while its scores become weights.
template <class M, bool General>
QKV_DEVICE void use_tiles(const KernelArgs& args, const ScoreRule<float>& rule, int count, int64_t before,
                          WgmmaShared<M>& shared, Rows<M>& rows) {
  const Place at = place_of_thread<M>();
  const auto stage = [&](int i) { return static_cast<int>((before + i) % M::kStages); };
  const auto round = [&](int i) { return static_cast<uint32_t>((before + i) / M::kStages); };
  Scores<M> s;
  Weights<M> p;
  float alpha[M::kRowTiles][2];
  wait_phase(&shared.k_full[stage(0)], round(0));
  begin_scores(shared, shared.k[stage(0)], s);
  wait_products<0>();
  arrive(&shared.k_free[stage(0)]);
  if (weigh_tile<M, General>(args, rule, at, shared.tiles.tile[0], shared, s, rows, alpha)) rescale<M>(alpha, rows);
  pack_tile(s, p);
  for (int i = 1; i < count; ++i) {
    const int own = stage(i), last = stage(i - 1);
    wait_phase(&shared.k_full[own], round(i));
    begin_scores(shared, shared.k[own], s);
    wait_phase(&shared.v_full[last], round(i - 1));
    guard_values<M>(at, shared.tiles.tile[i - 1], shared.v[last], shared, rows);
    begin_accumulate<M>(shared.v[last], p, rows);
    wait_products<1>();
    arrive(&shared.k_free[own]);
    const bool moved = weigh_tile<M, General>(args, rule, at, shared.tiles.tile[i], shared, s, rows, alpha);
    wait_products<0>();
    arrive(&shared.v_free[last]);
    if (moved) rescale<M>(alpha, rows);
    pack_tile(s, p);
  }
  const int last = stage(count - 1);
  wait_phase(&shared.v_full[last], round(count - 1));
  guard_values<M>(at, shared.tiles.tile[count - 1], shared.v[last], shared, rows);
  begin_accumulate<M>(shared.v[last], p, rows);
  wait_products<0>();
  arrive(&shared.v_free[last]);
}

template <class T, int D, bool General>
struct WgmmaForward {
  using M = WgmmaTile<T, D>;
  using Args = KernelArgs;
  static constexpr int kThreads = M::kAll, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(WgmmaShared<M>);

  // The tiles of the keys, a stretch at a time: use(count, before).
  template <class Use>
  QKV_DEVICE static void walk(const Args& args, WgmmaShared<M>& shared, const Use& use) {
    const Task& task = shared.task;
    int64_t before = 0;
    for (int64_t first = task.key_first / M::kKeys; first * M::kKeys < task.key_end; first += M::kAll) {
      sync_block();  // the list before has been used
      const int count = list_tiles<M::kKeys>(args, task, shared.lanes, first, shared.tiles);
      if (count > 0) use(count, before);
      before += count;
    }
  }

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<WgmmaShared<M>*>(memory);
    if (thread_index() == 0) {
      for (int i = 0; i < M::kStages; ++i) {
        make_barrier(&shared.k_full[i], M::kCopiers);
        make_barrier(&shared.v_full[i], M::kCopiers);
        make_barrier(&shared.k_free[i], M::kThreads);
        make_barrier(&shared.v_free[i], M::kThreads);
      }
    }
    if (!begin<M>(args, block, shared)) return;
    commit_copies();
    wait_copies<0>();
    show_to_products();
    sync_block();  // Q has come
    if (thread_index() >= M::kThreads) {
      give_registers<M::kCopying>();
      walk(args, shared, [&](int count, int64_t before) { copy_tiles<M>(args, count, before, shared); });
    } else {
      take_registers<M::kComputing>();
      const ScoreRule<float> rule = score_rule<float>(args.problem, General);
      Rows<M> rows;
      QKV_UNROLL
      for (int i = 0; i < M::kColumnTiles * 4; ++i) rows.o[0][i / 4][i % 4] = 0;
      QKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        rows.m[0][half] = -kInf<float>;
        rows.l[0][half] = 0;
      }
      walk(args, shared,
           [&](int count, int64_t before) { use_tiles<M, General>(args, rule, count, before, shared, rows); });
      lower_rows(shared, rows);
      M::sync();  // nobody reads Q, K or V any more
      write_rows<M>(args, rule, place_of_thread<M>(), shared, rows);
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
