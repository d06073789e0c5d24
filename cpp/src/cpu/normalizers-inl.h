// SPDX-License-Identifier: Apache-2.0
// The normalizers beside softmax: scores of a tile become weights, each a function of its own score and of what a first
// walk over the keys (threshold-inl.h) found out about its row. With m = max s:
//
//     sigmoid    p = 1 / (1 + e^-s)                                    no first walk
//     sparsemax  p = max(z - t, 0),    z = s - m,       sum p = 1      t by threshold()
//     entmax15   p = max(z - t, 0)^2,  z = (s - m) / 2, sum p = 1      t by threshold()
//     hardmax    p = 1 for the first key with s = m, 0 for the others
//
// Threshold  Only z > -1 matter: t >= -1, since z = 0 is among them and a weight is at most 1. With d = max(z - t, 0)
//            sum d (sum d^2) - 1 is convex and falls in t, so Newton's steps from t = -1 rise towards the root and
//            never pass it, and drop every key below it after finitely many steps. Over the keys above the current t
//            the root has a closed form; if none of them is below that root, it is the root over all keys and the
//            search is over, usually after 3 to 7 passes. Every fourth step bisects instead, so that no input needs
//            more than about 4 log2(1 / u) passes. A last pass with compensated sums leaves a remainder `rest`,
//            p = max(z - t - rest, 0): the weights sum to 1 to a few u even where each of them is far below t.
//            A row's result depends on its own keys in their order alone: other rows add zeros to its sums.
// Error      t moves by at most the largest error e of a score (the sum falls in t, and a shift of all scores shifts
//            t), so |dp| <= 2 e for sparsemax, and |dp| <= 2 sqrt(p) e + e^2 for entmax15.
// References Martins & Astudillo 2016 (arXiv 1602.02068); Peters, Niculae & Martins 2019 (arXiv 1905.05702); Michelot
//            1986 (Newton for sparsemax); Ramapuram et al. 2024 (arXiv 2409.04431, sigmoid).
#pragma once

#include <math.h>

#include "cpu/math-inl.h"
#include "cpu/tiles.h"
#include "cpu/visible-inl.h"

namespace qkv::inline QKV_LEVEL {

constexpr bool has_threshold(Normalizer n) { return n == Normalizer::sparsemax || n == Normalizer::entmax15; }
constexpr bool two_walks(Normalizer n) { return has_threshold(n) || n == Normalizer::hardmax; }

template <class A, int NV>
struct Threshold {  // what the first walk found: per lane, beside the maximum
  Vec<A> t[NV];
  Vec<A> rest[NV];  // of t; hardmax: 1 until the row's key has passed, then 0
};

// z per unit of s.
template <class A>
inline A z_scale(Normalizer n, double natural) {
  return static_cast<A>(n == Normalizer::entmax15 && !mutant(49) ? natural / 2 : natural);
}

// --- weights -------------------------------------------------------------------------------------------------

// S^T becomes factor P^T, exactly 0 where masked.
template <class A, int NV, class Weight>
QKV_INLINE void for_scores(const Visible& seen, const A* factor, A* s, const Weight& weight) {
  constexpr int w = kLanes<A>;
  Vec<A> f[NV];
  for (int v = 0; v < NV; ++v) f[v] = factor ? load(factor + v * w) : splat(A{1});
  for (int j = seen.lo; j < seen.hi; ++j) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      const Vec<A> x = load(s + (j * NV + v) * w);
      store(s + (j * NV + v) * w, x == splat(-kInf<A>) ? Vec<A>{} : weight(v, x) * f[v]);
    });
  }
}

// l counts the keys of a sigmoid that are seen, NaN if one is NaN or +inf. c is from units of s to log2.
template <class A, int NV>
inline void sigmoid_weights(const Visible& seen, A c, const A* factor, Vec<A> (&l)[NV], A* s) {
  const Vec<A> one = splat(A{1});
  for_scores<A, NV>(seen, factor, s, [&](auto v, Vec<A> x) __attribute__((always_inline)) {
    l[v] += x == splat(-kInf<A>) ? Vec<A>{} : one + (mutant(48) ? Vec<A>{} : x - x);
    const Vec<A> e = exp2(-maximum(-x, x) * splat(c));  // at most 1: no overflow, and small weights keep their digits
    return (x < Vec<A>{} ? e : one) / (one + e);
  });
}

// s becomes the weights of the tile's rows times factor (nullptr: 1).
template <class A, int NV>
inline void apply_normalizer(const Problem& p, double natural, A c, const Visible& seen, const Vec<A> (&m)[NV],
                             const A* factor, Threshold<A, NV>& found, Vec<A> (&l)[NV], A* s) {
  const Vec<A> h = splat(z_scale<A>(p.normalizer, natural));
  const auto over = [&](auto v, Vec<A> x) __attribute__((always_inline)) {
    return maximum(Vec<A>{}, fma(x - m[v], h, -found.t[v]) - found.rest[v]);
  };
  switch (p.normalizer) {
    case Normalizer::softmax: break;  // online, without a first walk: forward-inl.h
    case Normalizer::sigmoid: sigmoid_weights<A, NV>(seen, c, factor, l, s); break;
    case Normalizer::sparsemax: for_scores<A, NV>(seen, factor, s, over); break;
    case Normalizer::entmax15:
      for_scores<A, NV>(seen, factor, s, [&](auto v, Vec<A> x) __attribute__((always_inline)) {
        const Vec<A> d = over(v, x);
        return mutant(42) ? d : d * d;
      });
      break;
    case Normalizer::hardmax:
      for_scores<A, NV>(seen, factor, s, [&](auto v, Vec<A> x) __attribute__((always_inline)) {
        const Vec<A> taken = x == m[v] ? found.rest[v] : Vec<A>{};
        if (!mutant(43)) found.rest[v] -= taken;
        return taken;
      });
      break;
    case Normalizer::none:
      for (int64_t at = int64_t{seen.lo} * NV * kLanes<A>; at < int64_t{seen.hi} * NV * kLanes<A>; at += kLanes<A>) {
        store(s + at, load(s + at) * splat(static_cast<A>(natural)));
      }
      break;
  }
}

// --- threshold -----------------------------------------------------------------------------------------------

template <class A, int NV>
struct Sums {  // over the keys above t, per lane; d = z - t
  A count[NV * kLanes<A>], sum[NV * kLanes<A>], squares[NV * kLanes<A>], least[NV * kLanes<A>];
};

// A sum and, when kExact, what its roundings lost (Knuth's two-sum). Adding 0 changes neither.
template <bool kExact, class A>
QKV_INLINE void add(Vec<A> x, Vec<A>& sum, Vec<A>& lost) {
  const Vec<A> total = sum + x;
  if constexpr (kExact) {
    const Vec<A> part = total - sum;
    lost += (sum - (total - part)) + (x - part);
  }
  sum = total;
}

// y: (n, lanes) differences s - m.
template <class A, int NV, bool kExact>
inline void sum_above(const A* y, int64_t n, A h, const A* t, Sums<A, NV>& out) {
  constexpr int w = kLanes<A>;
  for (int v = 0; v < NV; ++v) {
    const Vec<A> base = -load(t + v * w);
    IntVec<A> count{};
    Vec<A> sum{}, lost{}, squares{}, squares_lost{}, least = splat(A{1});
    for (int64_t r = 0; r < n; ++r) {
      const Vec<A> d = fma(load(y + (r * NV + v) * w), splat(h), base);
      const IntVec<A> above = d > Vec<A>{};
      const Vec<A> kept = above ? d : Vec<A>{};
      count -= above;
      add<kExact, A>(kept, sum, lost);
      add<kExact, A>(kept * kept, squares, squares_lost);
      least = (above & (d < least)) ? d : least;
    }
    for (int i = 0; i < w; ++i) out.count[v * w + i] = static_cast<A>(count[i]);
    store(out.sum + v * w, sum + lost);
    store(out.squares + v * w, squares + squares_lost);
    store(out.least + v * w, least);
  }
}

template <class A>
struct Step {  // from t to the root over the keys above t
  A excess;    // of the sum over 1
  A newton;
  A root;  // n x = excess, or the lower root of n x^2 - 2 sum x + excess = 0
  bool exists;
};

template <class A, int NV>
inline Step<A> step_of(Normalizer kind, const Sums<A, NV>& sums, int i) {
  const A count = sums.count[i], sum = sums.sum[i];
  if (kind == Normalizer::sparsemax) return {sum - 1, (sum - 1) / count, (sum - 1) / count, true};
  const A excess = sums.squares[i] - 1, under = sum * sum - count * excess;
  const A root = excess / (sum + static_cast<A>(sqrt(under > 0 ? static_cast<double>(under) : 0.0)));
  return {excess, excess / (2 * sum), root, under >= 0};
}

// y: (n, lanes) of s - m, kept where some lane may need it. Lanes that are not `searched` get t = rest = 0.
template <class A, int NV>
inline void threshold(Normalizer kind, const A* y, int64_t n, A h, const bool* searched, Threshold<A, NV>& found) {
  constexpr int w = kLanes<A>, L = NV * w;
  bool open[L];
  A t[L], low[L], high[L], rest[L];  // the root is in low ... high
  int left = 0;
  for (int i = 0; i < L; ++i) {
    open[i] = searched[i];
    t[i] = low[i] = searched[i] ? A{-1} : A{0};
    high[i] = 0;
    left += searched[i];
  }
  Sums<A, NV> sums;
  for (int pass = 0; left > 0; ++pass) {
    sum_above<A, NV, false>(y, n, h, t, sums);
    for (int i = 0; i < L; ++i) {
      if (!open[i]) continue;
      const Step<A> step = step_of<A, NV>(kind, sums, i);
      if (step.excess >= 0) {
        low[i] = t[i];
        if (step.exists && step.root <= sums.least[i]) {
          t[i] += step.root;
          open[i] = false;
          --left;
          continue;
        }
        t[i] += step.newton;
      } else {
        high[i] = t[i];
      }
      if (step.excess < 0 || pass % 4 == 3) t[i] = low[i] + (high[i] - low[i]) / 2;
      if (t[i] > low[i] && t[i] < high[i]) continue;
      t[i] = low[i];  // no number in between
      open[i] = false;
      --left;
    }
  }
  sum_above<A, NV, true>(y, n, h, t, sums);
  for (int i = 0; i < L; ++i) rest[i] = searched[i] && !mutant(44) ? step_of<A, NV>(kind, sums, i).root : A{0};
  for (int v = 0; v < NV; ++v) {
    found.t[v] = load(t + v * w);
    found.rest[v] = load(rest + v * w);
  }
}

}  // namespace qkv::inline QKV_LEVEL
