// SPDX-License-Identifier: Apache-2.0
// Attention with another score, or around a centre: additive_attention and luong_attention.
#include "call.h"
#include "register.h"

namespace qkv::python {

// The problem's q and k are already in the dtype that scores are computed in.
void Call::additive() {
  projected_ = true;
  problem.score = Score::additive;
}

// float64, (D,): in host memory, or C-contiguous where q lives.
void Call::weight(py::handle weight) {
  problem.scale = 1;
  if (is_device_array(weight)) {
    const py::object description = header("weight", py::reinterpret_borrow<py::object>(weight));
    problem.weight = reinterpret_cast<const double*>(proxy(description)->data);
    problem.weight_there = true;
    return;
  }
  const auto a = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(weight);
  if (!a) throw py::error_already_set();
  doubles_.emplace_back(a.data(), a.data() + a.size());
  problem.weight = doubles_.back().data();
}

// centre: float64, (..., Hq, Sq), with the leading dimensions of q; without heads (Sq,).
void Call::focus(py::handle centre, py::handle reach) {
  Problem& p = problem;
  const ArrayView a = read_as_is("query", py::reinterpret_borrow<py::object>(centre), DType::f64);
  const int tail = has_heads_ ? 2 : 1;
  bind_lead(p.focus.centre, a, tail, "query");
  p.focus.centre.s = elements(a.strides[a.ndim - 1], a.dtype);
  p.focus.centre.h = has_heads_ ? elements(a.strides[a.ndim - 2], a.dtype) : 0;
  p.focus.reach = number("window", reach);
}

namespace {

using py::handle;

// The attention of scores that are additive where there is a weight, around a centre where there is one.
py::object scored_attention(handle q, handle k, handle v, handle weight, handle centre, handle reach, handle options,
                            handle layout, handle dtype, handle return_lse, handle return_weights, handle out,
                            handle backend) {
  Call call("attention");
  if (!weight.is_none()) call.additive();
  call.arrays(q, k, v, layout, dtype);
  if (!weight.is_none()) call.weight(weight);
  if (!centre.is_none()) call.focus(centre, reach);
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

}  // namespace

void register_classics(py::module_& m) { m.def("scored_attention", &scored_attention); }

}  // namespace qkv::python
