// SPDX-License-Identifier: Apache-2.0
// Few rows of several heads whose rows of K and V lie next to each other, token by token (BSHD): the walk over the keys
// with the heads inside.
//
//     for each block:   for so many tokens: for each head: S^T = K Q^T      for each head: softmax
//                       for so many tokens: for each head: O += P V
//
// A head's products and sums are those of accumulate (walk-inl.h), in the same order, and so are the bits. But the
// cache is read along memory, and what comes next is asked for in that order, too, not long before it is used: with a
// block of one head after the other it would be a block of all heads, 768 KiB at 8 heads of D = 128 in float, and leave
// L2 again.
#pragma once

#include "cpu/results-inl.h"

namespace qkv::inline QKV_LEVEL {

// That heads take turns with: 128 KiB at 8 heads of D = 128 in float; half of that where L2 is half as large, too.
constexpr int kTokens = kVectorBytes == 64 ? 32 : 16;

// Are the rows of so many heads one run of memory for each key? And those of all keys?
inline bool lies_by_tokens(const View& view, int64_t columns, int64_t heads) {
  return view.d == 1 && view.h == columns && view.s >= heads * columns;
}
inline bool is_one_run(const View& view, int64_t columns, int64_t heads) {
  return lies_by_tokens(view, columns, heads) && view.s == heads * columns;
}

template <class A>
inline bool goes_by_tokens(const Problem& p, const Tile<A, 1>& tile, int64_t heads) {
  return heads > 1 && tile.few && tile.key_lanes < kLanes<A> && p.Dv > 0 && !p.heads && !p.dropout.threshold &&
         lies_by_tokens(p.k, p.D, heads) && lies_by_tokens(p.v, p.Dv, heads);
}

// What is asked for while heads take turns: rows of all of them along memory, or, where it belongs to other heads as
// well, each its own. From half a turn ahead on, where rows are asked for again, else a turn; half as far and
// twice as far took 1.1 times as long.
struct TokensAhead {
  Ahead of_head[kTaskRows / kLanes<double>];  // as many as a task has at most
  bool one_run;

  // Up to key `end`; first is the row of key j0 and the first head, `rows` those of Q in each.
  TokensAhead(const View& view, const char* first, int64_t columns, int heads, int rows, int64_t j0, int64_t end)
      : one_run(is_one_run(view, columns, heads)) {
    const int64_t size = itemsize(view.dtype), step = view.s * size;
    const bool again = asks_again(view, rows);
    const int64_t before = again ? kTokens / 2 : kTokens, left = end - j0 - before;
    View run = view;
    if (one_run) run.s = columns;
    for (int g = 0; g < (one_run ? 1 : heads); ++g) {
      const char* const next = first + before * step + g * view.h * size;
      of_head[g] = rows_ahead(run, {next, one_run ? left * heads : left}, {}, columns);
      if (again) of_head[g].again = before * step;
    }
  }
  Ahead& operator[](int head) { return of_head[one_run ? 0 : head]; }
};

// Keys j0 ... j0 + n - 1 for the heads from `head` on; of those up to `end` some are asked for. False, and nothing
// done, where a row does not see all of them.
template <class A>
inline bool accumulate_tokens(const Problem& p, int64_t batch, const Sequence& seq, int64_t j0, int n, int64_t end,
                              int64_t head, int heads, Tile<A, 1>* tile, const ScoreRule<A>& rule,
                              const Scratch<A>& scratch) {
  constexpr int w = kLanes<A>;
  Visible seen;
  for (int g = 0; g < heads; ++g) {
    if (!tile[g].used) return false;
    look<A>(p, batch, tile[g].lanes, j0, n, nullptr, seen);
    if (seen.partial || seen.lo > 0 || seen.hi < n) return false;
  }
  const int64_t size = itemsize(p.dtype), ldo = round_up(p.Dv, w);
  const char* const k_rows = p.k.data + (lead_offset(p, p.k, batch) + seq.k_row * p.k.s + head * p.k.h) * size;
  const char* const v_rows = p.v.data + (lead_offset(p, p.v, batch) + seq.k_row * p.v.s + head * p.v.h) * size;
  const auto k_row = [&](int g) { return k_rows + (j0 * p.k.s + g * p.k.h) * size; };
  const auto v_row = [&](int g) { return v_rows + (j0 * p.v.s + g * p.v.h) * size; };
  const int lanes = tile[0].key_lanes, rows = tile[0].rows;
  const auto scores = [&](int g) { return scratch.s + (mutant(86) ? 0 : g) * kBlockKeys<1> * lanes; };
  const auto for_tokens = [&](const auto& use) {
    for (int t = 0; t < n; t += kTokens) {
      for (int g = 0; g < heads; ++g) use(g, t, t + kTokens < n ? t + kTokens : n);
    }
  };

  TokensAhead k_ahead(p.k, k_row(0), p.D, heads, rows, j0, end);
  Vec<A> top{};
  for_tokens([&](int g, int lo, int hi) {
    const Block<A> k = load_block(p.k, k_row(g), n, p.D, rows, scratch.k);
    score_few(k, tile[g].q, round_up(p.D, w), rows, tile[g].dots, lanes, lo, hi, scores(g), top, k_ahead[g]);
  });
  for (int g = 0; g < heads; ++g) {
    Vec<A> tops[1];
    mask_narrow<A>(seen, lanes, scores(g), tops[0]);
    softmax<A, 1>(vectors_of<A>(seen, lanes), rule.c, tops, p.Dv, scores(g), tile[g]);
  }

  TokensAhead v_ahead(p.v, v_row(0), p.Dv, heads, rows, j0, end);
  const auto in_float = [&](int g, int lo, int hi) {
    const Block<A> v = load_block(p.v, v_row(g), n, p.Dv, rows, scratch.v);
    output_few(v, scores(g), lanes, rows, lo, hi, tile[g].o, ldo, v_ahead[g]);
  };
  if constexpr (Tile<A, 1>::kCanPair) {
    if (dots_values(p, tile[0])) {
      FewPairs state[kTaskRows / kLanes<A>];
      const auto output = [&](int g) { return Output{tile[g].o, rows, ldo}; };
      for (int g = 0; g < heads; ++g) {
        float* const pairs = scratch.few_pairs + g * kBlockKeys<1> / 2 * lanes;
        state[g] = FewPairs{scores(g), lanes, pairs, scratch.few_sums + g * lanes * ldo};
        begin_few_pairs(seen, output(g), state[g]);
      }
      for_tokens([&](int g, int lo, int hi) {
        add_few_pairs(p.v, v_row(g), p.Dv, lo, hi, state[g], output(g), scratch.v, v_ahead[g]);
      });
      for (int g = 0; g < heads; ++g) {
        end_few_pairs(p.v, v_row(g), n, p.Dv, seen, state[g], output(g), scratch.v);
      }
      return true;
    }
  }
  for_tokens(in_float);
  return true;
}

}  // namespace qkv::inline QKV_LEVEL
