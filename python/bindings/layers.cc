// SPDX-License-Identifier: Apache-2.0
// A layer's steps on arrays in GPU memory. Shapes, dtypes and places were checked in Python; what would read or write
// beyond an array is checked here again.
#include "qkv/layers.h"

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

using py::handle;

class DeviceStep {  // the arrays of one step: on a device, and in order on the stream of the result
 public:
  DeviceStep(LayerStep& step, const std::string& function, handle out) : step_(step) {
    step.function = function.c_str();
    step.device = out.attr("device").cast<int>();
    step.stream = stream_of(out);
    const ArrayView y = view(out);
    step.columns = y.ndim ? y.shape[y.ndim - 1] : 0;
    step.rows = rows_;
  }

  int64_t columns_of(handle x) {
    DeviceDims dims;
    DeviceView found;
    return describe_device_array(x, dims, found) && found.array.ndim ? found.array.shape[found.array.ndim - 1] : 0;
  }

  RowArray rows(handle x, int64_t columns) {
    const ArrayView a = view(x);
    if (a.ndim == 0 || a.shape[a.ndim - 1] != columns || rows_ != step_.rows) refuse(a);
    RowArray r;
    r.data = a.data;
    r.dtype = a.dtype;
    r.column = elements(a.strides[a.ndim - 1], a.dtype);
    for (int i = 0; i < a.ndim - 1; ++i) {
      const int64_t n = a.shape[i], step = elements(a.strides[i], a.dtype);
      if (n == 1) continue;
      if (r.n_dims && r.step[r.n_dims - 1] == n * step) {  // goes on where the dimension before ends
        r.extent[r.n_dims - 1] *= n;
        r.step[r.n_dims - 1] = step;
        continue;
      }
      if (r.n_dims == kMaxLead) refuse(a);
      r.extent[r.n_dims] = n;
      r.step[r.n_dims++] = step;
    }
    return r;
  }

  // After it ran: what comes next on the other streams must find their arrays as it left them.
  void order_others() const {
    for (void* const other : others_) device_order(step_.device, step_.stream, other);
  }

  // (rows, columns), or (columns,) where rows is negative; nothing for None.
  Matrix matrix(handle x, int64_t rows, int64_t columns) {
    if (x.is_none()) return {};
    const ArrayView a = view(x);
    const int want = rows < 0 ? 1 : 2;
    if (a.ndim != want || a.shape[a.ndim - 1] != columns || (rows >= 0 && a.shape[0] != rows)) refuse(a);
    return {a.data, a.dtype, rows < 0 ? 0 : elements(a.strides[0], a.dtype), elements(a.strides[a.ndim - 1], a.dtype)};
  }

 private:
  ArrayView view(handle x) {
    DeviceView found;
    if (!describe_device_array(x, dims_[n_dims_++], found)) {
      throw TypeError(std::string(step_.function) + ": an array has an unknown dtype");
    }
    const ArrayView& a = found.array;
    if (!a.regular)
      throw ValueError(std::string(step_.function) + ": an array in GPU memory is not aligned to its items");
    if (found.stream != step_.stream) {
      device_order(step_.device, found.stream, step_.stream);
      others_.push_back(found.stream);
    }
    rows_ = 1;
    for (int i = 0; i < a.ndim - 1; ++i) rows_ *= a.shape[i];
    return a;
  }
  [[noreturn]] void refuse(const ArrayView& a) const {
    throw ValueError(std::string(step_.function) + ": an array has shape " + shape_text(a) + ", which does not fit");
  }

  LayerStep& step_;
  DeviceDims dims_[5];  // of the arrays so far that no ndarray describes
  int n_dims_ = 0;
  int64_t rows_ = 0;           // of the last array
  std::vector<void*> others_;  // streams of arrays that are not the step's
};

// y (..., m) = x (..., n) w (n, m) + b (m,)
void linear(const std::string& function, handle x, handle w, handle b, handle y) {
  Linear p;
  DeviceStep step(p, function, y);
  p.inner = step.columns_of(x);
  p.y = step.rows(y, p.columns);
  if (p.inner) p.x = step.rows(x, p.inner);
  p.w = step.matrix(w, p.inner, p.columns);
  p.b = step.matrix(b, -1, p.columns);
  if (Explanation* e = explaining()) {
    if (e->kernel.empty()) {  // the call's own kernel is the attention's, where it has one
      e->backend = "cuda";
      e->kernel = describe(p);
    }
    return;
  }
  run(p);
  step.order_others();
}

// y (..., n) = a norm of x (..., n)
void norm(const std::string& function, handle x, handle weight, handle bias, double eps, handle y) {
  Norm p;
  DeviceStep step(p, function, y);
  p.y = step.rows(y, p.columns);
  p.x = step.rows(x, p.columns);
  p.weight = step.matrix(weight, -1, p.columns);
  p.bias = step.matrix(bias, -1, p.columns);
  p.eps = eps;
  if (explaining()) return;
  run(p);
  step.order_others();
}

// y (..., n) = op(x (..., n), other)
void elementwise(const std::string& function, const std::string& op, handle x, handle other, handle y) {
  Elementwise p;
  DeviceStep step(p, function, y);
  constexpr const char* kOps[] = {"copy", "add", "relu", "gelu"};
  for (int i = 0; i < 4; ++i) p.op = op == kOps[i] ? static_cast<Op>(i) : p.op;
  p.y = step.rows(y, p.columns);
  p.x = step.rows(x, p.columns);
  if (!other.is_none()) p.other = step.rows(other, p.columns);
  if (explaining()) return;
  run(p);
  step.order_others();
}

// --- without a step of Python --------------------------------------------------------------------------------

// The arrays of a step that are in one GPU's memory, of x's dtype, and of the dimensions that it takes.
class There {
 public:
  explicit There(handle x) : ok_(!explaining() && read_device_array(x, dims_, x_) && x_.array.regular) {
    ok_ = ok_ && x_.array.ndim > 0 && x_.array.dtype != DType::boolean;
  }
  // None, or (columns of x, any) or (n,): x's columns where n is negative.
  There& with(handle given, int ndim, int64_t n) {
    if (!ok_ || given.is_none()) return *this;
    DeviceDims dims;
    DeviceView a;
    ok_ = read_device_array(given, dims, a) && a.array.regular && a.dtype == x_.dtype && a.device == x_.device &&
          a.array.ndim == ndim && a.array.shape[0] == (n < 0 ? columns() : n);
    if (ok_ && ndim == 2) wide_ = a.array.shape[1];
    return *this;
  }
  explicit operator bool() const { return ok_; }
  int64_t wide() const { return wide_; }  // columns of the matrix
  int64_t columns() const { return x_.array.shape[x_.array.ndim - 1]; }
  py::object result(int64_t columns) const {
    Shape shape;
    for (int i = 0; i < x_.array.ndim - 1; ++i) shape.append(x_.array.shape[i]);
    shape.append(static_cast<Py_ssize_t>(columns));
    char* data = nullptr;
    return new_device_array(x_.dtype, shape, x_.device, x_.stream, &data);
  }

 private:
  DeviceDims dims_;
  DeviceView x_;
  bool ok_;
  int64_t wide_ = -1;
};

// The result; None where Python has to look at the arrays, or to say what is wrong.
py::object linear_there(handle x, handle w, handle b) {
  There there(x);
  if (!there.with(w, 2, -1) || there.wide() < 0 || !there.with(b, 1, there.wide())) return py::none();
  py::object y = there.result(there.wide());
  linear("linear", x, w, b, y);
  return y;
}

py::object norm_there(handle x, handle weight, handle bias, handle eps) {
  There there(x);
  if (weight.is_none() || !PyFloat_Check(eps.ptr()) || !there.with(weight, 1, -1).with(bias, 1, -1)) return py::none();
  py::object y = there.result(there.columns());
  norm("layer_norm", x, weight, bias, PyFloat_AS_DOUBLE(eps.ptr()), y);
  return y;
}

py::object elementwise_there(const std::string& op, handle x) {
  const There there(x);
  if (!there) return py::none();
  py::object y = there.result(there.columns());
  elementwise(op, op, x, py::none(), y);
  return y;
}

}  // namespace

void register_layers(py::module_& m) {
  m.def("linear_there", &linear_there);
  m.def("norm_there", &norm_there);
  m.def("elementwise_there", &elementwise_there);
  m.def("device_linear", &linear);
  m.def("device_norm", &norm);
  m.def("device_elementwise", &elementwise);
}

}  // namespace qkv::python
