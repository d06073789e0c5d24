// SPDX-License-Identifier: Apache-2.0
// How q.k becomes a score, and what becomes of a row at the end: the same rules as on the CPU (forward-inl.h,
// results-inl.h), for kernels that hold scores in registers.
#pragma once

#include <math.h>

#include "portable/lanes.cuh"
#include "qkv/softmax.h"

namespace qkv::inline QKV_LEVEL {

constexpr double kLog2e = 1.44269504088896340736;

template <class A>
constexpr A kInf = static_cast<A>(HUGE_VAL);

template <class A>
struct ScoreRule {   // how q.k becomes the exponent c (s - m)
  A c;               // from the units of s to log2
  A scale, softcap;  // general scores only: their s is in natural units
  double natural;    // natural units per unit of s
};

// Plain scores keep the units of q.k: the scale is applied in the exponent.
template <class A>
QKV_DEVICE ScoreRule<A> score_rule(const Problem& p, bool general) {
  ScoreRule<A> r;
  r.natural = general ? 1 : p.scale;
  r.c = static_cast<A>(r.natural * kLog2e);
  r.scale = p.score == Score::additive ? 1 : static_cast<A>(p.scale);  // it is in the weight
  r.softcap = static_cast<A>(p.softcap);
  return r;
}

template <class A>
QKV_DEVICE A load_as(const char* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<A>(reinterpret_cast<const float*>(data)[at]);
    case DType::bf16: return static_cast<A>(bf16_to_float(reinterpret_cast<const uint16_t*>(data)[at]));
    case DType::f16: return static_cast<A>(f16_to_float(reinterpret_cast<const uint16_t*>(data)[at]));
    default: return static_cast<A>(load_as_double(data, dtype, at));
  }
}

template <class A>
QKV_DEVICE void store_element(const Problem& p, char* row, int64_t column, A x) {
  if constexpr (sizeof(A) == 8) reinterpret_cast<double*>(row)[column * p.out.d] = x;
  else if (p.dtype == DType::f32) reinterpret_cast<float*>(row)[column * p.out.d] = x;
  else {
    const uint32_t bits = p.dtype == DType::f16 ? pack<Half>(x, x) : pack<Bfloat>(x, x);
    reinterpret_cast<uint16_t*>(row)[column * p.out.d] = static_cast<uint16_t>(bits);
  }
}

template <class A>
struct RowTerms {  // of one row, in general scores
  A slope;
  int64_t position, bias;  // bias: element offset of its row
};

template <class A, int R>
QKV_DEVICE RowTerms<A> row_terms(const Problem& p, const Task& task, const Lanes<R>& lanes, int row) {
  RowTerms<A> t{0, 0, 0};
  if (!lanes.alive[row]) return t;
  t.position = lanes.position[row];
  if (p.alibi) t.slope = static_cast<A>(p.alibi[lanes.head[row]]);
  if (p.bias.data) {
    t.bias = lead_offset(p, p.bias, task.batch) + lanes.head[row] * p.bias.h + lanes.query[row] * p.bias.s;
  }
  return t;
}

// Softcap, ALiBi and bias, in natural units. A sum of finite numbers is kept finite: two additive -FLT_MAX are
// not "masked".
template <class A>
QKV_DEVICE A modify_score(const Problem& p, const ScoreRule<A>& rule, const RowTerms<A>& terms, int64_t j, A s) {
  constexpr A kLimit = static_cast<A>(sizeof(A) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023);
  s = p.softcap != 0 ? rule.softcap * static_cast<A>(tanh(s * rule.scale / rule.softcap)) : s * rule.scale;
  if (p.alibi) {
    const int64_t d = terms.position - j;
    s = multiply_add(-terms.slope, static_cast<A>(d < 0 ? -d : d), s);
  }
  if (p.bias.data) {
    const int64_t at = terms.bias + bias_column(p, terms.position, j);
    const A b = load_as<A>(p.bias.data, p.bias.dtype, at), sum = s + b;
    if (b == -kInf<A>) return b;  // masked, whatever the score: NaN too
    const bool finite = b - b == 0 && s - s == 0;
    const A kept = sum < -kLimit ? -kLimit : (sum > kLimit ? kLimit : sum);
    s = finite ? kept : sum;
  }
  return s;
}

// The larger; a NaN loses: it stays in the scores, and makes p, l and o of its row NaN.
QKV_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
QKV_DEVICE double larger(double a, double b) { return fmax(a, b); }

// --- the end of a row ------------------------------------------------------------------------------------------

template <class A>
struct RowEnd {
  A factor;  // of o: 1 / l, the sink's share taken off; 0 for a row that saw nothing
  A lse;
};

template <class A>
QKV_DEVICE RowEnd<A> end_row(const Problem& p, const ScoreRule<A>& rule, int32_t head, A m, A l) {
  RowEnd<A> r{l == 0 ? static_cast<A>(0) : 1 / l, 0};
  if (p.lse || p.sinks) {
    SoftmaxState state{m * rule.natural, static_cast<double>(l)};
    if (p.sinks) {
      const Rescale s = state.merge({p.sinks[head], 1});
      r.factor = l == 0 ? static_cast<A>(0) : static_cast<A>(s.self / state.l);
    }
    r.lse = static_cast<A>(state.lse());
  }
  return r;
}

template <class A>
struct RowOut {
  char* out;   // element 0 of the row, nullptr if no output is asked for
  A factor;    // of o, the gate included
  bool empty;  // saw nothing: 0, whatever o and the gate hold
};

struct RowId {
  int64_t batch, row, query;
  int32_t head, result_head;
  bool alive;
};

// Writes what the row leaves beside o: lse, and the normaliser for the walk that writes weights.
template <class A>
QKV_DEVICE RowOut<A> finish_row(const KernelArgs& args, const ScoreRule<A>& rule, const Sequence& seq, const RowId& id,
                                A m, A l, bool writer) {
  const Problem& p = args.problem;
  RowEnd<A> end{0, -kInf<A>};
  if (id.alive) end = end_row(p, rule, id.head, m, l);
  if (writer) {
    const int64_t at = result_index(p, id.batch, id.result_head, id.row);
    if (p.lse) static_cast<A*>(p.lse)[at] = end.lse;
    if (args.plan.normaliser) {
      static_cast<A*>(args.plan.normaliser)[2 * at] = m == -kInf<A> ? static_cast<A>(0) : m;
      static_cast<A*>(args.plan.normaliser)[2 * at + 1] = end.factor;
    }
  }
  const bool empty = end.factor == 0;
  if (p.gate.data) {
    const int64_t at = lead_offset(p, p.gate, id.batch) + id.head * p.gate.h + id.query * p.gate.s;
    end.factor *= static_cast<A>(reinterpret_cast<const double*>(p.gate.data)[at]);
  }
  const int64_t at = lead_offset(p, p.out, id.batch) + id.result_head * p.out.h + (seq.q_row + id.row) * p.out.s;
  return {p.out.data ? p.out.data + at * itemsize(p.dtype) : nullptr, end.factor, empty};
}

// --- weights -------------------------------------------------------------------------------------------------

template <class A>
struct Normaliser {  // p = 2^(c (s - m) - shift) factor
  A m, shift, factor;
};

template <class A>
QKV_DEVICE Normaliser<A> normaliser(const KernelArgs& args, int64_t at) {
  if (args.problem.normalizer == Normalizer::none) return {0, 0, 1};
  if (const void* given = args.problem.lse_in) {
    const A lse = static_cast<const A*>(given)[at];
    return {0, lse == -kInf<A> ? kInf<A> : static_cast<A>(static_cast<double>(lse) * kLog2e), 1};
  }
  const A* x = static_cast<const A*>(args.plan.normaliser) + 2 * at;
  return {x[0], 0, x[1]};
}

// Of a score in natural units.
template <class A>
QKV_DEVICE A weight(const Problem& p, const Normaliser<A>& norm, A c, A s) {
  if (p.normalizer == Normalizer::none) return s;
  return s == -kInf<A> ? static_cast<A>(0) : power_of_two(multiply_add(s - norm.m, c, -norm.shift)) * norm.factor;
}

}  // namespace qkv::inline QKV_LEVEL
