// SPDX-License-Identifier: Apache-2.0
// Memory of a GPU for qkv.DeviceArray, and DLPack 1.x both ways.
#include <pybind11/stl.h>
#include <string.h>

#include "call.h"
#include "device_array.h"
#include "qkv/plugin.h"
#include "register.h"

namespace qkv::python {
namespace {

struct Managed {  // "dltensor"
  DLTensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

// --- out -----------------------------------------------------------------------------------------------------

struct Export {  // what a capsule of ours keeps alive
  std::vector<int64_t> shape, strides;
  py::object owner;
};

template <class M>
void drop(M* managed) {
  const py::gil_scoped_acquire gil;
  delete static_cast<Export*>(managed->context);
  delete managed;
}

template <class M>
py::capsule capsule_of(M* managed, const char* name) {
  managed->deleter = drop<M>;
  return py::capsule(managed, name, [](PyObject* capsule) {
    const char* own = PyCapsule_GetName(capsule);
    if (!own || strncmp(own, "used_", 5) == 0) return;  // the consumer calls the deleter
    auto* m = static_cast<M*>(PyCapsule_GetPointer(capsule, own));
    m->deleter(m);
  });
}

py::capsule to_dlpack(py::object owner, uintptr_t data, const std::pair<int, int>& code_bits, int device,
                      bool versioned) {
  auto* kept = new Export;
  for (const py::handle n : owner.attr("shape")) kept->shape.push_back(n.cast<int64_t>());
  const int64_t size = code_bits.second / 8;
  for (const py::handle n : owner.attr("strides")) kept->strides.push_back(n.cast<int64_t>() / size);
  kept->owner = std::move(owner);
  const DLTensor tensor{reinterpret_cast<void*>(data),
                        kCuda,
                        device,
                        static_cast<int32_t>(kept->shape.size()),
                        static_cast<uint8_t>(code_bits.first),
                        static_cast<uint8_t>(code_bits.second),
                        1,
                        kept->shape.data(),
                        kept->strides.data(),
                        0};
  if (versioned) {
    const uint64_t flags = kept->owner.attr("_header").attr("flags").attr("writeable").cast<bool>() ? 0 : kReadOnly;
    return capsule_of(new Versioned{1, 0, kept, nullptr, flags, tensor}, "dltensor_versioned");
  }
  return capsule_of(new Managed{tensor, kept, nullptr}, "dltensor");
}

// --- in ------------------------------------------------------------------------------------------------------

// A dict of the tensor in a capsule; its "owner" keeps the memory alive.
py::dict from_dlpack(const py::capsule& capsule) {
  const char* name = PyCapsule_GetName(capsule.ptr());
  const DLTensor* t = nullptr;
  bool read_only = false;
  py::capsule owner;
  if (name && strcmp(name, "dltensor_versioned") == 0) {
    auto* m = capsule.get_pointer<Versioned>();
    if (m->major != 1) throw TypeError("DLPack " + std::to_string(m->major) + " is not known here; expected 1.x");
    t = &m->tensor;
    read_only = m->flags & kReadOnly;
    owner = py::capsule(m, [](void* x) {
      auto* own = static_cast<Versioned*>(x);
      if (own->deleter) own->deleter(own);
    });
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
  } else if (name && strcmp(name, "dltensor") == 0) {
    auto* m = capsule.get_pointer<Managed>();
    t = &m->tensor;
    owner = py::capsule(m, [](void* x) {
      auto* own = static_cast<Managed*>(x);
      if (own->deleter) own->deleter(own);
    });
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  } else {
    throw TypeError("the capsule is not of DLPack, or was used before");
  }
  py::list shape, strides;
  int64_t step = 1;
  std::vector<int64_t> packed(static_cast<size_t>(t->ndim));
  for (int i = t->ndim - 1; i >= 0; --i) {
    packed[static_cast<size_t>(i)] = step;
    step *= t->shape[i];
  }
  const int64_t size = t->bits / 8;
  for (int i = 0; i < t->ndim; ++i) {
    shape.append(t->shape[i]);
    strides.append((t->strides ? t->strides[i] : packed[static_cast<size_t>(i)]) * size);
  }
  py::dict d;
  d["ptr"] = reinterpret_cast<uintptr_t>(t->data) + t->byte_offset;
  d["shape"] = py::tuple(shape);
  d["strides"] = py::tuple(strides);
  d["code"] = static_cast<int>(t->code);
  d["bits"] = t->lanes == 1 ? static_cast<int>(t->bits) : 0;
  d["device_type"] = t->device_type;
  d["device"] = t->device_id;
  d["read_only"] = read_only;
  d["owner"] = owner;
  return d;
}

// --- memory --------------------------------------------------------------------------------------------------

void* pointer(uintptr_t x) { return reinterpret_cast<void*>(x); }

}  // namespace

void register_device(py::module_& m) {
  m.def("to_dlpack", &to_dlpack);
  m.def("from_dlpack", &from_dlpack);
  m.def("device_header", [](uintptr_t data, const std::vector<Py_ssize_t>& shape,
                            const std::vector<Py_ssize_t>& strides, const py::dtype& dtype) {
    return device_header(pointer(data), static_cast<int>(shape.size()), shape.data(), strides.data(), dtype);
  });
  m.def("device_take", &take_device_array);
  m.def("device_empty", [](const py::tuple& dims, const py::dtype& dtype, int device, uintptr_t stream) {
    if (dims.size() > static_cast<size_t>(kMaxDims)) throw ValueError("DeviceArray: too many dimensions");
    Shape shape;
    for (const py::handle n : dims) shape.append(n.cast<Py_ssize_t>());
    char* data = nullptr;
    return new_device_array(dtype, shape, device, pointer(stream), &data);
  });
  m.def("device_ready", &device_ready);
  m.def("is_on_device", &is_on_device);
  m.def("device_lend", &lend_block);
  m.def("cuda_build", &cuda_build);
  m.def("device_upload", [](int device, uintptr_t to, const py::array& from, uintptr_t stream) {
    const void* data = proxy(from)->data;
    const auto bytes = static_cast<int64_t>(from.nbytes());
    const WithoutGil released;
    device_copy(device, pointer(to), data, bytes, pointer(stream));
  });
  m.def("device_download", [](int device, const py::array& to, uintptr_t from, uintptr_t stream) {
    void* data = proxy(to)->data;
    const auto bytes = static_cast<int64_t>(to.nbytes());
    const WithoutGil released;
    device_copy(device, data, pointer(from), bytes, pointer(stream));
  });
  m.def("device_synchronize", [](int device, uintptr_t stream) {
    const WithoutGil released;
    device_synchronize(device, pointer(stream));
  });
  m.def("device_order",
        [](int device, uintptr_t before, uintptr_t after) { device_order(device, pointer(before), pointer(after)); });
  m.def("device_of", [](uintptr_t data) { return device_of(pointer(data)); });
  m.def("device_memory", [](int device) {
    const DeviceMemory memory = device_memory(device);
    py::dict d;
    d["in_use"] = memory.in_use;
    d["cached"] = memory.cached;
    d["peak"] = memory.peak;
    d["allocations"] = memory.allocations;
    return d;
  });
  m.def("device_trim", [](int device) {
    const WithoutGil released;
    device_trim(device);
  });
}

}  // namespace qkv::python
