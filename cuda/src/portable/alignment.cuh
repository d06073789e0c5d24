// SPDX-License-Identifier: Apache-2.0
// Monotonic alignments: the recurrences of qkv/alignment.h (cpp/src/cpu/alignment-inl.h has the formula), in the same
// order as on the CPU.
//
// Walk       a block per head, a thread per row: row i is at key t - i in turn t, when row i - 1 has just left it and
// hands
//            over its alignment with it. So rows follow each other and run at once, and every sum has one order.
// Chunks     of a width: a thread per key, once for what each stop k gives its chunk, once for what each key j gets.
// From
//            the first key on: a thread per row, which goes up and down the keys.
// Memory     (heads, rows, keys) twice, where there are chunks; shared 8 bytes for each thread, twice.
#pragma once

#include "plan.h"
#include "portable/scores.cuh"

namespace qkv::inline QKV_LEVEL {

// --- stops ---------------------------------------------------------------------------------------------------

template <class A>
struct Stop {  // p and 1 - p of a score; NaN for NaN and +inf
  A stop, pass;
};

template <class A>
QKV_DEVICE A exponential(A u, A top) {
  return power_of_two((u - top) * static_cast<A>(kLog2e));
}

template <class A>
QKV_DEVICE Stop<A> stop_of(bool hard, A e) {
  const A odd = e == -kInf<A> ? static_cast<A>(0) : e - e;
  A small = 0, large = 1;  // of p and 1 - p
  if (!hard) {
    const A t = exponential<A>(e < 0 ? e : -e, 0);
    large = 1 / (1 + t);
    small = t * large;
  }
  if (e > 0) return {large + odd, small + odd};
  return {small + odd, large + odd};
}

template <class A>
struct AlignWalk {
  using Args = AlignArgs;
  static constexpr int kThreads = 64, kBlocks = 1;
  static constexpr int64_t kShared = 2 * kThreads * sizeof(double);

  QKV_DEVICE static void run(const Args& args, int64_t head, char* memory) {
    const Alignment& x = args.problem;
    auto* const handed = reinterpret_cast<double*>(memory);  // (2, kThreads), by turns
    const int thread = thread_index();
    double* const state = x.state + head * x.keys;
    for (int64_t first = 0; first < x.rows; first += kThreads) {
      const int64_t i = first + thread;
      const bool last = thread == kThreads - 1 || i + 1 == x.rows;
      A* const row = static_cast<A*>(x.energy) + (head * x.rows + i) * x.keys;
      Walk<A> walk;
      for (int64_t turn = 0; turn < x.keys + kThreads - 1; ++turn) {
        const int64_t j = turn - thread;
        const int now = static_cast<int>(turn % 2) * kThreads, before = kThreads - now;
        if (i < x.rows && j >= 0 && j < x.keys) {
          double share = thread == 0 ? state[j] : handed[before + thread - 1];
          const Stop<A> p = stop_of(x.hard, row[j]);
          row[j] = walk.step(share, p.stop, p.pass);
          if (last) state[j] = share;
          else handed[now + thread] = share;
        }
        sync_block();
      }
    }
  }
};

// --- chunks --------------------------------------------------------------------------------------------------

template <class A>
struct Chunks {  // of row `row` of all heads
  const Alignment& x;
  A *u, *top, *share;
  const A* alignment;

  QKV_DEVICE Chunks(const AlignArgs& args, int64_t row)
      : x(args.problem),
        u(static_cast<A*>(x.chunk) + row * x.keys),
        top(static_cast<A*>(args.top) + row * x.keys),
        share(static_cast<A*>(args.share) + row * x.keys),
        alignment(static_cast<const A*>(x.energy) + row * x.keys) {}
};

constexpr int kChunkThreads = 128;

// What the stop at key k gives each key of its chunk: a_k / sum of e^(u - top).
template <class A>
struct AlignShares {
  using Args = AlignArgs;
  static constexpr int kThreads = kChunkThreads, kBlocks = 1;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const int64_t at = block * kThreads + thread_index(), keys = args.problem.keys, k = at % keys;
    if (at >= args.problem.heads * args.problem.rows * keys) return;
    const Chunks<A> c(args, at / keys);
    A most = kLowest<A>, sum = 0;
    for (int64_t d = 0; d < c.x.width && d <= k; ++d) most = larger(most, c.u[k - d]);
    for (int64_t d = 0; d < c.x.width && d <= k; ++d) sum += exponential(c.u[k - d], most);
    c.top[k] = most;
    c.share[k] = c.alignment[k] == 0 ? static_cast<A>(0) : c.alignment[k] / sum;
  }
};

// What key j gets from the stops whose chunk holds it.
template <class A>
struct AlignWeights {
  using Args = AlignArgs;
  static constexpr int kThreads = kChunkThreads, kBlocks = 1;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const int64_t at = block * kThreads + thread_index(), keys = args.problem.keys, j = at % keys;
    if (at >= args.problem.heads * args.problem.rows * keys) return;
    const Chunks<A> c(args, at / keys);
    A sum = 0;
    for (int64_t k = j; k < keys && k < j + c.x.width; ++k) {
      if (c.share[k] != 0) sum += exponential(c.u[j], c.top[k]) * c.share[k];
    }
    c.u[j] = sum;
  }
};

template <class A>
struct AlignPasts {
  using Args = AlignArgs;
  static constexpr int kThreads = kChunkThreads, kBlocks = 1;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const int64_t row = block * kThreads + thread_index(), keys = args.problem.keys;
    if (row >= args.problem.heads * args.problem.rows) return;
    const Chunks<A> c(args, row);
    A most = kLowest<A>;
    PastSum<A> past;
    for (int64_t k = 0; k < keys; ++k) {
      const A before = most;
      most = c.u[k] > most ? c.u[k] : most;
      c.u[k] = exponential(c.u[k], most);
      c.top[k] = exponential<A>(before - most, 0);
      c.share[k] = past.step(c.alignment[k], c.u[k], c.top[k]);
    }
    PastTail<A> rest;
    for (int64_t k = keys - 1; k >= 0; --k) c.u[k] = rest.step(c.share[k], c.u[k], c.top[k]);
  }
};

}  // namespace qkv::inline QKV_LEVEL
