// SPDX-License-Identifier: Apache-2.0
// The extension's table of contents, and the one place where errors become Python's.
#include "qkv/error.h"
#include "register.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.attr("__version__") = QKV_VERSION;
#ifdef QKV_MUTANTS
  m.attr("mutants") = true;
#else
  m.attr("mutants") = false;
#endif
  static PyObject* backend_error = PyErr_NewExceptionWithDoc(
      "qkv.BackendError", "No backend can run this; the message lists each one's reason.", PyExc_RuntimeError, nullptr);
  m.attr("BackendError") = py::handle(backend_error);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const qkv::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const qkv::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const qkv::IndexError& e) {
      PyErr_SetString(PyExc_IndexError, e.what());
    } catch (const qkv::MemoryError& e) {
      PyErr_SetString(PyExc_MemoryError, e.what());
    } catch (const qkv::BackendError& e) {
      PyErr_SetString(backend_error, e.what());
    }
  });
  qkv::python::register_alignment(m);
  qkv::python::register_attention(m);
  qkv::python::register_classics(m);
  qkv::python::register_device(m);
  qkv::python::register_direct(m);
  qkv::python::register_layers(m);
  qkv::python::register_masks(m);
  qkv::python::register_rotation(m);
  qkv::python::register_runtime(m);
  qkv::python::register_weights(m);
}
