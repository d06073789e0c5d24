// SPDX-License-Identifier: Apache-2.0
#include "device_problem.h"

#include <string.h>

namespace qkv::cuda {
namespace {

int64_t result_bytes(const Problem& p) {  // of lse
  const int64_t rows = p.cu_q ? p.Sq : p.B * result_rows(p);
  return rows * result_heads(p) * (p.dtype == DType::f64 ? 8 : 4);
}

}  // namespace

char* DeviceProblem::take(int64_t bytes) {
  buffers_.emplace_back(pool_, bytes, stream_);
  return buffers_.back().data();
}

template <class T>
void DeviceProblem::small(const T*& slot, int64_t n) {
  if (slot) small_.push_back({slot, n * static_cast<int64_t>(sizeof(T)), (void**)(&slot)});
}

void DeviceProblem::program() {
  nodes_.assign(host_.program.nodes, host_.program.nodes + host_.program.n);
  for (MaskNode& node : nodes_) small(node.data, node.n);
}

void DeviceProblem::gate() {
  View& view = problem.gate;
  if (!view.data) return;
  const Layout layout(host_, view, host_.Hq, host_.Sq, 1);
  gate_.resize(static_cast<size_t>(layout.bytes()));
  layout.gather(0, layout.bytes(), gate_.data());
  view = layout.on_device(nullptr);
  small_.push_back({gate_.data(), layout.bytes(), reinterpret_cast<void**>(&view.data)});
}

// One block and one copy for all small arrays. The nodes come last: by then their pointers are those of the device.
void DeviceProblem::send_small() {
  const auto aligned = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t node_bytes = static_cast<int64_t>(nodes_.size() * sizeof(MaskNode));
  int64_t bytes = aligned(node_bytes);
  for (const Small& s : small_) bytes += aligned(s.bytes);
  if (bytes == 0) return;
  char* const to = take(bytes);
  std::vector<char> block(static_cast<size_t>(bytes));
  int64_t at = 0;
  for (const Small& s : small_) {
    if (s.bytes) memcpy(block.data() + at, s.data, static_cast<size_t>(s.bytes));
    *s.slot = to + at;
    at += aligned(s.bytes);
  }
  if (node_bytes) memcpy(block.data() + at, nodes_.data(), static_cast<size_t>(node_bytes));
  problem.program.nodes = reinterpret_cast<const MaskNode*>(to + at);
  if (problem.device < 0) staging_.upload(block.data(), bytes, to);
  else check(copy(to, block.data(), block.size(), stream_), "copying to the GPU");  // pageable: returns when it is read
}

void DeviceProblem::input(View& view, int64_t H, int64_t S, int64_t D) {
  if (!view.data) return;
  const Layout layout(host_, view, H, S, D);
  char* const to = take(layout.bytes());
  staging_.upload(layout, to);
  view = layout.on_device(to);
}

DeviceProblem::DeviceProblem(const Problem& p, Pool& pool, Staging& staging, Stream* stream)
    : problem(p), host_(p), pool_(pool), staging_(staging), stream_(stream) {
  Problem& d = problem;
  d.control = nullptr;
  program();
  small(d.q_offset, p.B);
  small(d.q_lens, p.B);
  small(d.kv_lens, p.B);
  small(d.cu_q, p.B + 1);
  small(d.cu_k, p.B + 1);
  small(d.alibi, p.Hq);
  small(d.sinks, p.Hq);
  small(d.rows, p.n_rows);
  small(d.heads, p.n_heads);
  gate();
  send_small();
  const int64_t lse_bytes = result_bytes(p);
  if (p.weights && p.device < 0) d.weights = take(lse_bytes * p.Sk);
  if (p.weights) check(clear(d.weights, static_cast<size_t>(lse_bytes * p.Sk), stream_), "clearing the weights");
  if (p.device >= 0) return;
  input(d.q, p.Hq, p.Sq, p.D);
  input(d.k, p.Hkv, p.Sk, p.D);
  if (p.v.data) input(d.v, p.Hkv, p.Sk, p.Dv);
  input(d.mask, p.Hq, p.Sq, p.Sk);
  input(d.bias, p.Hq, p.Sq, p.Sk);
  if (p.out.data) {
    const Layout layout(p, p.out, p.Hq, p.Sq, p.Dv);
    d.out = layout.on_device(take(layout.bytes()));
  }
  if (p.lse) d.lse = take(lse_bytes);
  if (p.lse_in) {
    char* const to = take(lse_bytes);
    staging_.upload(p.lse_in, lse_bytes, to);
    d.lse_in = to;
  }
}

void DeviceProblem::fetch_results() {
  const Problem& p = host_;
  if (p.device >= 0) return;
  const int64_t lse_bytes = result_bytes(p);
  check(synchronize(stream_), "computing");  // what went wrong is known before anything is written
  if (p.out.data) staging_.download(problem.out.data, Layout(p, p.out, p.Hq, p.Sq, p.Dv));
  if (p.lse) staging_.download(static_cast<const char*>(problem.lse), lse_bytes, p.lse);
  if (p.weights) staging_.download(static_cast<const char*>(problem.weights), lse_bytes * p.Sk, p.weights);
}

}  // namespace qkv::cuda
