// SPDX-License-Identifier: Apache-2.0
// Statistics of the weights, in a second walk with the normaliser known: no weight leaves the block.
//
// By rows    entropy, distance, maximum and its key, the largest weights: a block has a tile of rows and all of their
//            keys; the weights of a tile of keys pass through shared memory to the one thread that owns the row.
// By keys    what a key receives from all rows: a block has a tile of keys and all rows of its heads, one after the
// other,
//            and one thread owns the key. So no sum depends on which block came first.
// Memory     O(Sq k_top + Sk); shared as additive.cuh.
#pragma once

#include "portable/results_fma.cuh"
#include "qkv/stats.h"

namespace qkv::inline QKV_LEVEL {

template <class T>
struct StatsWalk {
  using M = FmaTile<T, 64, Height::Many>;
  using Args = KernelArgs;
  using Shared = PieceShared<M>;
  static constexpr int kThreads = M::kThreads, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(Shared);
  static_assert(M::kRows <= kThreads && M::kKeys <= kThreads);

  // The weights of a tile of keys, those of unseen keys and of rows that are padding below 0.
  QKV_DEVICE static void keep_weights(const Args& args, const Task& task, const ScoreRule<T>& rule, int64_t j0,
                                      const FmaScores<M>& s, Shared& shared) {
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) {
      QKV_UNROLL
      for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
        shared.p[(thread_index() / 16 + 16 * i) * M::kLdP + thread_index() % 16 + 16 * j] = kUnseen;
      }
    }
    weigh<M, Kind::Any>(args, task, rule, shared.lanes, j0, s, [&](int row, int64_t, int key, T score, T w) {
      if (score != -kInf<T>) shared.p[row * M::kLdP + key] = w;
    });
    sync_block();
  }

  QKV_DEVICE static int64_t result_of(const Args& args, const Task& task, const Shared& shared, int row) {
    return result_index(args.problem, task.batch, shared.lanes.result_head[row], shared.lanes.row[row]);
  }

  // A key's share of the tile's rows.
  QKV_DEVICE static void receive(const Args& args, const Task& task, int64_t j0, const Shared& shared) {
    const Problem& p = args.problem;
    const int key = thread_index();
    for (int row = 0; key < M::kKeys && row < shared.lanes.live; ++row) {
      const T w = shared.p[row * M::kLdP + key];
      if (w < 0) continue;
      const int64_t head = task.batch * result_heads(p) + shared.lanes.result_head[row];
      static_cast<T*>(p.stats.received)[head * p.Sk + j0 + key] += w;
    }
  }

  QKV_DEVICE static void write(const StatsOut& out, const RowStats<T>& stats, int64_t at) {
    if (out.entropy) static_cast<T*>(out.entropy)[at] = static_cast<T>(stats.entropy);
    if (out.distance) static_cast<T*>(out.distance)[at] = static_cast<T>(stats.distance);
    if (out.max) static_cast<T*>(out.max)[at] = stats.most;
    if (out.argmax) out.argmax[at] = stats.argmax;
  }

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const StatsOut& out = args.problem.stats;
    Task task = task_of(args, block, M::kRows);
    if (task.part >= task.parts) return;
    const ScoreRule<T> rule = score_rule<T>(args.problem, true);
    const int row = thread_index();
    Loads<M, Kind::Any>::begin(args, task, shared);
    for (; task.first_row < task.rows; task.first_row += M::kRows) {
      sync_block();
      fill_lanes(args, task, shared.lanes);
      const bool owner = !args.plan.by_keys && row < M::kRows && row < shared.lanes.live;
      const int64_t at = owner ? result_of(args, task, shared, row) : 0;
      for (int64_t i = 0; owner && out.top_p && i < out.k_top; ++i) {
        static_cast<T*>(out.top_p)[at * out.k_top + i] = 0;
        out.top_j[at * out.k_top + i] = -1;
      }
      RowStats<T> stats;
      walk<M, Kind::Any>(args, task, rule, shared, [&](const FmaScores<M>& s, int64_t j0) {
        keep_weights(args, task, rule, j0, s, shared);
        if (args.plan.by_keys) receive(args, task, j0, shared);
        for (int key = 0; owner && key < M::kKeys; ++key) {
          const T w = shared.p[row * M::kLdP + key];
          if (w < 0) continue;
          stats.add(out, shared.lanes.position[row], j0 + key, w);
          if (out.top_p) insert_top(out, at, j0 + key, w);
        }
      });
      if (owner) write(out, stats, at);
      if (!args.plan.by_keys) return;
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
