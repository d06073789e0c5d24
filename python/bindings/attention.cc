// SPDX-License-Identifier: Apache-2.0
// attention and its relatives, one line per step of a call.
#include "call.h"
#include "register.h"

namespace qkv::python {

using std::string;
using std::to_string;

void Call::packed(py::handle cu_q, py::handle cu_k) {
  Problem& p = problem;
  if (!lead_.empty() || !has_heads_) {
    string found;
    for (int i = 0; i < n_inputs_; ++i) found += (i == 0 ? "" : ", ") + shape_text(inputs_[i]);
    value_error("q, k and v have shapes " + found + "; expected packed arrays of 3 dimensions, (T, H, D)");
  }
  Py_ssize_t n = 0, m = 0;
  p.cu_q = integers("cu_q", cu_q, n);
  p.cu_k = integers("cu_k", cu_k, m);
  if (n < 1) value_error("cu_q is empty; expected the offsets of each sequence and the end, starting at 0");
  if (n != m) {
    value_error("cu_q has " + to_string(n) + " entries, cu_k has " + to_string(m) + "; they must have the same number");
  }
  p.B = n - 1;
  p.n_lead = 1;  // sequences differ by rows, not by strides
  p.lead[0] = p.B > 0 ? p.B : 1;
  lead_ = {static_cast<Py_ssize_t>(p.B)};
}

namespace {

using py::handle;

py::object attention(handle q, handle k, handle v, handle options, handle layout, handle dtype, handle return_lse,
                     handle return_weights, handle out, handle backend) {
  Call call("attention");
  call.arrays(q, k, v, layout, dtype);
  call.options(options);
  call.make_out(out);
  const bool with_lse = call.flag("return_lse", return_lse), with_weights = call.flag("return_weights", return_weights);
  py::object lse = py::none(), weights = py::none();
  if (with_lse) lse = call.make_lse();
  if (with_weights) weights = call.make_weights();
  call.run(backend);
  if (!with_lse && !with_weights) return call.out();
  return py::make_tuple(call.out(), lse, weights);
}

py::object attention_varlen(handle q, handle k, handle v, handle cu_q, handle cu_k, handle options, handle dtype,
                            handle return_lse, handle out, handle backend) {
  Call call("attention_varlen");
  py::str layout("BSHD");  // packed rows come before the heads
  call.arrays(q, k, v, layout, dtype);
  call.packed(cu_q, cu_k);
  call.options(options);
  call.make_out(out);
  const bool with_lse = call.flag("return_lse", return_lse);
  py::object lse = py::none();
  if (with_lse) lse = call.make_lse();
  call.run(backend);
  return with_lse ? py::object(py::make_tuple(call.out(), lse, py::none())) : call.out();
}

py::object attention_weights(handle q, handle k, handle rows, handle heads, handle lse, handle options, handle layout,
                             handle dtype, handle backend) {
  Call call("attention_weights");
  call.arrays(q, k, handle(), layout, dtype);
  call.options(options);
  call.select(rows, heads);
  call.given_lse(lse);
  py::object weights = call.make_weights();
  call.run(backend);
  return weights;
}

// Returns a dict of the statistics asked for.
py::object attention_stats(handle q, handle k, const py::set& wanted, Py_ssize_t k_top, handle lse, handle options,
                           handle layout, handle dtype, handle backend) {
  Call call("attention_stats");
  call.arrays(q, k, handle(), layout, dtype);
  call.options(options);
  call.given_lse(lse);
  StatsOut& stats = call.problem.stats;
  const py::dtype real = accumulator_dtype(call.problem.dtype), index = py::dtype::of<int64_t>();
  py::dict results;
  const auto asked = [&](const char* name) { return wanted.contains(name); };
  const auto zeros = [&](const char* name, const Shape& shape) {
    void* data = nullptr;
    results[name] = call.make_statistic(real, shape, 0, &data);
    return data;
  };
  const auto keys = [&](const char* name, const Shape& shape) {  // -1 each
    void* data = nullptr;
    results[name] = call.make_statistic(index, shape, 0xff, &data);
    return static_cast<int64_t*>(data);
  };
  if (asked("entropy")) stats.entropy = zeros("entropy", call.per_row());
  if (asked("distance")) stats.distance = zeros("distance", call.per_row());
  if (asked("max") || asked("argmax")) {  // each needs the other
    stats.max = zeros("max", call.per_row());
    stats.argmax = keys("argmax", call.per_row());
  }
  if (asked("received")) stats.received = zeros("received", call.per_key());
  if (asked("topk")) {
    stats.top_p = zeros("top_p", call.per_row(k_top));
    stats.top_j = keys("top_j", call.per_row(k_top));
    stats.k_top = k_top;
  }
  call.run(backend);
  return results;
}

// outs and lses: lists of C-contiguous arrays that the Python side has checked; out and lse likewise.
void merge(const py::list& outs, const py::list& lses, const py::array& out, const py::array& lse) {
  DType o, s;
  if (!known_dtype(out, o)) o = DType::bf16;
  if (!known_dtype(lse, s)) throw TypeError("merge_attention: lse has an unsupported dtype");
  std::vector<const void*> out_data, lse_data;
  for (const handle x : outs) out_data.push_back(proxy(x)->data);
  for (const handle x : lses) lse_data.push_back(proxy(x)->data);
  const int64_t rows = lse.size(), columns = out.ndim() ? out.shape(out.ndim() - 1) : 0;
  const MergeProblem m{static_cast<int64_t>(out_data.size()),
                       rows,
                       columns,
                       out_data.data(),
                       lse_data.data(),
                       o,
                       s,
                       proxy(out)->data,
                       proxy(lse)->data};
  const WithoutGil released;
  qkv::merge(m);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("attention_varlen", &attention_varlen);
  m.def("attention_weights", &attention_weights);
  m.def("attention_stats", &attention_stats);
  m.def("merge", &merge);
}

}  // namespace qkv::python
