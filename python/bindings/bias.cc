// SPDX-License-Identifier: Apache-2.0
// What is added to the scores: an array, or one that is read by distance.
#include <math.h>

#include "call.h"

namespace qkv::python {

using std::string;

// An array over (lead, Hq, Sq, columns), broadcast from the right.
void Call::bind_scores(View& view, const ArrayView& a, int64_t columns, const char* name) {
  const Problem& p = problem;
  Shape full = lead_;
  if (has_heads_) full.append(p.Hq);
  full.append({p.Sq, columns});
  const int want = full.size();
  bool fits = a.ndim <= want;
  for (int i = 0; fits && i < a.ndim; ++i) fits = a.shape[i] == 1 || a.shape[i] == full[want - a.ndim + i];
  if (!fits) {
    value_error(string(name) + " has shape " + shape_text(a) + ", which does not broadcast to " +
                (has_heads_ ? "(..., Hq, Sq, Sk) = " : "(Sq, Sk) = ") + shape_text(full));
  }
  const auto stride = [&](int from_right) {
    const int i = a.ndim - from_right;
    return i < 0 || a.shape[i] == 1 ? 0 : elements(a.strides[i], a.dtype);
  };
  view.data = a.data;
  view.dtype = a.dtype;
  view.d = stride(1);
  view.s = stride(2);
  view.h = has_heads_ ? stride(3) : 0;
  int slot = 0;
  const int tail = has_heads_ ? 3 : 2, lead = lead_.size();
  for (int i = 0; i < lead; ++i) {
    if (lead_[i] != 1 && slot < kMaxLead) view.lead[slot++] = stride(tail + lead - i);
  }
}

namespace {

// Is it what a tile can take from where it lies, without a look at each element? 2^100 changes no score to infinity.
bool plain(const Problem& p, const ArrayView& a) {
  const View& b = p.bias;
  bool same = b.s == 0 && b.d == 1 && b.dtype == (p.dtype == DType::f64 ? DType::f64 : DType::f32);
  for (int t = 0; t < p.n_lead && t < kMaxLead; ++t) same = same && b.lead[t] == 0;
  const int64_t heads = b.h == 0 ? 1 : p.Hq;
  for (int64_t h = 0; same && h < heads; ++h) {
    for (int64_t i = 0; same && i < p.distances.n; ++i) {
      same = fabs(load_as_double(a.data, b.dtype, h * b.h + i)) <= 0x1p100;
    }
  }
  return same;
}

}  // namespace

void Call::bias_option(py::handle bias) {
  if (bias.is_none()) return;
  Problem& p = problem;
  static const py::object* const type = new py::object(py::module_::import("qkv.positions._bias").attr("ByDistance"));
  const bool by_distance = !is_plain_array(bias) && py::isinstance(bias, *type);
  if (p.cu_q && !by_distance) {
    value_error("bias is an array; packed sequences do not take one (use alibi_slopes or mask objects)");
  }
  const py::object given = by_distance ? py::object(bias.attr("rows")) : py::reinterpret_borrow<py::object>(bias);
  const ArrayView* const there = by_distance ? nullptr : on_device("bias", given, false);
  if (there) return bind_scores(p.bias, *there, p.Sk, "bias");
  py::object array = as_array("bias", given);
  if (!by_distance) array = header("bias", array);
  DType t;
  if (!known_dtype(array, t) || t == DType::boolean) {
    type_error("bias is " + type_text(array) + "; expected float64, float32, float16 or bfloat16" +
               (known_dtype(array, t) ? ". Pass a boolean mask as mask=" : ""));
  }
  const ArrayView a = read_as_is("bias", array, t);
  if (!by_distance) return bind_scores(p.bias, a, p.Sk, "bias");
  p.distances.n = a.ndim > 0 ? a.shape[a.ndim - 1] : 0;
  p.distances.least = bias.attr("least").cast<int64_t>();
  if (p.distances.n == 0) value_error("bias has no distances; expected at least one");
  bind_scores(p.bias, a, p.distances.n, "bias");
  if (p.cu_q && p.bias.s != 0) value_error("bias has a row for each query; packed sequences take one for all");
  p.distances.plain = plain(p, a);
}

}  // namespace qkv::python
