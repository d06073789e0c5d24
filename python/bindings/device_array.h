// SPDX-License-Identifier: Apache-2.0
// Arrays in GPU memory as a call reads and makes them, without a step of Python where none is needed: qkv.DeviceArray,
// and what offers DLPack's C functions, as torch does. The structs are those of the DLPack ABI.
#pragma once

#include "numpy_view.h"

namespace qkv::python {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; may be nullptr before 1.2: C-contiguous
  uint64_t byte_offset;
};
struct Versioned {  // "dltensor_versioned"
  uint32_t major, minor;
  void* context;
  void (*deleter)(Versioned*);
  uint64_t flags;
  DLTensor tensor;
};
constexpr int kCuda = 2;
constexpr uint64_t kReadOnly = 1;  // of flags

struct DeviceDims {  // of an array that no ndarray describes
  static constexpr int kMost = 12;
  Py_ssize_t shape[kMost], strides[kMost];
};

struct DeviceView {
  ArrayView array;  // its dimensions: the given ones, or those of the header of a DeviceArray
  int device = -1;
  void* stream = nullptr;
  PyObject* dtype = nullptr;  // a numpy.dtype that somebody keeps alive
};

// An array in GPU memory, for as long as x lives unchanged. False where Python has to look at it, or to say what is
// wrong: it is elsewhere, of an unusual kind, for another stream than its library's current one, or CUDA is missing.
bool read_device_array(py::handle x, DeviceDims& dims, DeviceView& view);

// The same, for a step that asks the backend itself whether it is there.
bool describe_device_array(py::handle x, DeviceDims& dims, DeviceView& view);

// Is it one that read_device_array reads?
bool is_on_device(py::handle x);

// The DeviceArray that shares the memory of x and keeps it alive; None where Python has to look at it.
py::object take_device_array(py::handle x);

// An uninitialised C-contiguous DeviceArray from the pool.
py::object new_device_array(const py::handle& dtype, const Shape& shape, int device, void* stream, char** data);

// An ndarray that describes device memory: its shape, strides and dtype are read, its data never. Without strides it is
// C-contiguous.
py::array device_header(void* data, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides, py::handle dtype);

// Others were given a block's memory: what frees it must know.
void lend_block(py::handle block);

}  // namespace qkv::python
