// SPDX-License-Identifier: Apache-2.0
// Where results go: arrays of the caller's, or new ones where q, k and v live.
#include <string.h>

#include "call.h"

namespace qkv::python {

using std::string;

Shape Call::result_shape(bool per_key) const {
  Shape s;
  if (!problem.cu_q) s = lead_;
  if (has_heads_) s.append(result_heads(problem));
  s.append(per_key ? problem.Sk : result_rows(problem));
  return s;
}

// An out in GPU memory that fits and needs nothing of Python.
bool Call::out_on_device(py::handle out, const Shape& shape) {
  DeviceDims dims;
  DeviceView found;
  if (!read_device_array(out, dims, found)) return false;
  const ArrayView& o = found.array;
  if (found.dtype != dtype_.ptr() || o.ndim != shape.size() || !std::equal(shape.begin(), shape.end(), o.shape)) {
    return false;
  }
  if (!o.writeable || !o.regular || self_overlapping(o)) return false;
  for (int i = 0; i < n_inputs_; ++i) {
    if (overlap(o, inputs_[i])) return false;
  }
  place_on("out", found.device, found.stream);
  out_ = py::reinterpret_borrow<py::object>(out);
  bind(problem.out, o, "out");
  return true;
}

void Call::make_out(py::handle out) {
  Problem& p = problem;
  Shape shape;
  if (!p.cu_q) shape = lead_;
  if (has_heads_ && swapped_) shape.append({p.Sq, p.Hq, p.Dv});
  else if (has_heads_) shape.append({p.Hq, p.Sq, p.Dv});
  else shape.append({p.Sq, p.Dv});
  py::object own;  // out, or what describes it on a device
  if (!out.is_none() && p.device >= 0 && out_on_device(out, shape)) return;
  if (out.is_none()) {
    char* ignored = nullptr;
    out_ = new_result(py::reinterpret_borrow<py::dtype>(dtype_), shape, &ignored);
    own = p.device < 0 ? out_ : out_.attr("_header");
  } else {
    own = py::reinterpret_borrow<py::object>(out);
    if (!is_plain_array(out) && lives_on_device(out)) {
      own = py::module_::import("qkv._arrays").attr("coerce")(p.function, "out", out, py::none());
    }
    if (is_plain_array(out) || is_device_array(own)) own = header("out", own);
    if (!is_plain_array(own)) {
      const string type = Py_TYPE(out.ptr())->tp_name;
      const bool masked = type.find("MaskedArray") != string::npos;
      type_error("out is " + (masked ? "a masked array" : type) + "; expected a plain NumPy array");
    }
    if (!py::reinterpret_borrow<py::object>(proxy(own)->descr).equal(dtype_)) {
      type_error("out is " + type_text(own) + "; expected q's dtype, " + py::str(dtype_).cast<string>());
    }
    const ArrayView o = view_of(own, p.dtype);
    if (o.ndim != shape.size() || !std::equal(shape.begin(), shape.end(), o.shape)) {
      value_error("out has shape " + shape_text(o) + "; expected " + shape_text(shape));
    }
    if (!o.writeable) value_error("out is read-only; expected a writeable array");
    if (self_overlapping(o)) value_error("out overlaps itself (strides " + shape_text(o.strides, o.ndim) + " bytes)");
    out_ = py::reinterpret_borrow<py::object>(out);
    bool shared = !o.regular;
    for (int i = 0; i < n_inputs_; ++i) shared = shared || overlap(o, inputs_[i]);
    if (shared && p.device >= 0) value_error("out shares memory with an input; expected its own in GPU memory");
    if (shared) {
      if (explaining()) explaining()->copies.push_back("out: shares memory with an input");
      temporary_ = new_array(py::reinterpret_borrow<py::dtype>(dtype_), shape);
    }
  }
  bind(p.out, view_of(temporary_ ? temporary_ : own, p.dtype), "out");
}

Shape Call::per_row(Py_ssize_t extra) const {
  Shape shape = result_shape(false);
  if (extra >= 0) shape.append(extra);
  return shape;
}

py::object Call::new_result(const py::dtype& dtype, const Shape& shape, char** data) {
  if (problem.device < 0) {
    py::array a = new_array(dtype, shape);
    *data = static_cast<char*>(a.mutable_data());
    return a;
  }
  return new_device_array(dtype, shape, problem.device, problem.stream, data);
}

py::object Call::make_lse() {
  char* data = nullptr;
  py::object a = new_result(accumulator_dtype(problem.dtype), result_shape(false), &data);
  problem.lse = data;
  return a;
}

py::object Call::make_weights() {
  Shape shape = result_shape(false);
  shape.append(problem.Sk);
  char* data = nullptr;
  py::object a = new_result(accumulator_dtype(problem.dtype), shape, &data);
  problem.weights = data;
  // What no walk reaches is masked; the device's backend clears its own.
  if (problem.device < 0) memset(data, 0, py::cast<size_t>(a.attr("nbytes")));
  return a;
}

// The device's backend fills its own.
py::object Call::make_statistic(const py::dtype& dtype, const Shape& shape, int fill, void** data) {
  char* to = nullptr;
  py::object a = new_result(dtype, shape, &to);
  if (problem.device < 0) memset(to, fill, py::cast<size_t>(a.attr("nbytes")));
  *data = to;
  return a;
}

py::object Call::out() {
  if (temporary_ && !explaining()) out_[py::ellipsis()] = temporary_;
  return out_;
}

}  // namespace qkv::python
