// SPDX-License-Identifier: Apache-2.0
// Backends, levels, threads, and the machine's limits.
#include <pybind11/stl.h>

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

DType float_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "bfloat16") return DType::bf16;
  throw ValueError("fma_peak: dtype is '" + name + "'; expected 'float32', 'float64' or 'bfloat16'");
}

// Runs f() with this thread in explaining mode: calls validate and choose, and compute nothing.
py::dict explain(const py::function& f) {
  Explanation e;
  Explanation* const before = explaining();
  explaining() = &e;
  try {
    f();
  } catch (...) {
    explaining() = before;
    throw;
  }
  explaining() = before;
  py::dict d;
  d["backend"] = e.backend;
  d["kernel"] = e.kernel;
  d["refusals"] = e.refusals;
  d["copies"] = e.copies;
  return d;
}

}  // namespace

void register_runtime(py::module_& m) {
  m.def("explain", &explain);
  m.def("backends", [] {
    std::vector<std::tuple<std::string, bool, std::string>> rows;
    for (const Backend* b : backends()) {
      std::string reason;
      const bool ok = b->available(reason);
      rows.emplace_back(b->name, ok, reason);
    }
    return rows;
  });
  m.def("set_plugin_folder", &set_plugin_folder);
  m.def("cpu_levels", &cpu_levels);
  m.def("cpu_level", &cpu_level);
  m.def("set_cpu_level", &set_cpu_level);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("fma_peak", [](const std::string& dtype, int threads) {
    const DType t = float_dtype(dtype);
    const WithoutGil released;
    return fma_peak(t, threads);
  });
  m.def("read_bandwidth", [](int64_t bytes, int threads) {
    const WithoutGil released;
    return read_bandwidth(bytes, threads);
  });
}

}  // namespace qkv::python
