// SPDX-License-Identifier: Apache-2.0
#include "device_problem.h"

#include <string.h>

#include <new>
#include <type_traits>

namespace qkv::cuda {
namespace {

int64_t item_bytes(const Problem& p) { return p.dtype == DType::f64 ? 8 : 4; }  // of A

int64_t result_bytes(const Problem& p) {  // of lse
  const int64_t rows = p.cu_q ? p.Sq : p.B * result_rows(p);
  return rows * result_heads(p) * item_bytes(p);
}

}  // namespace

int64_t received_bytes(const Problem& p) { return p.B * result_heads(p) * p.Sk * item_bytes(p); }

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

// (lead, Hq, Sq, D), a host array always.
void DeviceProblem::per_row(View& view, int64_t D) {
  if (!view.data) return;
  const Layout layout(host_, view, host_.Hq, host_.Sq, D);
  std::vector<char>& copy = per_row_.emplace_back(static_cast<size_t>(layout.bytes()));
  layout.gather(0, layout.bytes(), copy.data());
  view = layout.on_device(nullptr);
  small_.push_back({copy.data(), layout.bytes(), reinterpret_cast<void**>(&view.data)});
}

// One block and one copy for all small arrays. The nodes come last: by then their pointers are those of the device.
void DeviceProblem::send_small() {
  const auto aligned = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t node_bytes = static_cast<int64_t>(nodes_.size() * sizeof(MaskNode));
  int64_t bytes = aligned(node_bytes);
  for (const Small& s : small_) bytes += aligned(s.bytes);
  if (bytes == 0) return;
  std::vector<char> block(static_cast<size_t>(bytes));
  const auto fill = [&](const char* base) {
    uintptr_t to = reinterpret_cast<uintptr_t>(base);
    char* at = block.data();
    for (const Small& s : small_) {
      if (s.bytes) memcpy(at, s.data, static_cast<size_t>(s.bytes));
      *s.slot = reinterpret_cast<void*>(to);
      to += static_cast<uintptr_t>(aligned(s.bytes));
      at += aligned(s.bytes);
    }
    problem.program.nodes = reinterpret_cast<const MaskNode*>(to);
    for (const MaskNode& node : nodes_) {  // field by field: what lies between them is nobody's, and would be compared
      auto* const copy = new (at) MaskNode;
      copy->op = node.op;
      copy->a = node.a;
      copy->b = node.b;
      copy->data = node.data;
      copy->n = node.n;
      at += sizeof(MaskNode);
    }
  };
  if (problem.device < 0) {
    char* const to = take(bytes);
    fill(to);
    staging_.upload(block.data(), bytes, to);
    return;
  }
  bool there = false;
  fill(nullptr);  // what is compared does not depend on where it lies
  kept_.place = copies_.take(block, stream_, &there);
  const std::vector<char> compared = kept_.place && !there ? block : std::vector<char>();
  char* const to = kept_.place ? kept_.place : take(bytes);
  fill(to);
  if (there) return;
  check(copy_at_once(to, block.data(), block.size(), stream_), "copying to the GPU");
  if (kept_.place) copies_.sent(kept_.place, compared);
}

void DeviceProblem::input(View& view, int64_t H, int64_t S, int64_t D) {
  if (!view.data) return;
  const Layout layout(host_, view, H, S, D);
  char* const to = take(layout.bytes());
  staging_.upload(layout, to);
  view = layout.on_device(to);
}

DeviceProblem::DeviceProblem(const Problem& p, Pool& pool, SmallCopies& copies, Staging& staging, Stream* stream)
    : problem(p), host_(p), pool_(pool), copies_(copies), kept_{copies}, staging_(staging), stream_(stream) {
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
  if (!p.weight_there) small(d.weight, p.D);
  per_row(d.gate, 1);
  per_row(d.focus.centre, 1);
  if (p.distances.n && p.device >= 0) per_row(d.bias, p.distances.n);
  send_small();
  const int64_t lse_bytes = result_bytes(p);
  if (p.weights && p.device < 0) d.weights = take(lse_bytes * p.Sk);
  const bool scores = p.normalizer == Normalizer::none;  // where masked they are what the caller put there
  if (p.weights && scores) staging_.upload(p.weights, lse_bytes * p.Sk, static_cast<char*>(d.weights));
  else if (p.weights) check(clear(d.weights, static_cast<size_t>(lse_bytes * p.Sk), stream_), "clearing the weights");
  statistics();
  if (p.lse_in) {
    char* const to = take(lse_bytes);
    if (p.device < 0) staging_.upload(p.lse_in, lse_bytes, to);
    else check(copy_at_once(to, p.lse_in, static_cast<size_t>(lse_bytes), stream_), "copying to the GPU");
    d.lse_in = to;
  }
  if (p.device >= 0) return;
  input(d.q, p.Hq, p.Sq, p.D);
  input(d.k, p.Hkv, p.Sk, p.D);
  if (p.v.data) input(d.v, p.Hkv, p.Sk, p.Dv);
  input(d.mask, p.Hq, p.Sq, p.Sk);
  input(d.bias, p.Hq, p.Sq, p.distances.n ? p.distances.n : p.Sk);
  if (p.out.data) {
    const Layout layout(p, p.out, p.Hq, p.Sq, p.Dv);
    char* const to = take(layout.bytes());
    // No kernel writes the padding, but it is copied back with the rows: nothing leaves the GPU that nobody wrote.
    if (layout.padded()) check(clear(to, static_cast<size_t>(layout.bytes()), stream_), "clearing a result");
    d.out = layout.on_device(to);
  }
  if (p.lse) d.lse = take(lse_bytes);
}

// Room for them where the caller's is in host memory. Rows write theirs; what keys receive is added up.
void DeviceProblem::statistics() {
  const StatsOut& asked = host_.stats;
  StatsOut& out = problem.stats;
  const int64_t rows = result_bytes(host_) / item_bytes(host_), index = static_cast<int64_t>(sizeof(int64_t));
  const auto room = [&](auto*& slot, int64_t bytes) {
    if (!slot) return;
    if (host_.device < 0) results_.push_back({slot, bytes, take(bytes)});
    if (host_.device < 0) slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(results_.back().from);
  };
  room(out.entropy, result_bytes(host_));
  room(out.max, result_bytes(host_));
  room(out.argmax, rows * index);
  room(out.received, received_bytes(host_));
  room(out.distance, result_bytes(host_));
  room(out.top_p, result_bytes(host_) * asked.k_top);
  room(out.top_j, rows * asked.k_top * index);
  if (asked.received)
    check(clear(out.received, static_cast<size_t>(received_bytes(host_)), stream_), "clearing a result");
}

void DeviceProblem::fetch_results() {
  const Problem& p = host_;
  if (p.device >= 0) return;
  const int64_t lse_bytes = result_bytes(p);
  check(synchronize(stream_), "computing");  // what went wrong is known before anything is written
  if (p.out.data) staging_.download(problem.out.data, Layout(p, p.out, p.Hq, p.Sq, p.Dv));
  if (p.lse) staging_.download(static_cast<const char*>(problem.lse), lse_bytes, p.lse);
  if (p.weights) staging_.download(static_cast<const char*>(problem.weights), lse_bytes * p.Sk, p.weights);
  for (const Result& r : results_) staging_.download(r.from, r.bytes, r.to);
}

}  // namespace qkv::cuda
