// SPDX-License-Identifier: Apache-2.0
// The direct way into attention. Filling in two dozen keyword defaults takes Python as long as a small call computes,
// so what users call is an object that does it here, with the names and defaults of the Python function. That function
// is the documentation, and still runs whatever wants something of Python: rope, bias objects, a named result, a
// keyword or a number of arguments that is not known here.
#include <pybind11/pybind11.h>
#include <structmember.h>

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

using py::handle;

enum Argument { kLayout = kOptions, kDtype, kOut, kBackend, kReturnLse, kReturnWeights, kRope, kArguments };

constexpr const char* kOtherNames[] = {"layout", "dtype", "out", "backend", "return_lse", "return_weights", "rope"};
static_assert(kOptions + std::size(kOtherNames) == kArguments);

// Lives as long as the module.
struct Direct {
  PyObject_HEAD;
  vectorcallfunc call;
  PyObject *dict, *weak_references, *function;
  PyObject* requested;             // the context variable with the backend of calls that name none
  PyObject* name[kArguments];      // interned, as the names at a call are
  PyObject* standard[kArguments];  // defaults
};

// The arguments by name, and whether nothing of Python is needed for them.
bool read(const Direct& self, PyObject* const* values, PyObject* names, handle* x) {
  for (int i = 0; i < kArguments; ++i) x[i] = self.standard[i];
  const Py_ssize_t n = names ? PyTuple_GET_SIZE(names) : 0;
  for (Py_ssize_t t = 0; t < n; ++t) {
    int i = 0;
    while (i < kArguments && self.name[i] != PyTuple_GET_ITEM(names, t)) ++i;
    if (i == kArguments) return false;
    x[i] = values[t];
  }
  return x[kRope].is_none() && x[kReturnLse].ptr() == Py_False && x[kReturnWeights].ptr() == Py_False &&
         (x[kBias].is_none() || is_plain_array(x[kBias]));
}

py::object attention(const Direct& self, PyObject* const* arrays, const handle* x) {
  Call call("attention");
  call.arrays(arrays[0], arrays[1], arrays[2], x[kLayout], x[kDtype]);
  call.options(x);
  call.make_out(x[kOut]);
  PyObject* requested = nullptr;
  if (x[kBackend].is_none() && PyContextVar_Get(self.requested, nullptr, &requested) < 0) throw py::error_already_set();
  const auto inherited = py::reinterpret_steal<py::object>(requested);
  call.run(inherited ? inherited : x[kBackend]);
  return call.out();
}

PyObject* call_direct(PyObject* object, PyObject* const* arguments, size_t flagged_count, PyObject* names) {
  const Direct& self = *reinterpret_cast<const Direct*>(object);
  handle x[kArguments];
  if (PyVectorcall_NARGS(flagged_count) != 3 || !read(self, arguments + 3, names, x)) {
    return PyObject_Vectorcall(self.function, arguments, flagged_count, names);
  }
  try {
    return attention(self, arguments, x).release().ptr();
  } catch (const std::exception&) {  // not all: the end of the interpreter unwinds daemon threads through here
    py::detail::try_translate_exceptions();
    return nullptr;
  }
}

// --- what else a function is ---------------------------------------------------------------------------------

PyObject* function_of(PyObject* self) { return reinterpret_cast<Direct*>(self)->function; }

PyObject* bind_method(PyObject* self, PyObject* instance, PyObject*) {
  return instance ? PyMethod_New(self, instance) : Py_NewRef(self);
}
PyObject* represent(PyObject* self) { return PyObject_Repr(function_of(self)); }
PyObject* reduce(PyObject* self, PyObject*) { return PyObject_GetAttrString(function_of(self), "__qualname__"); }

PyObject* direct_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Direct, call), READONLY, nullptr},
      {"__dictoffset__", T_PYSSIZET, offsetof(Direct, dict), READONLY, nullptr},
      {"__weaklistoffset__", T_PYSSIZET, offsetof(Direct, weak_references), READONLY, nullptr},
      {}};
  static PyGetSetDef properties[] = {{"__dict__", PyObject_GenericGetDict, nullptr, nullptr, nullptr}, {}};
  static PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr}, {}};  // pickled by name
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                {Py_tp_descr_get, reinterpret_cast<void*>(bind_method)},
                                {Py_tp_repr, reinterpret_cast<void*>(represent)},
                                {Py_tp_members, members},
                                {Py_tp_getset, properties},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  constexpr unsigned flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  static PyType_Spec spec{"qkv._core.Direct", sizeof(Direct), 0, flags, slots};
  return PyType_FromSpec(&spec);
}

py::object direct(const py::function& function) {
  static PyObject* const type = direct_type();
  if (!type) throw py::error_already_set();
  auto object = py::reinterpret_steal<py::object>(PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type), 0));
  if (!object) throw py::error_already_set();
  auto& self = *reinterpret_cast<Direct*>(object.ptr());
  self.call = call_direct;
  self.function = function.inc_ref().ptr();
  self.requested = py::object(py::module_::import("qkv._backend").attr("requested")).release().ptr();
  const py::dict defaults = function.attr("__kwdefaults__");
  for (int i = 0; i < kArguments; ++i) {
    const char* const name = i < kOptions ? kOptionNames[i] : kOtherNames[i - kOptions];
    self.name[i] = PyUnicode_InternFromString(name);
    self.standard[i] = py::object(defaults[name]).release().ptr();
  }
  py::module_::import("functools").attr("update_wrapper")(object, function);
  return object;
}

}  // namespace

void register_direct(py::module_& m) { m.def("direct", &direct); }

}  // namespace qkv::python
