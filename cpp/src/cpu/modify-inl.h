// SPDX-License-Identifier: Apache-2.0
// Modifiers: passes over a score tile while it lies in L1, one for each that a call has.
//
//     s = scale q.k,   s = softcap tanh(s / softcap),   s = s - slope |p - j|,   s = s + bias
//
// A pass leaves natural units, and finds the largest score of each lane; the last one's is that of the softmax.
#pragma once

#include "cpu/math-inl.h"
#include "cpu/relative-inl.h"
#include "cpu/task-inl.h"

namespace qkv::inline QKV_LEVEL {

// change(j)(v, s): what vector v of key j becomes.
template <class A, int NV, class Change>
QKV_INLINE void pass(const Visible& seen, A* s, Vec<A> (&top)[NV], const Change& change) {
  constexpr int w = kLanes<A>;
  Vec<A> best[NV];
  for (int v = 0; v < NV; ++v) best[v] = splat(-kInf<A>);
  for (int j = seen.lo; j < seen.hi; ++j) {
    const auto of_key = change(j);
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      A* const at = s + (j * NV + v) * w;
      const Vec<A> x = of_key(v.value, load(at));
      store(at, x);
      best[v] = maximum(best[v], x);
    });
  }
  for (int v = 0; v < NV; ++v) top[v] = best[v];
}

// ALiBi by distance from the tile's first query: positions may be beyond what A counts exactly.
template <class A, int NV>
inline void slope_scores(const Problem& p, const TileLanes& lanes, int64_t j0, Vec<A> scale, const Visible& seen, A* s,
                         Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>, L = NV * w;
  A slope[L] = {}, position[L] = {};
  for (int i = 0; i < lanes.live; ++i) {
    if (!lanes.alive[i]) continue;
    slope[i] = static_cast<A>(p.alibi[lanes.head[i]]);
    position[i] = static_cast<A>(lanes.position[i] - lanes.first);
  }
  Vec<A> slopes[NV], positions[NV];
  for (int v = 0; v < NV; ++v) {
    slopes[v] = load(slope + v * w);
    positions[v] = load(position + v * w);
  }
  pass<A, NV>(seen, s, top, [&](int j) __attribute__((always_inline)) {
    const Vec<A> before = splat(static_cast<A>(lanes.first - (j0 + j)));
    return [&, before](int v, Vec<A> x) __attribute__((always_inline)) {
      const Vec<A> d = positions[v] + before;
      return fma(-slopes[v], mutant(12) ? d : absolute<A>(d), x * scale);
    };
  });
}

// x scale + b. Where b is not plain, a sum of finite numbers is kept finite: two additive -FLT_MAX are not "masked".
template <class A>
QKV_INLINE Vec<A> add_any(Vec<A> x, Vec<A> scale, Vec<A> b) {
  constexpr A kLimit = static_cast<A>(sizeof(A) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023);
  const Vec<A> sum = fma(x, scale, b);
  Vec<A> kept = sum < splat(-kLimit) ? splat(-kLimit) : sum;
  kept = kept > splat(kLimit) ? splat(kLimit) : kept;
  const IntVec<A> finite = (b - b == Vec<A>{}) & (x - x == Vec<A>{});
  return (finite & (absolute<A>(b) > splat(kMostPlainBias<A>))) ? (mutant(13) ? sum : kept) : sum;
}

// Transposed on the way. In registers where a square of keys and lanes is plain, as most are, and seen.
template <class A, int NV>
inline void add_bias_rows(Vec<A> scale, const Visible& seen, A* s, BiasRows<A>& bias, Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>;
  Vec<A> best[NV];
  for (int v = 0; v < NV; ++v) best[v] = splat(-kInf<A>);
  for (int jb = seen.lo / w * w; jb < seen.hi; jb += w) {
    const int lo = jb < seen.lo ? seen.lo : jb, hi = jb + w < seen.hi ? jb + w : seen.hi;
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      Vec<A> b[w];
      lanes_of<A>(bias.row + v * w, jb, b);
      IntVec<A> most{};
      unroll<w>([&](auto i) __attribute__((always_inline)) {
        const IntVec<A> sizes = sizes_of<A>(b[i]);
        most = sizes > most ? sizes : most;
      });
      const bool plain = all_plain<A>(most);
      A* const at = s + (jb * NV + v) * w;
      const auto keep = [&](int i, Vec<A> x) __attribute__((always_inline)) {
        store(at + i * NV * w, x);
        best[v] = maximum(best[v], x);
      };
      if (plain && hi - lo == w) {
        unroll<w>([&](auto i) __attribute__((always_inline)) { keep(i, fma(load(at + i * NV * w), scale, b[i])); });
        return;
      }
      alignas(kVectorBytes) A copy[w * w];
      unroll<w>([&](auto i) __attribute__((always_inline)) { store(copy + i * w, b[i]); });
      for (int i = lo - jb; i < hi - jb; ++i) {
        const Vec<A> x = load(at + i * NV * w), y = load(copy + i * w);
        keep(i, plain ? fma(x, scale, y) : add_any<A>(x, scale, y));
      }
      bias.plain = bias.plain && plain;
    });
  }
  for (int v = 0; v < NV; ++v) top[v] = best[v];
}

template <class A, int NV>
inline void modify_scores(const Problem& p, const ScoreRule<A>& rule, const TileLanes& lanes, int64_t j0,
                          const Visible& seen, BiasRows<A>& bias, A* s, Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>;
  Vec<A> scale = splat(rule.scale);  // of the first pass
  if (p.softcap != 0) {
    const Vec<A> cap = splat(rule.softcap);
    pass<A, NV>(seen, s, top, [&](int) __attribute__((always_inline)) {
      return [&](int, Vec<A> x)
                 __attribute__((always_inline)) { return mutant(11) ? x * scale : cap * tanh<A>(x * scale); };
    });
    scale = splat(static_cast<A>(1));
  }
  if (p.alibi) {
    slope_scores<A, NV>(p, lanes, j0, scale, seen, s, top);
    scale = splat(static_cast<A>(1));
  }
  const Table<A> table(p, lanes);
  if (table.row) {
    pass<A, NV>(seen, s, top, [&](int j) __attribute__((always_inline)) {
      return [&, j](int v, Vec<A> x) __attribute__((always_inline)) { return fma(x, scale, table.at(v * w, j0 + j)); };
    });
  } else if (p.bias.data) {
    add_bias_rows<A, NV>(scale, seen, s, bias, top);
  }
}

}  // namespace qkv::inline QKV_LEVEL
