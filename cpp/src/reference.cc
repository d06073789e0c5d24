// SPDX-License-Identifier: Apache-2.0
// The backend "reference": the definition in float64, one row at a time, as a textbook would write it. It shares
// the mask semantics (qkv/mask.h) with the kernels and nothing else.
#include <math.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/parallel.h"
#include "qkv/backend.h"
#include "qkv/softmax.h"

namespace qkv {
namespace {

double at(const View& x, int64_t element) { return load_as_double(x.data, x.dtype, element); }

struct Row {  // one result row
  int64_t batch, head, result_head, row, query;
  Sequence seq;
};

double bias(const Problem& p, const Row& r, int64_t j) {
  const int64_t row = lead_offset(p, p.bias, r.batch) + r.head * p.bias.h + r.query * p.bias.s;
  return at(p.bias, row + bias_column(p, r.seq.offset + r.query, j));
}

bool visible(const Problem& p, const Row& r, int64_t j) {
  const int64_t position = r.seq.offset + r.query;
  if (!(mask_bits(p.program, r.batch, position, j) & 1u)) return false;
  if (p.bias.data && bias(p, r, j) == -HUGE_VAL) return false;
  if (p.focus.centre.data) {
    if (!(focus_bits(p.focus.reach, focus_centre(p, r.batch, r.head, r.query), j) & 1u)) return false;
  }
  if (!p.mask.data) return true;
  const int64_t lead = lead_offset(p, p.mask, r.batch);
  return at(p.mask, lead + r.head * p.mask.h + r.query * p.mask.s + j * p.mask.d) != 0;
}

double score(const Problem& p, const Row& r, int64_t j) {
  const int64_t kv_head = r.head / (p.Hq / p.Hkv);
  const int64_t q0 = lead_offset(p, p.q, r.batch) + r.head * p.q.h + (r.seq.q_row + r.query) * p.q.s;
  const int64_t k0 = lead_offset(p, p.k, r.batch) + kv_head * p.k.h + (r.seq.k_row + j) * p.k.s;
  double s = 0;
  for (int64_t d = 0; d < p.D; ++d) {
    const double a = at(p.q, q0 + d * p.q.d), b = at(p.k, k0 + d * p.k.d);
    s += p.score == Score::additive ? p.weight[d] * tanh(a + b) : a * b;
  }
  s *= p.scale;
  if (p.softcap != 0) s = p.softcap * tanh(s / p.softcap);
  if (p.bias.data) s += bias(p, r, j);
  if (p.alibi) s -= p.alibi[r.head] * fabs(static_cast<double>(r.seq.offset + r.query - j));
  return s;
}

// The threshold t of the m largest scores z, falling, such that the weights above it sum to 1. Martins & Astudillo
// 2016, algorithm 1; Peters, Niculae & Martins 2019, algorithm 2.
double threshold(Normalizer kind, std::vector<double>& z) {
  std::sort(z.begin(), z.end(), std::greater<>());
  double t = 0, mean = 0, square = 0;  // square = sum (z - mean)^2
  for (size_t i = 0; i < z.size(); ++i) {
    const auto m = static_cast<double>(i + 1);
    const double d = z[i] - mean;
    mean += d / m;
    square += d * (z[i] - mean);
    if (kind == Normalizer::entmax15 && square > 1) break;
    const double next = kind == Normalizer::sparsemax ? mean - 1 / m : mean - sqrt((1 - square) / m);
    if (next > z[i]) break;
    t = next;
  }
  return t;
}

// Scores of the n keys, where seen -> weights. A NaN or +inf among them makes them all NaN.
void normalise(Normalizer kind, int64_t n, std::vector<double>& w, const std::vector<char>& seen) {
  const double unit = kind == Normalizer::entmax15 ? 0.5 : 1;
  double most = -HUGE_VAL;
  int64_t first = -1;
  bool odd = false;
  for (int64_t j = 0; j < n; ++j) {
    if (!seen[j]) continue;
    odd = odd || !(w[j] < HUGE_VAL);
    if (!(w[j] > most)) continue;
    most = w[j];
    first = j;
  }
  std::vector<double> candidates;  // no other reaches t >= max - 1
  for (int64_t j = 0; j < n; ++j) {
    if (seen[j] && unit * (w[j] - most) > -1) candidates.push_back(unit * (w[j] - most));
  }
  const double t = threshold(kind, candidates);
  for (int64_t j = 0; j < n; ++j) {
    if (!seen[j]) continue;
    const double over = std::max(unit * (w[j] - most) - t, 0.0);
    if (odd) w[j] = NAN;
    else if (kind == Normalizer::sigmoid) w[j] = w[j] < 0 ? exp(w[j]) / (1 + exp(w[j])) : 1 / (1 + exp(-w[j]));
    else if (kind == Normalizer::sparsemax) w[j] = over;
    else if (kind == Normalizer::entmax15) w[j] = over * over;
    else w[j] = j == first;
  }
}

// Weights of the row over its keys, exactly 0 where masked; returns lse.
double weigh(const Problem& p, const Row& r, std::vector<double>& w, std::vector<char>& seen) {
  const bool padding = r.query >= r.seq.Sq;
  const int64_t n = r.seq.Sk;
  SoftmaxState state;
  for (int64_t j = 0; j < n; ++j) {
    seen[j] = !padding && visible(p, r, j);
    if (!seen[j]) continue;
    w[j] = score(p, r, j);
    if (w[j] == -HUGE_VAL) seen[j] = 0;  // masked
    else state.merge({w[j], 1});
  }
  if (p.sinks && !padding) state.merge({p.sinks[r.head], 1});
  if (p.lse_in && !padding) {
    const DType t = p.dtype == DType::f64 ? DType::f64 : DType::f32;
    state = {load_as_double(p.lse_in, t, result_index(p, r.batch, r.result_head, r.row)), 1};
  }
  if (p.normalizer == Normalizer::none) {
    for (int64_t j = 0; j < n; ++j) w[j] = seen[j] ? w[j] : -HUGE_VAL;
    return -HUGE_VAL;
  }
  if (p.normalizer != Normalizer::softmax) {
    for (int64_t j = 0; j < n; ++j) w[j] = seen[j] ? w[j] : 0;
    normalise(p.normalizer, n, w, seen);
    return -HUGE_VAL;
  }
  // Not exp(s - lse): where the scores are large, lse cannot hold log l beside m.
  for (int64_t j = 0; j < n; ++j) w[j] = seen[j] ? exp(w[j] - state.m) / state.l : 0;
  return state.lse();
}

void write_output(const Problem& p, const Row& r, const std::vector<double>& w, const std::vector<char>& seen) {
  const int64_t kv_head = r.head / (p.Hq / p.Hkv);
  const int64_t v0 = lead_offset(p, p.v, r.batch) + kv_head * p.v.h + r.seq.k_row * p.v.s;
  const int64_t o0 = lead_offset(p, p.out, r.batch) + r.result_head * p.out.h + (r.seq.q_row + r.row) * p.out.s;
  double gate = 1;
  if (p.gate.data) gate = at(p.gate, lead_offset(p, p.gate, r.batch) + r.head * p.gate.h + r.query * p.gate.s);
  bool any = false;
  for (int64_t j = 0; j < r.seq.Sk; ++j) any = any || seen[j];
  for (int64_t d = 0; d < p.Dv; ++d) {
    double o = 0;
    for (int64_t j = 0; j < r.seq.Sk; ++j) {
      if (!seen[j]) continue;
      double share = w[j];
      if (p.dropout.threshold) {
        share *= dropout_keeps(p.dropout, r.batch, r.head, r.query, j) ? p.dropout.scale : 0;
      }
      o += share * at(p.v, v0 + j * p.v.s + d * p.v.d);
    }
    store_from_double(p.out.data, p.dtype, o0 + d * p.out.d, any ? gate * o : 0);
  }
}

void write_stats(const Problem& p, const Row& r, const std::vector<double>& w, const std::vector<char>& seen) {
  const StatsOut& out = p.stats;
  const DType t = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t i = result_index(p, r.batch, r.result_head, r.row);
  double entropy = 0, distance = 0, most = 0;
  int64_t argmax = -1;
  std::vector<int64_t> order;
  for (int64_t j = 0; j < r.seq.Sk; ++j) {
    if (!seen[j]) continue;
    if (w[j] != 0) entropy -= w[j] * log(w[j]);
    distance += w[j] * fabs(static_cast<double>(r.seq.offset + r.query - j));
    if (argmax < 0 || w[j] > most) {
      argmax = j;
      most = w[j];
    }
    if (out.received) {
      const int64_t at_key = (r.batch * result_heads(p) + r.result_head) * p.Sk + j;
      store_from_double(out.received, t, at_key, load_as_double(out.received, t, at_key) + w[j]);
    }
    size_t place = order.size();
    while (place > 0 && w[j] > w[order[place - 1]]) --place;
    order.insert(order.begin() + static_cast<std::ptrdiff_t>(place), j);
    if (static_cast<int64_t>(order.size()) > out.k_top) order.pop_back();
  }
  if (out.entropy) store_from_double(out.entropy, t, i, entropy);
  if (out.distance) store_from_double(out.distance, t, i, distance);
  if (out.max) store_from_double(out.max, t, i, most);
  if (out.argmax) out.argmax[i] = argmax;
  for (size_t k = 0; out.top_p && k < order.size(); ++k) {
    store_from_double(out.top_p, t, i * out.k_top + static_cast<int64_t>(k), w[order[k]]);
    out.top_j[i * out.k_top + static_cast<int64_t>(k)] = order[k];
  }
}

// local_p: a factor of each weight, after the normalizer.
void apply_focus(const Problem& p, const Row& r, std::vector<double>& w, const std::vector<char>& seen) {
  if (!p.focus.centre.data) return;
  const double centre = focus_centre(p, r.batch, r.head, r.query), sigma = p.focus.reach / 2;
  for (int64_t j = 0; j < r.seq.Sk; ++j) {
    const double x = static_cast<double>(j) - centre;
    if (seen[j]) w[j] *= exp(-x * x / (2 * sigma * sigma));
  }
}

void run_row(const Problem& p, const Row& r, std::vector<double>& w, std::vector<char>& seen) {
  const DType t = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const double lse = weigh(p, r, w, seen);
  apply_focus(p, r, w, seen);
  const int64_t i = result_index(p, r.batch, r.result_head, r.row);
  if (p.lse) store_from_double(p.lse, t, i, lse);
  if (p.out.data) write_output(p, r, w, seen);
  for (int64_t j = 0; p.weights && j < r.seq.Sk; ++j) store_from_double(p.weights, t, i * p.Sk + j, w[j]);
  write_stats(p, r, w, seen);
}

void run_reference(const Problem& p) {
  std::vector<double> w(static_cast<size_t>(p.Sk));
  std::vector<char> seen(static_cast<size_t>(p.Sk));
  for (int64_t b = 0; b < p.B; ++b) {
    const Sequence seq = sequence(p, b);
    const int64_t rows = p.cu_q ? seq.Sq : result_rows(p);
    for (int64_t h = 0; h < result_heads(p); ++h) {
      for (int64_t row = 0; row < rows; ++row) {
        run_row(p, {b, p.heads ? p.heads[h] : h, h, row, p.rows ? p.rows[row] : row, seq}, w, seen);
        if (p.control && p.control->poll && row % 16 == 15) p.control->poll(*p.control);
        if (stopped(p)) return;
      }
    }
  }
}

}  // namespace

extern const Backend reference_backend;
const Backend reference_backend{
    "reference",
    [](std::string&) { return true; },
    [](const Problem&, std::string&) { return true; },
    run_reference,
    [](const Problem&) { return std::string("textbook in float64, one thread"); },
};

}  // namespace qkv
