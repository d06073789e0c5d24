// SPDX-License-Identifier: Apache-2.0
// The contract: plain structs that cross every border (Python -> C++, core -> backend, core -> level).
// Letters: B flattened leading dimensions, Hq query heads, Hkv key/value heads, Sq queries, Sk keys, D head_dim
// of q and k, Dv of v. Strides are in elements and may be zero or negative.
#pragma once

#include "qkv/dropout.h"
#include "qkv/dtype.h"
#include "qkv/mask.h"

namespace qkv {

constexpr int kMaxLead = 8;  // leading dimensions after merging

struct View {            // (lead..., heads, rows, columns)
  char* data = nullptr;  // nullptr: not given
  DType dtype = DType::f32;
  int64_t lead[kMaxLead] = {};
  int64_t h = 0, s = 0, d = 0;
};

// One running call. Kernels poll stop between pieces of work of a few milliseconds; only the thread that made
// the call runs poll, which may set stop (Ctrl-C).
struct Control {
  int stop = 0;  // read and written with relaxed atomics
  void (*poll)(Control&) = nullptr;
  void* user = nullptr;
};

struct StatsOut {             // attention_stats; nullptr = not asked for; A = float, double for float64
  void* entropy = nullptr;    // (B, heads, rows) A   - sum p log p
  void* max = nullptr;        // (B, heads, rows) A
  int64_t* argmax = nullptr;  // (B, heads, rows)     lowest j on ties, -1 for an empty row
  void* received = nullptr;   // (B, heads, Sk) A     sum of p over the rows
  void* distance = nullptr;   // (B, heads, rows) A   sum p |p_i - j|
  void* top_p = nullptr;      // (B, heads, rows, k_top) A, falling
  int64_t* top_j = nullptr;   // (B, heads, rows, k_top), -1 where there is no key
  int64_t k_top = 0;
};

// What makes weights of a row of scores s. softmax1 is a softmax with a sink of 0. The others have no log-sum-exp and
// take no sink.
enum class Normalizer : int32_t {
  softmax,    // e^s / sum e^s
  sigmoid,    // 1 / (1 + e^-s)
  sparsemax,  // max(s - t, 0), its sum 1
  entmax15,   // max(s / 2 - t, 0)^2, its sum 1
  hardmax,    // 1 for the largest s, of equals the first; 0 for the others
  none,       // s itself, -inf where masked: what alignments that are no weights of a row are made of
};

constexpr const char* name(Normalizer n) {
  switch (n) {
    case Normalizer::softmax: return "softmax";
    case Normalizer::sigmoid: return "sigmoid";
    case Normalizer::sparsemax: return "sparsemax";
    case Normalizer::entmax15: return "entmax15";
    case Normalizer::hardmax: return "hardmax";
    case Normalizer::none: return "none";
  }
  return "?";
}

// How a query and a key make a score, before the scale.
enum class Score : int32_t {
  dot,       // q . k
  additive,  // sum over d of weight_d tanh(q_d + k_d); q and k, projected already, are float64 or else float32
};

struct Focus {   // of each row on the keys near a centre, where given: centre +- reach, the others are masked
  View centre;   // (lead, Hq, Sq) f64, counted in keys; NaN: sees all
  double reach;  // the normalizer's weights are multiplied by exp(-(j - centre)^2 / (2 (reach / 2)^2))
};

struct Distances {  // of a bias that knows how far a key is behind its query, where given
  int64_t n = 0;    // element clamp(p - j - least, 0, n - 1) of a row of the bias takes the place of element j
  int64_t least = 0;
  bool plain = false;  // A, contiguous, the same for all queries and batch elements, no element beyond 2^100
};

struct Problem {
  const char* function = "attention";  // for messages

  int n_lead = 0;
  int64_t lead[kMaxLead] = {};
  int64_t B = 1;  // product of lead
  int64_t Hq = 1, Hkv = 1, Sq = 0, Sk = 0, D = 1, Dv = 0;

  DType dtype = DType::f32;  // of q, k, v and out; where scores are additive, of v and out
  View q;                    // (lead, Hq, Sq, D)
  View k;                    // (lead, Hkv, Sk, D)
  View v;                    // (lead, Hkv, Sk, Dv), or nullptr when only weights or statistics are asked for
  View out;                  // (lead, Hq, Sq, Dv)

  View mask;  // (lead, Hq, Sq, Sk) bool
  View bias;  // (lead, Hq, Sq, Sk or distances.n) any float dtype
  Distances distances;
  View gate;                        // (lead, Hq, Sq) f64: head_gate
  MaskProgram program{nullptr, 0};  // mask object, causal and window, in one

  const int64_t* q_offset = nullptr;  // (B,)
  const int64_t* q_lens = nullptr;    // (B,)
  const int64_t* kv_lens = nullptr;   // (B,)
  const int64_t* cu_q = nullptr;      // (B + 1,) packed: sequence b owns rows cu_q[b] ... cu_q[b + 1] - 1 of q
  const int64_t* cu_k = nullptr;      // (B + 1,)

  Score score = Score::dot;
  const double* weight = nullptr;  // (D,) of additive scores
  bool weight_there = false;       // it lies on the device, as q does
  double scale = 1;
  double softcap = 0;             // 0: off
  const double* alibi = nullptr;  // (Hq,)
  const double* sinks = nullptr;  // (Hq,)
  Normalizer normalizer = Normalizer::softmax;
  Focus focus{};
  Dropout dropout;  // of the weights that meet v; lse, returned weights and statistics are those before it

  const int64_t* rows = nullptr;  // (n_rows,) the queries asked for, each in 0...Sq-1; nullptr: all
  int64_t n_rows = 0;
  const int64_t* heads = nullptr;  // (n_heads,)
  int64_t n_heads = 0;

  const void* lse_in = nullptr;  // (B, heads, rows) A, a host array: the normaliser, when the caller knows it
  void* lse = nullptr;           // (B, heads, rows) A; packed: (heads, rows)
  void* weights = nullptr;       // (B, heads, rows, Sk) A
  StatsOut stats;

  int max_threads = 1;
  Control* control = nullptr;

  // Where q, k, v, mask, bias, out and the results live: -1 in host memory, else the ordinal of a CUDA device, whose
  // work goes to stream. Offsets, lengths, indices, per-head vectors and a bias by distance are host arrays always.
  int device = -1;
  void* stream = nullptr;
};

struct Sequence {        // what one batch element sees
  int64_t q_row, k_row;  // first row in q and out, in k and v
  int64_t Sq, Sk;        // own lengths
  int64_t offset;        // position of its first query
};

inline namespace QKV_LEVEL {

QKV_HD inline Sequence sequence(const Problem& p, int64_t b) {
  Sequence s{0, 0, p.Sq, p.Sk, 0};
  if (p.cu_q) {
    s.q_row = p.cu_q[b];
    s.k_row = p.cu_k[b];
    s.Sq = p.cu_q[b + 1] - p.cu_q[b];
    s.Sk = p.cu_k[b + 1] - p.cu_k[b];
  }
  if (p.q_lens) s.Sq = p.q_lens[b];
  if (p.kv_lens && !mutant(5)) s.Sk = p.kv_lens[b];
  s.offset = p.q_offset ? p.q_offset[b] : (mutant(6) ? 0 : s.Sk - s.Sq);
  return s;
}

// The most keys that a sequence has.
inline int64_t longest_keys(const Problem& p) {
  if (!p.cu_k) return p.Sk;
  int64_t most = 0;
  for (int64_t b = 0; b < p.B; ++b) most = p.cu_k[b + 1] - p.cu_k[b] > most ? p.cu_k[b + 1] - p.cu_k[b] : most;
  return most;
}

// Element offset of batch element b.
QKV_HD inline int64_t lead_offset(const Problem& p, const View& v, int64_t b) {
  int64_t offset = 0;
  QKV_ROLLED
  for (int t = p.n_lead - 1; t > 0; --t) {
    offset += b % p.lead[t] * (mutant(7) ? 0 : v.lead[t]);
    b /= p.lead[t];
  }
  return p.n_lead > 0 ? offset + b * v.lead[0] : 0;
}

QKV_HD inline double focus_centre(const Problem& p, int64_t batch, int64_t head, int64_t query) {
  const View& c = p.focus.centre;
  return reinterpret_cast<const double*>(c.data)[lead_offset(p, c, batch) + head * c.h + query * c.s];
}

// Which of 32 keys from j0 on lie within the reach of a centre.
QKV_HD inline uint32_t focus_bits(double reach, double centre, int64_t j0) {
  const auto from_centre = [&](int64_t j) { return static_cast<double>(j) - centre; };
  if (from_centre(j0) > reach + 1 || from_centre(j0 + 31) < -reach) return 0;
  uint32_t bits = 0;
  for (int t = 0; t < 32; ++t) {
    const double d = from_centre(j0 + t);
    bits |= static_cast<uint32_t>(!(d > reach + mutant(65)) && !(d < -reach)) << t;
  }
  return bits;
}

// Offset within its row of the bias of key j for a query at position p.
QKV_HD inline int64_t bias_column(const Problem& p, int64_t position, int64_t j) {
  if (!p.distances.n) return j * p.bias.d;
  const int64_t t = position - j - p.distances.least, last = p.distances.n - 1;
  return (t < 0 ? 0 : (t > last ? last : t)) * p.bias.d;
}

// How many rows and heads the results have.
QKV_HD inline int64_t result_rows(const Problem& p) { return p.rows ? p.n_rows : p.Sq; }
QKV_HD inline int64_t result_heads(const Problem& p) { return p.heads ? p.n_heads : p.Hq; }

// Index of row r of result head h of batch element b in lse and the per-row statistics. A packed result is
// (heads, T): its rows are those of q.
QKV_HD inline int64_t result_index(const Problem& p, int64_t b, int64_t h, int64_t r) {
  if (p.cu_q) return h * p.Sq + p.cu_q[b] + r;
  return (b * result_heads(p) + h) * result_rows(p) + r;
}

inline bool stopped(const Problem& p) { return p.control && __atomic_load_n(&p.control->stop, __ATOMIC_RELAXED) != 0; }

}  // namespace QKV_LEVEL

}  // namespace qkv
