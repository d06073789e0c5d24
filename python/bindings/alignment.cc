// SPDX-License-Identifier: Apache-2.0
// Scores as they are, and the alignments that are made of them.
#include <math.h>

#include <algorithm>

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

using py::handle;

// (lead, heads, rows, Sk) in natural units, -inf where masked; q and k are host arrays, for additive scores projected.
py::object attention_scores(handle function, handle q, handle k, handle weight, handle options, handle backend) {
  const auto name = function.cast<std::string>();
  Call call(name.c_str());
  call.arrays(q, k, handle(), py::none(), py::none());
  if (!weight.is_none()) {
    call.additive();
    call.weight(weight);
  }
  call.options(options);
  call.problem.normalizer = Normalizer::none;
  py::object scores = call.make_weights();
  const auto fill = [&](auto* x) { std::fill_n(x, py::cast<py::array>(scores).size(), -HUGE_VAL); };
  void* const data = py::cast<py::array>(scores).mutable_data();
  if (call.problem.dtype == DType::f64) fill(static_cast<double*>(data));
  else fill(static_cast<float*>(data));
  call.run(backend);
  return scores;
}

// In place. C-contiguous arrays of one shape and dtype that the Python side has made; state without the rows.
void align(handle function, const py::array& energy, const py::object& chunk, const py::array& state, int64_t width,
           bool hard, handle backend) {
  const auto name = function.cast<std::string>(), requested = backend.cast<std::string>();
  Alignment x{};
  x.function = name.c_str();
  x.rows = energy.shape(energy.ndim() - 2);
  x.keys = energy.shape(energy.ndim() - 1);
  x.heads = x.rows && x.keys ? energy.size() / x.rows / x.keys : 0;
  if (!known_dtype(energy, x.dtype)) throw TypeError("align: energy has an unsupported dtype");
  x.energy = proxy(energy)->data;
  if (!chunk.is_none()) x.chunk = proxy(chunk)->data;
  x.width = width;
  x.hard = hard;
  x.state = reinterpret_cast<double*>(proxy(state)->data);
  const WithoutGil released;
  qkv::align(x, requested);
}

}  // namespace

void register_alignment(py::module_& m) {
  m.def("attention_scores", &attention_scores);
  m.def("align", &align);
}

}  // namespace qkv::python
