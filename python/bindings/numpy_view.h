// SPDX-License-Identifier: Apache-2.0
// The seam to NumPy: the only file that knows its C side (through pybind11, so no NumPy header is needed).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <string>

#include "qkv/error.h"
#include "qkv/problem.h"

namespace qkv::python {

namespace py = pybind11;

constexpr int kMaxDims = 64;

class Shape {  // one in the making: a call is too short to go to the heap for it
 public:
  Shape() = default;
  Shape(std::initializer_list<Py_ssize_t> dims) { append(dims); }
  Shape(const Shape& other) { append(other); }
  Shape& operator=(const Shape& other) {
    size_ = 0;
    append(other);
    return *this;
  }
  void append(Py_ssize_t n) { n_[size_++] = n; }
  template <class Dims>
  void append(const Dims& dims) {
    for (const Py_ssize_t n : dims) append(n);
  }
  void append(std::initializer_list<Py_ssize_t> dims) { append<>(dims); }
  void prepend(Py_ssize_t n) {
    std::copy_backward(begin(), end(), end() + 1);
    n_[0] = n;
    ++size_;
  }
  void clear() { size_ = 0; }
  int size() const { return size_; }
  bool empty() const { return size_ == 0; }
  Py_ssize_t& operator[](int i) { return n_[i]; }
  const Py_ssize_t& operator[](int i) const { return n_[i]; }
  Py_ssize_t* begin() { return n_; }
  Py_ssize_t* end() { return n_ + size_; }
  const Py_ssize_t* begin() const { return n_; }
  const Py_ssize_t* end() const { return n_ + size_; }

 private:
  int size_ = 0;
  Py_ssize_t n_[kMaxDims + 4];  // the leading dimensions of an array, and a result's own
};

struct ArrayView {  // of an ndarray that somebody keeps alive
  char* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  const Py_ssize_t* shape = nullptr;
  const Py_ssize_t* strides = nullptr;  // bytes
  bool writeable = false;
  bool regular = true;  // aligned, and strides are multiples of the item size: kernels can read it as it is
};

inline py::detail::PyArray_Proxy* proxy(py::handle array) { return py::detail::array_proxy(array.ptr()); }

inline bool is_plain_array(py::handle x) {  // an ndarray, not a subclass
  static PyObject* const type = py::object(py::module_::import("numpy").attr("ndarray")).release().ptr();
  return reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) == type;
}

inline bool is_device_array(py::handle x) {  // qkv.DeviceArray
  static PyObject* const type = py::object(py::module_::import("qkv._device").attr("DeviceArray")).release().ptr();
  return reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) == type;
}
inline bool lives_on_device(py::handle x) {
  return py::module_::import("qkv._device").attr("lives_on_device")(x).cast<bool>();
}
inline void* stream_of(py::handle device_array) {
  return reinterpret_cast<void*>(device_array.attr("stream").cast<uintptr_t>());
}

inline int type_number(py::handle array) { return py::reinterpret_borrow<py::dtype>(proxy(array)->descr).num(); }

// ml_dtypes registers bfloat16 under a number of its own, if and when it is imported.
inline int bfloat16_number() {
  static int number = -1;
  if (number < 0) {
    py::dict modules = py::module_::import("sys").attr("modules");
    if (modules.contains("ml_dtypes")) {
      number = py::dtype::from_args(modules["ml_dtypes"].attr("bfloat16")).num();
    }
  }
  return number;
}

// The dtype of a plain array, if it is one that kernels know in native byte order.
inline bool known_dtype(py::handle array, DType& out) {
  const int number = type_number(array);
  switch (number) {
    case py::detail::npy_api::NPY_DOUBLE_: out = DType::f64; break;
    case py::detail::npy_api::NPY_FLOAT_: out = DType::f32; break;
    case 23: out = DType::f16; break;  // NPY_HALF
    case py::detail::npy_api::NPY_BOOL_: out = DType::boolean; break;
    default:
      if (number < 256 || number != bfloat16_number()) return false;
      out = DType::bf16;
  }
  return py::reinterpret_borrow<py::dtype>(proxy(array)->descr).byteorder() != '>';
}

inline ArrayView view_of(py::handle array, DType dtype) {
  const auto* a = proxy(array);
  ArrayView v;
  v.data = a->data;
  v.dtype = dtype;
  v.ndim = a->nd;
  v.shape = a->dimensions;
  v.strides = a->strides;
  v.writeable = (a->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
  uintptr_t offsets = reinterpret_cast<uintptr_t>(a->data);
  for (int i = 0; i < v.ndim; ++i) offsets |= static_cast<uintptr_t>(v.strides[i]);
  v.regular = (offsets & static_cast<uintptr_t>(itemsize(dtype) - 1)) == 0;
  return v;
}
// A stride in elements, where it is a whole number of them. Their size is a power of two: no division.
inline int64_t elements(Py_ssize_t stride, DType t) {
  return stride >> __builtin_ctz(static_cast<unsigned>(itemsize(t)));
}

inline std::string shape_text(const Py_ssize_t* shape, int n) {
  std::string s = "(";
  for (int i = 0; i < n; ++i) s += std::to_string(shape[i]) + (i + 1 < n ? ", " : (n == 1 ? "," : ""));
  return s + ")";
}
inline std::string shape_text(const ArrayView& v) { return shape_text(v.shape, v.ndim); }
inline py::tuple shape_tuple(const Shape& s) {
  py::tuple t(s.size());
  for (int i = 0; i < s.size(); ++i) t[static_cast<size_t>(i)] = s[i];
  return t;
}
inline std::string shape_text(const Shape& s) { return shape_text(s.begin(), s.size()); }

inline bool is_text(py::handle x, const char* text) {
  return PyUnicode_Check(x.ptr()) && PyUnicode_CompareWithASCIIString(x.ptr(), text) == 0;
}

inline std::string type_text(py::handle x) {
  if (py::isinstance<py::array>(x)) return py::str(x.attr("dtype")).cast<std::string>();
  return std::string(Py_TYPE(x.ptr())->tp_name);
}

struct Extent {  // bytes an array touches
  const char *first, *last;
};
inline Extent extent(const ArrayView& v) {
  Extent e{v.data, v.data + itemsize(v.dtype)};
  for (int i = 0; i < v.ndim; ++i) {
    if (v.shape[i] == 0) return {nullptr, nullptr};
    const Py_ssize_t span = (v.shape[i] - 1) * v.strides[i];
    (span < 0 ? e.first : e.last) += span;
  }
  return e;
}
inline bool overlap(const ArrayView& a, const ArrayView& b) {
  const Extent x = extent(a), y = extent(b);
  return x.first < y.last && y.first < x.last;
}

// Could two indices name the same byte? Exact for the layouts that slicing and transposing give; an array that
// cannot be shown to be free of overlap counts as overlapping.
inline bool self_overlapping(const ArrayView& v) {
  int order[kMaxDims], n = 0;
  for (int i = 0; i < v.ndim; ++i) {
    if (v.shape[i] == 0) return false;
    if (v.shape[i] > 1) order[n++] = i;
  }
  const auto step = [&](int i) { return v.strides[i] < 0 ? -v.strides[i] : v.strides[i]; };
  for (int i = 1; i < n; ++i) {  // by stride
    for (int k = i; k > 0 && step(order[k]) < step(order[k - 1]); --k) std::swap(order[k], order[k - 1]);
  }
  Py_ssize_t covered = static_cast<Py_ssize_t>(itemsize(v.dtype));
  for (int i = 0; i < n; ++i) {
    if (step(order[i]) < covered) return true;
    covered += step(order[i]) * (v.shape[order[i]] - 1);
  }
  return false;
}

// An uninitialised C-contiguous array. Straight to NumPy: py::array's constructor would work out the strides first.
inline py::array new_array(const py::dtype& dtype, const Shape& shape) {
  const auto& api = py::detail::npy_api::get();
  PyObject* const array = api.PyArray_NewFromDescr_(api.PyArray_Type_, py::object(dtype).release().ptr(), shape.size(),
                                                    shape.begin(), nullptr, nullptr, 0, nullptr);
  if (!array) throw py::error_already_set();
  return py::reinterpret_steal<py::array>(array);
}
inline py::dtype accumulator_dtype(DType t) {
  static const py::dtype* const f32 = new py::dtype(py::dtype::of<float>());
  static const py::dtype* const f64 = new py::dtype(py::dtype::of<double>());
  return t == DType::f64 ? *f64 : *f32;
}

}  // namespace qkv::python
