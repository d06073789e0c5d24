// SPDX-License-Identifier: Apache-2.0
#include "device_array.h"

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

struct Names {  // of attributes, interned
  PyObject* header = PyUnicode_InternFromString("_header");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* stream = PyUnicode_InternFromString("stream");
  PyObject* ptr = PyUnicode_InternFromString("ptr");
  PyObject* owner = PyUnicode_InternFromString("_owner");
  PyObject* block = PyUnicode_InternFromString("_block");
  PyObject* grad = PyUnicode_InternFromString("requires_grad");
  PyObject* exchange = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
};
const Names& names() {
  static const Names* const all = new Names;
  return *all;
}

py::object attribute(py::handle x, PyObject* name) {
  PyObject* const found = PyObject_GetAttr(x.ptr(), name);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

PyObject* device_array_type() {
  static PyObject* const type = py::object(py::module_::import("qkv._device").attr("DeviceArray")).release().ptr();
  return type;
}

// --- reading -------------------------------------------------------------------------------------------------

bool read_own(py::handle x, DeviceView& view) {
  const py::object header = attribute(x, names().header);  // x keeps it
  DType dtype;
  if (!known_dtype(header, dtype)) return false;
  view.array = view_of(header, dtype);
  view.dtype = proxy(header)->descr;
  view.device = static_cast<int>(PyLong_AsLong(attribute(x, names().device).ptr()));
  view.stream = PyLong_AsVoidPtr(attribute(x, names().stream).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return true;
}

struct ExchangeApi {  // of DLPack 1.2 and later; functions return 0, or set an exception
  uint32_t major, minor;
  ExchangeApi* older;
  void* allocate;
  int (*managed)(void* object, Versioned** out);
  void* to_object;
  int (*tensor)(void* object, DLTensor* out);  // may be nullptr
  int (*stream)(int device_type, int32_t device, void** out);
};

struct Producer {
  PyTypeObject* type = nullptr;      // kept
  const ExchangeApi* api = nullptr;  // nullptr: not to be used for this type
  bool differentiates = false;       // its arrays may refuse to be shared
};

// DLPack's C functions for arrays of this type, as _device.exchange_api finds them; nullptr where there are none.
const Producer* producer(PyTypeObject* type) {
  constexpr int kMost = 16;
  static Producer known[kMost];
  static int n = 0;
  for (int i = 0; i < n; ++i) {
    if (known[i].type == type) return known[i].api ? &known[i] : nullptr;
  }
  const py::handle kind(reinterpret_cast<PyObject*>(type));
  if (!PyObject_HasAttr(kind.ptr(), names().exchange)) return nullptr;
  const py::object capsule = py::module_::import("qkv._device").attr("exchange_api")(kind);
  Producer made;
  if (!capsule.is_none()) {
    made.api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    PyErr_Clear();
  }
  if (made.api && (made.api->major != 1 || !made.api->tensor || !made.api->managed)) made.api = nullptr;
  made.differentiates = PyObject_HasAttr(kind.ptr(), names().grad);
  if (n == kMost) return nullptr;
  made.type = reinterpret_cast<PyTypeObject*>(kind.inc_ref().ptr());
  known[n++] = made;
  return made.api ? &known[n - 1] : nullptr;
}

bool wants_gradient(py::handle x) { return attribute(x, names().grad).ptr() != Py_False; }

// The stream for an array of this producer: its current one, and use_stream names no other.
bool current_stream(const ExchangeApi& api, const DLTensor& t, void** stream) {
  static PyObject* const chosen = py::object(py::module_::import("qkv._device").attr("_stream")).release().ptr();
  if (api.stream(t.device_type, t.device_id, stream) != 0) {
    PyErr_Clear();
    return false;
  }
  if (!*stream) *stream = reinterpret_cast<void*>(1);  // CUDA's legacy default stream
  PyObject* value = nullptr;
  if (PyContextVar_Get(chosen, nullptr, &value) < 0) throw py::error_already_set();
  const auto wanted = py::reinterpret_steal<py::object>(value);
  return !wanted || wanted.is_none() || PyLong_AsVoidPtr(wanted.ptr()) == *stream;
}

// The dtype that NumPy has for it; nullptr for what kernels do not know. Kept for good.
PyObject* dtype_of(const DLTensor& t, DType& dtype) {
  const auto made = [](const char* text) { return py::dtype(text).release().ptr(); };
  static PyObject* const all[] = {made("float16"), made("float32"), made("float64"), made("bool")};
  static PyObject* bfloat16 = nullptr;
  if (t.lanes != 1) return nullptr;
  if (t.code == 2) {
    dtype = t.bits == 16 ? DType::f16 : (t.bits == 32 ? DType::f32 : DType::f64);
    return t.bits == 16 ? all[0] : (t.bits == 32 ? all[1] : (t.bits == 64 ? all[2] : nullptr));
  }
  dtype = t.code == 6 ? DType::boolean : DType::bf16;
  if (t.code == 6 && t.bits == 8) return all[3];
  if (t.code != 4 || t.bits != 16) return nullptr;
  if (!bfloat16 && bfloat16_number() >= 0) {
    const py::module_ module = py::module_::import("ml_dtypes");
    bfloat16 = py::dtype::from_args(module.attr("bfloat16")).release().ptr();
  }
  return bfloat16;
}

bool read_tensor(const DLTensor& t, const ExchangeApi& api, DeviceDims& dims, DeviceView& view) {
  DType dtype;
  if (t.device_type != kCuda || t.ndim < 0 || t.ndim > DeviceDims::kMost) return false;
  if (view.dtype = dtype_of(t, dtype); !view.dtype || !current_stream(api, t, &view.stream)) return false;
  const auto size = static_cast<int64_t>(itemsize(dtype));
  int64_t step = 1;
  uintptr_t offsets = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
  ArrayView& a = view.array;
  a.data = reinterpret_cast<char*>(offsets);
  for (int i = t.ndim - 1; i >= 0; --i) {
    dims.shape[i] = t.shape[i];
    dims.strides[i] = (t.strides ? t.strides[i] : step) * size;
    step *= t.shape[i];
  }
  a.dtype = dtype;
  a.ndim = t.ndim;
  a.shape = dims.shape;
  a.strides = dims.strides;
  a.writeable = true;
  a.regular = (offsets & static_cast<uintptr_t>(size - 1)) == 0;
  view.device = t.device_id;
  return true;
}

const Producer* shareable(py::handle x) {
  const Producer* const from = producer(Py_TYPE(x.ptr()));
  return from && !(from->differentiates && wants_gradient(x)) ? from : nullptr;
}

// --- making --------------------------------------------------------------------------------------------------

struct Block {  // of the pool
  int device;
  void *data, *stream;
  bool lent = false;
};
constexpr const char* kBlock = "qkv.block";

// Back to the pool: for the next work of its stream, or where others used it for whoever has waited for all.
void release_block(PyObject* capsule) {
  const auto* block = static_cast<Block*>(PyCapsule_GetPointer(capsule, kBlock));
  device_release(block->device, block->data, block->lent ? nullptr : block->stream);
  delete block;
}

void set(py::handle x, PyObject* name, const py::object& value) {
  if (PyObject_SetAttr(x.ptr(), name, value.ptr()) != 0) throw py::error_already_set();
}

// A DeviceArray, as its __init__ makes it.
py::object device_array(py::array header, void* data, int device, void* stream, const py::object& owner,
                        const py::object& block) {
  auto* const type = reinterpret_cast<PyTypeObject*>(device_array_type());
  auto x = py::reinterpret_steal<py::object>(PyType_GenericAlloc(type, 0));
  if (!x) throw py::error_already_set();
  set(x, names().ptr, py::int_(reinterpret_cast<uintptr_t>(data)));
  set(x, names().device, py::int_(device));
  set(x, names().stream, py::int_(reinterpret_cast<uintptr_t>(stream)));
  set(x, names().header, header);
  set(x, names().owner, owner);
  set(x, names().block, block);
  return x;
}

}  // namespace

bool read_device_array(py::handle x, DeviceDims& dims, DeviceView& view) {
  const bool may = is_device_array(x) || producer(Py_TYPE(x.ptr()));
  return may && device_ready() && describe_device_array(x, dims, view);
}

bool is_on_device(py::handle x) {
  DeviceDims dims;
  DeviceView view;
  return read_device_array(x, dims, view);
}

bool describe_device_array(py::handle x, DeviceDims& dims, DeviceView& view) {
  if (is_device_array(x)) return read_own(x, view);
  const Producer* const from = shareable(x);
  if (!from) return false;
  DLTensor t;
  if (from->api->tensor(x.ptr(), &t) != 0) {
    PyErr_Clear();  // asked in the longer way it says why
    return false;
  }
  return read_tensor(t, *from->api, dims, view);
}

py::object take_device_array(py::handle x) {
  if (is_device_array(x)) {
    DeviceView own;
    return device_ready() && read_own(x, own) ? py::reinterpret_borrow<py::object>(x) : py::object(py::none());
  }
  const Producer* const from = shareable(x);
  if (!from || !device_ready()) return py::none();
  Versioned* managed = nullptr;
  if (from->api->managed(x.ptr(), &managed) != 0) {
    PyErr_Clear();
    return py::none();
  }
  const py::capsule owner(managed, [](void* m) {
    auto* own = static_cast<Versioned*>(m);
    if (own->deleter) own->deleter(own);
  });
  DeviceDims dims;
  DeviceView view;
  if (managed->major != 1 || (managed->flags & kReadOnly) || !read_tensor(managed->tensor, *from->api, dims, view)) {
    return py::none();
  }
  const ArrayView& a = view.array;
  py::array header = device_header(a.data, a.ndim, a.shape, a.strides, view.dtype);
  return device_array(std::move(header), a.data, view.device, view.stream, owner, py::none());
}

py::object new_device_array(const py::handle& dtype, const Shape& shape, int device, void* stream, char** data) {
  int64_t bytes = py::reinterpret_borrow<py::dtype>(dtype).itemsize();
  for (const Py_ssize_t n : shape) {
    if (__builtin_mul_overflow(bytes, static_cast<int64_t>(n), &bytes)) throw MemoryError("DeviceArray: too large");
  }
  py::object block = py::none();
  *data = nullptr;
  if (bytes > 0) {
    {
      const WithoutGil released;
      *data = static_cast<char*>(device_allocate(device, bytes, stream));
    }
    auto* const own = new Block{device, *data, stream};
    block = py::reinterpret_steal<py::object>(PyCapsule_New(own, kBlock, release_block));
  }
  py::array header = device_header(*data, shape.size(), shape.begin(), nullptr, dtype);
  return device_array(std::move(header), *data, device, stream, block, block);
}

py::array device_header(void* data, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides, py::handle dtype) {
  const auto& api = py::detail::npy_api::get();
  static char nothing[16];  // NumPy would allocate for no data
  PyObject* const array =
      api.PyArray_NewFromDescr_(api.PyArray_Type_, dtype.inc_ref().ptr(), ndim, shape, strides, data ? data : nothing,
                                py::detail::npy_api::NPY_ARRAY_WRITEABLE_, nullptr);
  if (!array) throw py::error_already_set();
  return py::reinterpret_steal<py::array>(array);
}

void lend_block(py::handle block) { static_cast<Block*>(PyCapsule_GetPointer(block.ptr(), kBlock))->lent = true; }

}  // namespace qkv::python
