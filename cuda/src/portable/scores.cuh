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
  A scale, softcap;  // general scores only: their s is in natural units; scale is over softcap, where there is one
  double natural;    // natural units per unit of s
};

// Plain scores keep the units of q.k: the scale is applied in the exponent.
template <class A>
QKV_DEVICE ScoreRule<A> score_rule(const Problem& p, bool general) {
  ScoreRule<A> r;
  r.natural = general ? 1 : p.scale;
  r.c = static_cast<A>(r.natural * kLog2e);
  const double scale = p.score == Score::additive ? 1 : p.scale;  // it is in the weight
  r.scale = static_cast<A>(p.softcap != 0 ? scale / p.softcap : scale);
  r.softcap = static_cast<A>(p.softcap);
  return r;
}

QKV_DEVICE float half_as_float(uint16_t bits) {  // one instruction, where f16_to_float is a dozen
  float x[2];
  unpack(bits, x);
  return x[0];
}

// N elements, each where from[i] points, those that are not there as 0. All are loaded before one is used: they wait
// for memory together.
template <class As, class A, int N, class Convert>
QKV_DEVICE void load_all(const char* const (&from)[N], const bool (&there)[N], const Convert& convert, A (&x)[N]) {
  As raw[N] = {};
  QKV_UNROLL
  for (int i = 0; i < N; ++i) {
    if (there[i]) raw[i] = *reinterpret_cast<const As*>(from[i]);
  }
  QKV_UNROLL
  for (int i = 0; i < N; ++i) x[i] = static_cast<A>(convert(raw[i]));
}
template <class A, int N>
QKV_DEVICE void load_elements(const char* const (&from)[N], const bool (&there)[N], DType dtype, A (&x)[N]) {
  const auto same = [](auto e) { return e; };
  const auto wider = [&](uint16_t e) { return dtype == DType::bf16 ? bf16_to_float(e) : half_as_float(e); };
  if (dtype == DType::f64) load_all<double>(from, there, same, x);
  else if (dtype == DType::f32) load_all<float>(from, there, same, x);
  else load_all<uint16_t>(from, there, wider, x);
}
template <class A>
QKV_DEVICE A load_as(const char* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<A>(reinterpret_cast<const float*>(data)[at]);
    case DType::bf16: return static_cast<A>(bf16_to_float(reinterpret_cast<const uint16_t*>(data)[at]));
    case DType::f16: return static_cast<A>(half_as_float(reinterpret_cast<const uint16_t*>(data)[at]));
    default: return static_cast<A>(load_as_double(data, dtype, at));
  }
}

template <class A>
QKV_DEVICE void store_element(const Problem& p, int64_t at, A x) {
  if constexpr (sizeof(A) == 8) reinterpret_cast<double*>(p.out.data)[at] = x;
  else if (p.dtype == DType::f32) reinterpret_cast<float*>(p.out.data)[at] = x;
  else {
    const uint32_t bits = p.dtype == DType::f16 ? pack<Half>(x, x) : pack<Bfloat>(x, x);
    reinterpret_cast<uint16_t*>(p.out.data)[at] = static_cast<uint16_t>(bits);
  }
}

template <class A>
struct RowTerms {  // of one row, in general scores
  A slope;
  int64_t position, bias;  // bias: element offset of its row
};

template <class A, int R>
QKV_DEVICE RowTerms<A> row_terms(const Problem& p, const Lanes<R>& lanes, int row) {
  const A slope = static_cast<A>(p.alibi ? p.alibi[lanes.head[row]] : 0);
  return {slope, lanes.position[row], p.bias.data ? lanes.bias[row] : 0};
}

// A sum of finite numbers is kept finite: two additive -FLT_MAX are not "masked".
template <class A>
QKV_DEVICE A add_bias(A s, A b) {
  constexpr A kLimit = static_cast<A>(sizeof(A) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023);
  const A sum = s + b;
  const bool beyond = fabs(sum) == kInf<A> && fabs(s) != kInf<A> && fabs(b) != kInf<A>;
  const A kept = beyond ? (sum < 0 ? -kLimit : kLimit) : sum;
  return b == -kInf<A> ? b : kept;  // masked, whatever the score: NaN too
}

// The bias of some keys of a row, the i-th `offset` after the first, 0 <= offset <= most: bias_column, but in 32 bits
// from one key to the next.
struct BiasKeys {
  const char* data;
  int64_t step;       // bytes from a column to the next
  int32_t top, last;  // of distances: that of the first key, and the last there is, counted from `data`
  bool by_distance;

  QKV_DEVICE BiasKeys(const Problem& p, int64_t row, int64_t position, int64_t first, int most)
      : step(p.bias.d * itemsize(p.bias.dtype)), top(0), last(0), by_distance(p.distances.n > 0) {
    int64_t column = first;
    if (by_distance) {
      constexpr int64_t kFar = int64_t{1} << 30;
      const int64_t t = position - first - p.distances.least, end = p.distances.n - 1, low = t - most;
      column = low < 0 ? 0 : (low > end ? end : low);
      top = static_cast<int32_t>(t < 0 ? -1 : (t - column > kFar ? kFar : t - column));
      last = static_cast<int32_t>(end - column > kFar ? kFar : end - column);
    }
    data = p.bias.data + row * itemsize(p.bias.dtype) + column * step;
  }
  QKV_DEVICE const char* operator[](int offset) const {
    const int32_t t = top - offset, column = t < 0 ? 0 : (t > last ? last : t);
    return data + static_cast<uint32_t>(by_distance ? column : offset) * step;
  }
};

// Softcap, ALiBi and bias of N keys of a row, in natural units: the i-th lies `past` + offset_of(i) after the first,
// which lies `behind` before the query; those that lie less than `left` after it have a bias to read.
template <class A, int N, class OffsetOf>
QKV_DEVICE void modify_keys(const Problem& p, const ScoreRule<A>& rule, A slope, int64_t behind, const BiasKeys& keys,
                            int left, int past, const OffsetOf& offset_of, A (&s)[N]) {
  QKV_UNROLL
  for (int i = 0; i < N; ++i) s[i] *= rule.scale;
  if (p.softcap != 0) {
    QKV_UNROLL
    for (int i = 0; i < N; ++i) s[i] = rule.softcap * static_cast<A>(tanh(s[i]));
  }
  if (p.alibi) {
    QKV_UNROLL
    for (int i = 0; i < N; ++i) {
      const int64_t d = behind - (past + offset_of(i));
      s[i] = multiply_add(-slope, static_cast<A>(d < 0 ? -d : d), s[i]);
    }
  }
  if (!p.bias.data) return;
  const char* from[N];
  bool there[N];
  A b[N];
  QKV_UNROLL
  for (int i = 0; i < N; ++i) {
    from[i] = keys[past + offset_of(i)];
    there[i] = past + offset_of(i) < left;
  }
  load_elements(from, there, p.bias.dtype, b);
  QKV_UNROLL
  for (int i = 0; i < N; ++i) s[i] = add_bias(s[i], b[i]);
}

// Of all keys of a row that a thread has: the i-th lies offset_of(i) after the first, ever further, and the
// (past + i)-th offset_of(past) + offset_of(i) for even `past`; keys below `end` have a bias to read. Four at a time,
// whose loads wait for memory together (there are few registers left), and in a loop: all of them in a row are
// thousands of instructions. Registers have no index, so the scores go round: four from the beginning of the row to its
// end.
template <class A, int N, class OffsetOf>
QKV_DEVICE void modify_row(const Problem& p, const ScoreRule<A>& rule, const RowTerms<A>& terms, int64_t end,
                           int64_t first, const OffsetOf& offset_of, A (&s)[N]) {
  constexpr int kStep = N < 4 ? N : 4;
  static_assert(N % kStep == 0);
  const BiasKeys keys(p, terms.bias, terms.position, first, offset_of(N - 1));
  const int left = static_cast<int>(end - first > offset_of(N - 1) ? offset_of(N - 1) + 1 : end - first);
  QKV_ROLLED
  for (int past = 0; past < N; past += kStep) {
    A x[kStep];
    QKV_UNROLL
    for (int i = 0; i < kStep; ++i) x[i] = s[i];
    modify_keys(p, rule, terms.slope, terms.position - first, keys, left, offset_of(past), offset_of, x);
    QKV_UNROLL
    for (int i = 0; i < N - kStep; ++i) s[i] = s[i + kStep];
    QKV_UNROLL
    for (int i = 0; i < kStep; ++i) s[N - kStep + i] = x[i];
  }
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
  int64_t at;  // element offset of the row in out, where that is asked for
  A factor;    // of o, the gate included
  bool empty;  // saw nothing: 0, whatever o and the gate hold
};

template <class A>
struct RowEnds {  // of a tile, in shared memory that its loop has left
  A *m, *l;
  RowOut<A>* out;

  QKV_DEVICE RowEnds(char* memory, int rows)
      : m(reinterpret_cast<A*>(memory)), l(m + rows), out(reinterpret_cast<RowOut<A>*>(l + rows)) {}
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
  return {at, end.factor, empty};
}

// The rows of a tile, a thread each: ends.out from ends.m and ends.l. All threads call it, when those stand.
template <class A, int Threads, int R, class Sync = void()>
QKV_DEVICE void finish_rows(const KernelArgs& args, const Task& task, const ScoreRule<A>& rule, const Lanes<R>& lanes,
                            RowEnds<A>& ends, const Sync& sync = sync_block) {
  static_assert(R <= Threads);
  const int row = thread_index();
  sync();
  if (row < R && row < lanes.live) {
    const RowId id{task.batch,      lanes.row[row],         lanes.query[row],
                   lanes.head[row], lanes.result_head[row], lanes.alive[row]};
    ends.out[row] = finish_row(args, rule, task.seq, id, ends.m[row], ends.l[row], true);
  }
  sync();
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
