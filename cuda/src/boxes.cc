// SPDX-License-Identifier: Apache-2.0
#include "boxes.h"

#include "runtime.h"

namespace qkv::cuda {
namespace {

constexpr int64_t kColumns = 64, kRows = 64;             // of a box; rows: those of a warpgroup
constexpr int64_t kMostSize = (int64_t{1} << 31) - 256;  // a coordinate is an int, and a box reaches beyond the end
constexpr int64_t kMostStride = int64_t{1} << 40;        // in bytes

// Two dimensions from those of the batch elements: what is one run of equal steps becomes one.
bool join_leads(const Problem& p, const View& view, int64_t (&size)[2], int64_t (&stride)[2]) {
  int n = 0;  // runs, the innermost first
  size[0] = size[1] = 1;
  stride[0] = stride[1] = 0;
  for (int t = p.n_lead - 1; t >= 0; --t) {
    if (p.lead[t] == 1) continue;
    if (n > 0 && view.lead[t] == size[n - 1] * stride[n - 1]) {
      size[n - 1] *= p.lead[t];
      continue;
    }
    if (n == 2) return false;
    size[n] = p.lead[t];
    stride[n++] = view.lead[t];
  }
  return true;
}

// Boxes of `rows` rows of `heads` heads each.
void make_boxes(const Problem& p, const View& view, int64_t columns, int64_t n_heads, int64_t n_rows, int64_t heads,
                int64_t rows, Boxes& boxes) {
  boxes.there = 0;
  int64_t batch[2], lead_stride[2];
  if (!view.data || view.d != 1 || reinterpret_cast<uintptr_t>(view.data) % 16 || rows < 1) return;
  if (!join_leads(p, view, batch, lead_stride)) return;
  const int64_t size[5] = {columns, n_heads, n_rows, batch[0], batch[1]};
  const int64_t stride[4] = {view.h, view.s, lead_stride[0], lead_stride[1]};
  TensorShape shape{view.data, {static_cast<uint64_t>(columns)}, {}, {kColumns, 0, 0, 1, 1}};
  if (columns < 1 || columns > kMostSize) return;
  for (int i = 0; i < 4; ++i) {
    // Where all are the same there is one of them, which stands for all; of one there is no step.
    const bool same = size[i + 1] > 1 && stride[i] == 0, one = same || size[i + 1] == 1;
    if (same && (i == 1 || (i == 0 && heads > 1))) return;  // of rows and heads a box has several
    const int64_t n = one ? 1 : size[i + 1], bytes = one ? 16 : stride[i] * 2;
    if (n < 1 || n > kMostSize || bytes < 0 || bytes >= kMostStride || bytes % 16) return;
    shape.size[i + 1] = static_cast<uint64_t>(n);
    shape.stride[i] = static_cast<uint64_t>(bytes);
    if (i != 1) boxes.moves[i == 0 ? 0 : i - 1] = !same;
  }
  shape.box[1] = static_cast<uint32_t>(heads);
  shape.box[2] = static_cast<uint32_t>(rows);
  boxes.inner = batch[0];
  boxes.there = make_tensor_map(shape, &boxes.map);
}

}  // namespace

HopperArgs hopper_args(const KernelArgs& args, const Choice& choice) {
  HopperArgs h{};
  static_cast<KernelArgs&>(h) = args;
  h.modifies = choice.general;
  const Problem& p = args.problem;
  const int64_t keys = choice.tile().keys;
  const int64_t group = args.plan.group_size, heads = p.heads ? p.n_heads : p.Hq;
  const bool in_order = kRows % group == 0;  // rows of a tile: the heads of a group, query by query
  if (in_order && !p.rows) make_boxes(p, p.q, p.D, p.Hq, p.Sq, group, kRows / group, h.q);
  if (in_order) make_boxes(p, p.out, p.Dv, heads, result_rows(p), group, kRows / group, h.out);
  make_boxes(p, p.k, p.D, p.Hkv, p.Sk, 1, keys, h.k);
  make_boxes(p, p.v, p.Dv, p.Hkv, p.Sk, 1, keys, h.v);
  return h;
}

}  // namespace qkv::cuda
