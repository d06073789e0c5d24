// SPDX-License-Identifier: Apache-2.0
// Additive scores: what takes the place of S^T = K Q^T in the loop of forward-inl.h.
//
//     s = sum over d of w_d tanh(q_d + k_d)          q, k, w in A; the scale's exact factor is in w
//
// Float      by the identity of qkv/additive.h, the reciprocal an estimate of 12 bits or more and one Newton step.
// Double
//            takes tanh always.
// Layouts    Queries in the lanes: Q^T (D, L) as it is, e^2Q^T (D rounded up, L), and a Reach per lane. Few rows:
//            Q (rows, ld), e^2Q, reaches, with d in the lanes, at the same places. Keys: (keys, ld) both.
// Memory     per worker, in A: (2 ld + 1) rows of queries, 2 ld + 1 for each key of a block.
// Cost       per four terms: 4 fma, 7 products and sums, one reciprocal, 3 more to use it; 8 to limit z.
#pragma once

#include <math.h>

#include "cpu/few-operands-inl.h"
#include "cpu/math-inl.h"
#include "cpu/visible-inl.h"
#include "qkv/additive.h"

namespace qkv::inline QKV_LEVEL {

// --- types ---------------------------------------------------------------------------------------------------

template <class A>
constexpr bool kExponentials = sizeof(A) == 4;  // float; double takes tanh
struct Reach {                                  // of a query or key: its largest |a|
  static constexpr float near = 0, middle = 1, far = 2;
};
constexpr int kAdditiveKeys = 2;  // per turn: 4 sums, 8 vectors of queries, 4 of c; with 4 keys some spill

// Columns of a row of queries in scratch.
template <class A>
inline int64_t query_columns(const Problem& p) {
  const int64_t ld = round_up(p.D, kLanes<A>);
  return p.score == Score::additive && kExponentials<A> ? 2 * ld + 1 : ld;
}

template <class A>
struct AdditiveTerms {  // of a task, in one piece of scratch
  A* weight;            // (ld,) w times the scale's factor, 0 beyond D
  A* inverse;           // (ld,) c; kMostDivisor where w counts as 0
  A* factor;            // (ld,) c; 0 where w counts as 0
  A* base;              // [0]: sum of 1 / z at tanh = 0; [1]: twice the unit of such sums
  A* e;                 // (kKeys, ld) c e^2k
  A* reach;             // (kKeys + kLanes,) a Reach for each key

  AdditiveTerms(A* memory, int64_t D) {
    const int64_t ld = round_up(D, kLanes<A>);
    weight = memory;
    inverse = weight + ld;
    factor = inverse + ld;
    base = factor + ld;
    e = base + kLanes<A>;
    reach = e + (kExponentials<A> ? kKeys * ld : 0);
  }
  static int64_t size(const Problem& p) {
    if (p.score != Score::additive) return 0;
    const int64_t ld = round_up(p.D, kLanes<A>);
    return 3 * ld + kLanes<A> + (kExponentials<A> ? kKeys * ld : 0) + kKeys + kLanes<A>;
  }
};

// --- load ----------------------------------------------------------------------------------------------------

// e^2x for |x| <= kFar, to 3 u: 2x = n ln 2 + r, with ln 2 in two parts of which the first times n is exact.
QKV_INLINE F exp_twice(F x) {
  constexpr float kInteger = 12582912.0f;  // 1.5 2^23: to add it rounds to an integer
  const F y = x + x;
  const F n = (fma(y, splat(1.44269504f), splat(-0.5f)) + splat(kInteger)) - splat(kInteger);
  const F r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
  const IntVec<float> power = (IntVec<float>)(n + splat(kInteger + 127.0f)) << 23;  // 2^n
  return exp2_polynomial(r * splat(1.44269504f)) * (F)power;
}

// The largest |x| by its bits, among which a NaN is larger than all.
QKV_INLINE IntVec<float> largest(IntVec<float> most, F x) {
  const IntVec<float> size = (IntVec<float>)x & 0x7fffffff;
  return size > most ? size : most;
}

// As a number per lane, 0 to 2.
QKV_INLINE F reach_of(IntVec<float> most) {
  const IntVec<float> beyond_near = most > bit_cast<int32_t>(kNear), beyond_far = most > bit_cast<int32_t>(kFar);
  return beyond_far != IntVec<float>{} ? splat(Reach::far)
                                       : (beyond_near != IntVec<float>{} ? splat(Reach::middle) : F{});
}

QKV_INLINE float larger(float a, float b) { return a > b ? a : b; }

QKV_INLINE float largest_lane(F x) {
  float lane[kLanes<float>], most = 0;
  store(lane, x);
  for (const float a : lane) most = larger(a, most);
  return most;
}

// acc + 1 / z0 + 1 / z1 + 1 / z2 + 1 / z3.
QKV_INLINE F add_inverses(const F (&z)[4], F acc) {
  const F s = z[0] + z[1], p = z[0] * z[1], s2 = z[2] + z[3], p2 = z[2] * z[3];
  const F divisor = p * p2, dividend = fma(s, p2, s2 * p);
  const F r = reciprocal_estimate(divisor);
  return fma_into(dividend * r, mutant(60) ? splat(1.0f) : fma(-divisor, r, splat(2.0f)), acc);
}

template <bool kLimited>
QKV_INLINE F denominator(F e, F f, F c) {
  const F z = fma(e, f, c), most = splat(mutant(61) ? 0x1p-29f : kMostDivisor);
  return kLimited ? maximum(-most, minimum(z, most)) : z;
}

// Four vectors of d at a time, nothing beyond ld: the sum over d of 1 / z(d), still in lanes.
template <class Z>
QKV_INLINE F sum_inverses(int64_t ld, const Z& z) {
  constexpr int step = kLanes<float>;
  F acc{};
  for (int64_t d = 0; d < ld; d += 4 * step) {
    F z4[4];
    unroll<4>([&](auto i) __attribute__((always_inline)) {
      const int64_t at = d + i * step;
      z4[i] = at < ld ? z(at) : splat(kMostDivisor);
    });
    acc = add_inverses(z4, acc);
  }
  return acc;
}

QKV_INLINE float total(F x) {
  F all[kLanes<float>] = {x};
  return sum_lanes<float>(all)[0];
}

// w and c, and the unit. Whether all w can be had by their c.
QKV_INLINE bool load_inverses(const Problem& p, float fold, AdditiveTerms<float> terms) {
  const int64_t ld = round_up(p.D, kLanes<float>);
  float most = 0;
  for (int64_t d = 0; d < ld; ++d) {
    const double term = d < p.D ? p.weight[d] * static_cast<double>(mutant(66) ? 1 : fold) : 0;
    terms.weight[d] = static_cast<float>(term);
    const double size = fabs(term);
    most = size > static_cast<double>(most) || size != size ? static_cast<float>(size) : most;
  }
  const auto [unit, usual] = inverse_unit(most);
  terms.base[1] = 2 * unit;
  F ignored{};
  for (int64_t d = 0; d < ld; d += kLanes<float>) {
    const F w = load(terms.weight + d), size = maximum(-w, w), c = splat(unit) / w;
    const IntVec<float> counts = size >= splat(unit);  // c at most 1
    store(terms.inverse + d, counts != IntVec<float>{} ? c : splat(kMostDivisor));
    store(terms.factor + d, counts != IntVec<float>{} ? c : F{});
    ignored += counts != IntVec<float>{} ? F{} : size;
  }
  return usual && total(ignored) <= most * kNegligible;
}

// w, c, the half sum of w as the scores will add it, and of the tile's queries what the exponentials need.
template <class A, int NV>
inline void load_additive(const Problem& p, A fold, bool few, int rows, A* q, AdditiveTerms<A> terms) {
  constexpr int w = kLanes<A>, L = NV * w;
  const int64_t ld = round_up(p.D, w);
  if constexpr (!kExponentials<A>) {
    for (int64_t d = 0; d < ld; ++d) terms.weight[d] = d < p.D ? p.weight[d] * (mutant(66) ? A{1} : fold) : 0;
  } else {
    const A least = load_inverses(p, fold, terms) ? A{Reach::near} : A{Reach::far};
    A *const e = q + L * ld, *const reach = q + 2 * L * ld;
    const int64_t n = few ? rows * ld : p.D * L;
    for (int64_t i = 0; i < n; i += w) store(e + i, exp_twice(load(q + i)));
    if (few) {
      const auto two = [&](int64_t d) { return load(terms.factor + d) + load(terms.inverse + d); };
      terms.base[0] = total(sum_inverses(ld, two));
      for (int r = 0; r < rows; ++r) {
        IntVec<A> size{};
        for (int64_t d = 0; d < ld; d += w) size = largest(size, load(q + r * ld + d));
        reach[r] = larger(largest_lane(reach_of(size)), least);
      }
      return;
    }
    for (int64_t i = n; i < ld * L; i += w) store(e + i, splat(1.0f));
    F base{};
    for (int64_t d = 0; d < ld; d += 4) {
      F z[4];
      unroll<4>([&](auto i)
                    __attribute__((always_inline)) { z[i] = splat(terms.factor[d + i] + terms.inverse[d + i]); });
      base = add_inverses(z, base);
    }
    terms.base[0] = base[0];
    for (int v = 0; v < NV; ++v) {
      IntVec<A> size{};
      for (int64_t d = 0; d < p.D; ++d) size = largest(size, load(q + (d * NV + v) * w));
      store(reach + v * w, maximum(reach_of(size), splat(least)));
    }
  }
}

// Of keys first ... end - 1 of a block.
template <class A>
inline void key_exponentials(const Block<A>& k, int first, int end, int64_t ld, const AdditiveTerms<A>& terms) {
  if constexpr (kExponentials<A>) {
    for (int j = first; j < end; ++j) {
      IntVec<A> size{};
      for (int64_t d = 0; d < ld; d += kLanes<A>) {
        const Vec<A> x = load(k.data + j * k.ld + d);
        size = largest(size, x);
        store(terms.e + j * ld + d, exp_twice(x) * load(terms.factor + d));
      }
      terms.reach[j] = mutant(62) ? A{Reach::near} : largest_lane(reach_of(size));
    }
  }
}

// Keys 0 ... n - 1 of a block as whole vectors of A. Few rows make the exponentials a group at a time, for L1.
template <class A>
inline void load_additive_keys(const View& view, const char* first, int n, int64_t D, bool few, A* copy,
                               const AdditiveTerms<A>& terms, Block<A>& k) {
  const int64_t ld = round_up(D, kLanes<A>);
  if (whole_vectors<A>(view, D)) {
    k = {reinterpret_cast<const A*>(first), view.s};
  } else {
    convert_rows(view, first, n, D, copy);
    k = {copy, ld};
  }
  if (!few) key_exponentials(k, 0, n, ld, terms);
}

// --- scores --------------------------------------------------------------------------------------------------

// R keys from the exponentials; z needs no limit where all are near.
template <int R, int NV, bool kLimited>
QKV_INLINE void additive_rows(const float* k, const float* q, int64_t ld, const AdditiveTerms<float>& terms, float* s) {
  constexpr int w = kLanes<float>;
  F acc[R][NV] = {};
  for (int64_t d = 0; d < ld; d += 4) {
    F c[4];
    unroll<4>([&](auto i) __attribute__((always_inline)) { c[i] = splat(terms.inverse[d + i]); });
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      F x[4];
      unroll<4>([&](auto i) __attribute__((always_inline)) { x[i] = load(q + ((d + i) * NV + v) * w); });
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        F z[4];
        unroll<4>([&](auto i) __attribute__((always_inline)) {
          z[i] = denominator<kLimited>(splat(k[r * ld + d + i]), x[i], c[i]);
        });
        acc[r][v] = add_inverses(z, acc[r][v]);
      });
    });
  }
  const F base = splat(terms.base[0]), unit = splat(terms.base[1]);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) { store(s + (r * NV + v) * w, (base - acc[r][v]) * unit); });
  });
}

// One key by tanh, for all lanes.
template <class A, int NV>
QKV_INLINE void direct_key(const A* k, const A* q, int64_t D, const A* weight, Vec<A> (&sum)[NV]) {
  constexpr int w = kLanes<A>;
  for (int v = 0; v < NV; ++v) sum[v] = Vec<A>{};
  for (int64_t d = 0; d < D; ++d) {
    unroll<NV>([&](auto v) __attribute__((always_inline)) {
      sum[v] = fma(splat(weight[d]), tanh<A>(load(q + (d * NV + v) * w) + splat(k[d])), sum[v]);
    });
  }
}

template <class A, int NV>
inline void score_additive_lanes(int64_t D, const Visible& seen, const Block<A>& k, const A* q,
                                 const AdditiveTerms<A>& terms, A* s, Vec<A> (&top)[NV]) {
  constexpr int w = kLanes<A>, L = NV * w;
  const int64_t ld = round_up(D, w);
  IntVec<A> is_far[NV];
  A most = A{Reach::far};  // of the rows
  for (int v = 0; v < NV; ++v) is_far[v] = ~IntVec<A>{};
  if constexpr (kExponentials<A>) {
    most = A{Reach::near};
    for (int v = 0; v < NV; ++v) {
      const Vec<A> reach = load(q + 2 * L * ld + v * w);
      is_far[v] = reach == splat(A{Reach::far});
      most = larger(most, largest_lane(reach));
    }
    for_rows<kAdditiveKeys>(seen.hi - seen.lo, [&](auto R, int64_t row) __attribute__((always_inline)) {
      const int64_t j = seen.lo + row;
      A reach = most;
      unroll<R.value>([&](auto r) { reach = larger(reach, terms.reach[j + r]); });
      const A* const e = terms.e + j * ld;
      if (reach == A{Reach::near}) additive_rows<R.value, NV, false>(e, q + L * ld, ld, terms, s + j * L);
      else additive_rows<R.value, NV, true>(e, q + L * ld, ld, terms, s + j * L);
    });
  }
  for (int j = seen.lo; j < seen.hi; ++j) {
    const bool far_key = !kExponentials<A> || terms.reach[j] == A{Reach::far};
    if (most == A{Reach::far} || far_key) {
      Vec<A> sum[NV];
      direct_key<A, NV>(k.data + j * k.ld, q, D, terms.weight, sum);
      for (int v = 0; v < NV; ++v) {
        A* const at = s + (j * NV + v) * w;
        const IntVec<A> take = far_key || mutant(63) ? ~IntVec<A>{} : is_far[v];
        store(at, take != IntVec<A>{} ? sum[v] : load(at));
      }
    }
    for (int v = 0; v < NV; ++v) top[v] = maximum(top[v], load(s + (j * NV + v) * w));
  }
}

// `rows` rows with d in the lanes; kLanes keys at a time.
template <class A>
inline void score_additive_few(int64_t D, int rows, const Visible& seen, const Block<A>& k, const A* q,
                               const AdditiveTerms<A>& terms, A* s, Vec<A>& top) {
  constexpr int w = kLanes<A>;
  const int64_t ld = round_up(D, w);
  for (int j0 = seen.lo; j0 < seen.hi; j0 += w) {
    Vec<A> tile[w] = {};
    key_exponentials(k, j0, j0 + w < seen.hi ? j0 + w : seen.hi, ld, terms);
    for (int r = 0; r < rows; ++r) {
      const A* const row = q + r * ld;
      const bool far_row = kExponentials<A> && q[2 * w * ld + r] == A{Reach::far} && !mutant(67);
      Vec<A> sum[w];
      IntVec<A> direct{};
      for (int i = 0; i < w; ++i) {
        const int j = j0 + i < seen.hi ? j0 + i : seen.hi - 1;  // past the end: not kept
        if constexpr (kExponentials<A>) {
          const A *const e = terms.e + j * ld, *const f = row + w * ld;
          const auto z = [&](int64_t d) __attribute__((always_inline)) {
            return denominator<true>(load(e + d), load(f + d), load(terms.inverse + d));
          };
          if (!far_row && terms.reach[j] != A{Reach::far}) {
            sum[i] = sum_inverses(ld, z);
            continue;
          }
        }
        direct[i] = -1;
        sum[i] = Vec<A>{};
        for (int64_t d = 0; d < ld; d += w) {
          sum[i] = fma(load(terms.weight + d), tanh<A>(load(row + d) + load(k.data + j * k.ld + d)), sum[i]);
        }
      }
      const Vec<A> x = sum_lanes<A>(sum);
      tile[r] = direct != IntVec<A>{} ? x : (splat(terms.base[0]) - x) * splat(terms.base[1]);
    }
    transpose<A>(tile);
    for (int i = 0; i < w && j0 + i < seen.hi; ++i) {
      store(s + (j0 + i) * w, tile[i]);
      top = maximum(top, tile[i]);
    }
  }
}

// Keys seen.lo ... seen.hi - 1 of a block for the lanes of a tile; top[lane] = max(top, s).
template <class A, int NV>
inline void score_additive(int64_t D, bool few, int rows, const Visible& seen, const Block<A>& k, const A* q,
                           const AdditiveTerms<A>& terms, A* s, Vec<A> (&top)[NV]) {
  if constexpr (NV == 1) {
    if (few) return score_additive_few(D, rows, seen, k, q, terms, s, top[0]);
  }
  score_additive_lanes<A, NV>(D, seen, k, q, terms, s, top);
}

}  // namespace qkv::inline QKV_LEVEL
