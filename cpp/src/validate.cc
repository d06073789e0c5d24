// SPDX-License-Identifier: Apache-2.0
// Every check that a problem can fail once its arrays are known, with its message. Kernels assume all of it.
#include <math.h>

#include <string>

#include "qkv/qkv.h"

namespace qkv {
namespace {

using std::to_string;

[[noreturn]] void refuse(const Problem& p, const std::string& text) {
  throw ValueError(std::string(p.function) + ": " + text);
}

constexpr int64_t kMaxExtent = int64_t{1} << 40;
constexpr int64_t kMaxPosition = int64_t{1} << 60;

void check_sizes(const Problem& p) {
  if (p.n_lead < 0 || p.n_lead > kMaxLead) {
    refuse(p, "q, k and v have " + to_string(p.n_lead) + " leading dimensions; at most " + to_string(kMaxLead) +
                  " of more than one element are supported");
  }
  for (const int64_t n : {p.B, p.Hq, p.Hkv, p.Sq, p.Sk, p.D, p.Dv}) {
    if (n < 0 || n > kMaxExtent) refuse(p, "an array has a dimension of " + to_string(n) + "; expected 0 to 2^40");
  }
  if (p.D == 0) refuse(p, "q and k have head_dim 0; expected at least 1");
  if (p.Hkv == 0 ? p.Hq != 0 : p.Hq % p.Hkv != 0) {
    refuse(p, "q has " + to_string(p.Hq) + " heads, k has " + to_string(p.Hkv) +
                  "; the heads of q must be a multiple of the heads of k");
  }
  int64_t size = static_cast<int64_t>(sizeof(double));
  for (const int64_t n : {p.B, p.Hq, p.Sq, p.weights ? p.Sk : p.Dv}) {
    if (n != 0 && __builtin_mul_overflow(size, n, &size)) refuse(p, "the result would have more than 2^63 bytes");
  }
}

void check_scalars(const Problem& p) {
  if (!isfinite(p.scale)) refuse(p, "scale is " + to_string(p.scale) + "; expected a finite number");
  if (!isfinite(p.softcap) || p.softcap < 0) {
    refuse(p, "softcap is " + to_string(p.softcap) + "; expected a finite number above 0, or None or 0 for none");
  }
}

void check_range(const Problem& p, const char* name, const int64_t* x, int64_t lo, int64_t hi, const char* meaning) {
  for (int64_t b = 0; x && b < p.B; ++b) {
    if (x[b] >= lo && x[b] <= hi) continue;
    refuse(p, std::string(name) + "[" + to_string(b) + "] is " + to_string(x[b]) + "; expected " + to_string(lo) +
                  " to " + to_string(hi) + meaning);
  }
}

void check_packed(const Problem& p, const char* name, const int64_t* cu, int64_t rows, const char* array) {
  if (!cu) return;
  if (cu[0] != 0) refuse(p, std::string(name) + " starts at " + to_string(cu[0]) + "; expected 0");
  for (int64_t b = 0; b < p.B; ++b) {
    if (cu[b + 1] >= cu[b]) continue;
    refuse(p, std::string(name) + " falls from " + to_string(cu[b]) + " to " + to_string(cu[b + 1]) + " at index " +
                  to_string(b + 1) + "; offsets never fall");
  }
  if (cu[p.B] != rows) {
    refuse(p, std::string(name) + " ends at " + to_string(cu[p.B]) + "; " + array + " has " + to_string(rows) +
                  " rows, expected the same");
  }
}

void check_indices(const Problem& p, const char* name, const int64_t* x, int64_t n, int64_t limit) {
  for (int64_t i = 0; x && i < n; ++i) {
    if (x[i] >= 0 && x[i] < limit) continue;
    throw IndexError(std::string(p.function) + ": " + name + "[" + to_string(i) + "] is " + to_string(x[i]) +
                     "; expected 0 to " + to_string(limit - 1) + ", or negative to count from the end");
  }
}

void check_mask(const Problem& p) {
  int depth = 0;
  for (int i = 0; i < p.program.n; ++i) {
    const MaskNode& m = p.program.nodes[i];
    const bool binary = m.op == MaskOp::And || m.op == MaskOp::Or;
    depth += binary ? -1 : (m.op == MaskOp::Not ? 0 : 1);
    if (depth < 1 || depth > kMaskStack) refuse(p, "mask is not a valid program");
    if (m.op == MaskOp::Lengths && m.n != 1 && m.n != p.B) {
      refuse(p, "mask: lengths has " + to_string(m.n) + " entries; expected 1 or one for each of the " +
                    to_string(p.B) + " batch elements");
    }
  }
  if (p.program.n != 0 && depth != 1) refuse(p, "mask is not a valid program");
}

void check_normalizer(const Problem& p) {
  const char* option = p.sinks ? "sinks" : (p.lse ? "return_lse" : (p.lse_in ? "lse" : nullptr));
  if (p.normalizer != Normalizer::softmax && option) {
    refuse(p, std::string(option) + " with normalizer='" + name(p.normalizer) + "'; expected 'softmax' or 'softmax1'");
  }
}

void check_distances(const Problem& p) {
  const Distances& d = p.distances;
  if (d.n >= 0 && d.n <= kMaxExtent && d.least >= -kMaxPosition && d.least <= kMaxPosition) return;
  refuse(p, "bias has " + to_string(d.n) + " distances from " + to_string(d.least) + " on; expected at most 2^40");
}

void check_focus(const Problem& p) {
  if (!p.focus.centre.data || (isfinite(p.focus.reach) && p.focus.reach > 0)) return;
  refuse(p, "window is " + to_string(p.focus.reach) + "; expected a finite number above 0");
}

// The counter of a weight's random word has 32 bits for each index, 34 for the key's.
void check_dropout(const Problem& p) {
  constexpr int64_t kMost = int64_t{1} << 32;
  if (p.dropout.threshold == 0 || (p.B <= kMost && p.Hq <= kMost && p.Sq <= kMost && p.Sk <= 4 * kMost)) return;
  refuse(p, "dropout_p with a dimension of more than 2^32; expected at most 2^32 (2^34 keys)");
}

}  // namespace

void validate(const Problem& p) {
  check_sizes(p);
  check_scalars(p);
  check_range(p, "q_lens", p.q_lens, 0, p.Sq, ", the length of q");
  check_range(p, "kv_lens", p.kv_lens, 0, p.Sk + mutant(23), ", the length of k and v");
  check_range(p, "q_offset", p.q_offset, -kMaxPosition, kMaxPosition, "");
  check_packed(p, "cu_q", p.cu_q, p.Sq, "q");
  check_packed(p, "cu_k", p.cu_k, p.Sk, "k");
  check_indices(p, "rows", p.rows, p.n_rows, p.Sq);
  check_indices(p, "heads", p.heads, p.n_heads, p.Hq);
  check_mask(p);
  check_normalizer(p);
  check_distances(p);
  check_focus(p);
  check_dropout(p);
}

}  // namespace qkv
