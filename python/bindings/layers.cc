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
    const py::object header = x.attr("_header");
    DType dtype = DType::f32;
    if (!known_dtype(header, dtype)) throw TypeError(std::string(step_.function) + ": an array has an unknown dtype");
    const ArrayView a = view_of(header, dtype);  // the DeviceArray keeps its header
    if (!a.regular)
      throw ValueError(std::string(step_.function) + ": an array in GPU memory is not aligned to its items");
    if (void* const other = stream_of(x); other != step_.stream) {
      device_order(step_.device, other, step_.stream);
      others_.push_back(other);
    }
    rows_ = 1;
    for (int i = 0; i < a.ndim - 1; ++i) rows_ *= a.shape[i];
    return a;
  }
  [[noreturn]] void refuse(const ArrayView& a) const {
    throw ValueError(std::string(step_.function) + ": an array has shape " + shape_text(a) + ", which does not fit");
  }

  LayerStep& step_;
  int64_t rows_ = 0;           // of the last array
  std::vector<void*> others_;  // streams of arrays that are not the step's
};

// y (..., m) = x (..., n) w (n, m) + b (m,)
void linear(const std::string& function, handle x, handle w, handle b, handle y) {
  Linear p;
  DeviceStep step(p, function, y);
  const auto shape = x.attr("shape").cast<py::tuple>();
  p.inner = shape.empty() ? 0 : shape[shape.size() - 1].cast<int64_t>();
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

}  // namespace

void register_layers(py::module_& m) {
  m.def("device_linear", &linear);
  m.def("device_norm", &norm);
  m.def("device_elementwise", &elementwise);
}

}  // namespace qkv::python
