// SPDX-License-Identifier: Apache-2.0
// The walk over the keys, and what a block leaves behind: out and lse, or its part of them; in a second walk with the
// normaliser known, the weights.
#pragma once

#include "portable/additive.cuh"
#include "portable/focus.cuh"
#include "portable/halves.cuh"

namespace qkv::inline QKV_LEVEL {

// --- write ---------------------------------------------------------------------------------------------------

template <class M>
QKV_DEVICE void write_rows(const KernelArgs& args, const Task& task, const ScoreRule<typename M::A>& rule,
                           FmaShared<M>& shared, FmaRows<M>& rows) {
  using A = typename M::A;
  static_assert(M::kRows * (2 * sizeof(A) + sizeof(RowOut<A>)) <= sizeof(FmaShared<M>::p));
  const Problem& p = args.problem;
  const Plan& plan = args.plan;
  const int x = thread_index() % 16;
  RowEnds<A> ends(reinterpret_cast<char*>(shared.p), M::kRows);  // which nobody reads any more
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    const int row = thread_index() / 16 + 16 * i;
    A& l = rows.l[i];
    for (int other = 1; other < 16; other *= 2) l += shuffle_xor(l, other);
    if (x > 0) continue;
    ends.m[row] = rows.m[i];
    ends.l[row] = l;
  }
  if (plan.parts == 1) finish_rows<A, M::kThreads>(args, task, rule, shared.lanes, ends);
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    const int row = thread_index() / 16 + 16 * i;
    if (row >= shared.lanes.live) continue;
    A* partial = nullptr;
    RowOut<A> end{0, 1, false};
    if (plan.parts > 1) {
      const int64_t id = (task.batch * plan.groups + task.group) * plan.rows + task.first_row + row;
      partial = static_cast<A*>(plan.partial) + (id * plan.parts + task.part) * (p.Dv + 2);
      if (x == 0) {
        partial[0] = rows.m[i];
        partial[1] = rows.l[i];
      }
    } else {
      if (!p.out.data) return;
      end = ends.out[row];
    }
    QKV_UNROLL
    for (int d = 0; d < M::kColumns; ++d) {
      const int64_t column = d / M::kPack * M::kPack * 16 + x * M::kPack + d % M::kPack;
      if (column >= p.Dv) continue;
      if (partial) partial[2 + column] = rows.o[i][d];
      else store_element(p, end.at + column * p.out.d, end.empty ? static_cast<A>(0) : rows.o[i][d] * end.factor);
    }
  }
}

// --- the loop ------------------------------------------------------------------------------------------------

enum class Kind {
  Plain,    // q . k as it is
  General,  // with softcap, bias, ALiBi
  Any,      // that, q, k and v of any dtype, D without a limit, additive scores and a focus
};

template <class M, Kind K>
struct Loads {  // how a tile's scores and values come about
  using Shared = FmaShared<M>;
  QKV_DEVICE static void begin(const KernelArgs& args, const Task& task, Shared& shared) {
    load_queries<M>(args, task, shared);
  }
  QKV_DEVICE static void scores(const KernelArgs& args, const Task& task, int64_t j0, Shared& shared, FmaScores<M>& s) {
    load_tile<M>(args, task, args.problem.k, args.problem.D, j0, shared);
    sync_block();
    clear(s);
    score_tile<M>(M::kD, shared, s);
  }
  QKV_DEVICE static void values(const KernelArgs& args, const Task& task, int64_t j0, Shared& shared) {
    load_tile<M>(args, task, args.problem.v, args.problem.Dv, j0, shared);
  }
};

template <class M>
struct Loads<M, Kind::Any> {
  using Shared = PieceShared<M>;
  QKV_DEVICE static void begin(const KernelArgs& args, const Task&, Shared& shared) {
    if constexpr (kExponentials<typename M::A>) {
      if (args.problem.score == Score::additive) find_unit(args.problem, shared);
    }
  }
  QKV_DEVICE static void scores(const KernelArgs& args, const Task& task, int64_t j0, Shared& shared, FmaScores<M>& s) {
    score_pieces<M>(args, task, j0, shared, s);
  }
  QKV_DEVICE static void values(const KernelArgs& args, const Task& task, int64_t j0, Shared& shared) {
    const Problem& p = args.problem;
    const int64_t first = lead_offset(p, p.v, task.batch) + task.kv_head * p.v.h + task.seq.k_row * p.v.s;
    const auto row_of = [&](int key) -> const char* {
      if (j0 + key >= task.key_end) return nullptr;
      return p.v.data + (first + (j0 + key) * p.v.s) * itemsize(p.v.dtype);
    };
    load_piece<M>(M::kKeys, p.v, {0, static_cast<int>(p.Dv)}, row_of,
                  [&](int row, int d, typename M::A x) { shared.kv[row * M::kLd + d] = x; });
  }
};

// The Gaussian of a focus, on what this thread wrote. Unseen keys stay below 0.
template <class M>
QKV_DEVICE void focus_weights(const KernelArgs& args, const Task& task, const Lanes<M::kRows>& lanes, int64_t j0,
                              typename M::A* p) {
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    const int row = thread_index() / 16 + 16 * i;
    if (!lanes.alive[row]) continue;
    const auto near = focus_terms<typename M::A>(args.problem, task, lanes, row, j0);
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const int key = thread_index() % 16 + 16 * j;
      auto& x = p[row * M::kLdP + key];
      if (!(x <= 0)) x *= focus_factor(near, key);
    }
  }
}

template <class M, Kind K, class Visit>
QKV_DEVICE void walk(const KernelArgs& args, const Task& task, const ScoreRule<typename M::A>& rule,
                     typename Loads<M, K>::Shared& shared, const Visit& visit) {
  const bool focused = K == Kind::Any && args.problem.focus.centre.data;
  if constexpr (K == Kind::Any) {
    if (focused) find_focus(args.problem, task, shared.lanes, shared.focus);
  }
  for (int64_t first = task.key_first / M::kKeys; first * M::kKeys < task.key_end; first += M::kThreads) {
    const int count = list_tiles<M::kKeys>(args, task, shared.lanes, first, shared.list);
    for (int i = 0; i < count; ++i) {
      const uint32_t tile = shared.list.tile[i];
      const int64_t j0 = (tile & ~kPartial) * int64_t{M::kKeys};
      const bool partial = (tile & kPartial) || focused;
      if constexpr (K == Kind::Any) {
        if (focused && (j0 > shared.focus.last || j0 + M::kKeys <= shared.focus.first)) continue;
      }
      if (partial) look<M::kKeys>(args, task, shared.lanes, j0, shared.bits, thread_index(), M::kThreads);
      if constexpr (K == Kind::Any) {
        if (focused) look_at_focus<M::kKeys, M::kThreads>(args.problem, task, shared.lanes, j0, shared.bits);
      }
      FmaScores<M> s;
      Loads<M, K>::scores(args, task, j0, shared, s);
      if constexpr (K != Kind::Plain) modify_scores<M>(args, task, rule, shared.lanes, j0, s);
      if (partial) mask_scores<M>(shared.bits, s);
      sync_block();  // nobody reads K any more
      visit(s, j0);
      sync_block();
    }
  }
}

// The task of a block; all threads call it.
template <class Shared>
QKV_DEVICE const Task& begin_task(const KernelArgs& args, int64_t block, int rows, Shared& shared) {
  if (thread_index() == 0) shared.task = task_of(args, block, rows);
  sync_block();
  return shared.task;
}

// --- bodies --------------------------------------------------------------------------------------------------

template <class T, int D, Height H, Kind K>
struct FmaForward {
  using M = FmaTile<T, D, H>;
  using Args = KernelArgs;
  using Shared = typename Loads<M, K>::Shared;
  static constexpr int kThreads = M::kThreads, kBlocks = 2;
  static constexpr int64_t kShared = sizeof(Shared);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const Problem& p = args.problem;
    const Task& task = begin_task(args, block, M::kRows, shared);
    if (task.first_row >= task.rows || task.part >= task.parts) return;
    if (args.halved.range && !is_wide(range_of(args, task))) return;
    fill_lanes(args, task, shared.lanes);
    Loads<M, K>::begin(args, task, shared);
    const ScoreRule<T> rule = score_rule<T>(p, K != Kind::Plain);
    FmaRows<M> rows;
    QKV_UNROLL
    for (int i = 0; i < M::kRowsOf; ++i) {
      rows.m[i] = -kInf<T>;
      rows.l[i] = 0;
      QKV_UNROLL
      for (int d = 0; d < M::kColumns; ++d) rows.o[i][d] = 0;
    }
    walk<M, K>(args, task, rule, shared, [&](const FmaScores<M>& s, int64_t j0) {
      softmax<M>(rule.c, s, rows, shared.p);
      if constexpr (K == Kind::Any) {
        if (p.focus.centre.data) focus_weights<M>(args, task, shared.lanes, j0, shared.p);
      }
      if (p.Dv == 0) return;
      Loads<M, K>::values(args, task, j0, shared);
      sync_block();
      accumulate<M>(shared, rows);
    });
    write_rows<M>(args, task, rule, shared, rows);
  }
};

// Of each score its weight, exactly 0 where masked: visit(row, its result, key of the tile, score, weight).
template <class M, Kind K, class Visit>
QKV_DEVICE void weigh(const KernelArgs& args, const Task& task, const ScoreRule<typename M::A>& rule,
                      const Lanes<M::kRows>& lanes, int64_t j0, const FmaScores<M>& s, const Visit& visit) {
  using A = typename M::A;
  const Problem& p = args.problem;
  QKV_UNROLL
  for (int i = 0; i < M::kRowsOf; ++i) {
    const int row = thread_index() / 16 + 16 * i;
    if (!lanes.alive[row]) continue;
    const int64_t id = result_index(p, task.batch, lanes.result_head[row], lanes.row[row]);
    const Normaliser<A> norm = normaliser<A>(args, id);
    const bool focused = K == Kind::Any && p.focus.centre.data;
    const FocusTerms<A> near = focused ? focus_terms<A>(p, task, lanes, row, j0) : FocusTerms<A>{};
    QKV_UNROLL
    for (int j = 0; j < FmaScores<M>::kPerThread; ++j) {
      const int key = thread_index() % 16 + 16 * j;
      A x = weight(p, norm, rule.c, s.x[i][j]);
      if (focused && x != 0) x *= focus_factor(near, key);
      if (j0 + key < task.key_end) visit(row, id, key, s.x[i][j], x);
    }
  }
}

// Weights, where they are asked for; what no tile reaches is 0 already.
template <class T, int D, Kind K>
struct FmaWeights {
  using M = FmaTile<T, D, Height::Many>;
  using Args = KernelArgs;
  using Shared = typename Loads<M, K>::Shared;
  static constexpr int kThreads = M::kThreads, kBlocks = 1;
  static constexpr int64_t kShared = sizeof(Shared);

  QKV_DEVICE static void run(const Args& args, int64_t block, char* memory) {
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const Problem& p = args.problem;
    const Task& task = begin_task(args, block, M::kRows, shared);
    if (task.first_row >= task.rows) return;
    fill_lanes(args, task, shared.lanes);
    Loads<M, K>::begin(args, task, shared);
    const ScoreRule<T> rule = score_rule<T>(p, true);
    walk<M, K>(args, task, rule, shared, [&](const FmaScores<M>& s, int64_t j0) {
      weigh<M, K>(args, task, rule, shared.lanes, j0, s,
                  [&](int, int64_t id, int key, T, T x) { static_cast<T*>(p.weights)[id * p.Sk + j0 + key] = x; });
    });
  }
};

}  // namespace qkv::inline QKV_LEVEL
