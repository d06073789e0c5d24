// SPDX-License-Identifier: Apache-2.0
// Compiled mask programs, and the two questions kernels ask of them, for the tests of the mask algebra.
#include <pybind11/stl.h>

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

py::array_t<bool> mask_dense(const CompiledMask& mask, int64_t Sq, int64_t Sk, int64_t q_offset) {
  py::array_t<bool> out({Sq, Sk});
  bool* x = out.mutable_data();
  const MaskProgram program{mask.nodes.data(), static_cast<int>(mask.nodes.size())};
  for (int64_t i = 0; i < Sq; ++i) {
    for (int64_t j0 = 0; j0 < Sk; j0 += 32) {
      const uint32_t bits = mask_bits(program, 0, q_offset + i, j0);
      for (int64_t j = j0; j < Sk && j < j0 + 32; ++j) x[i * Sk + j] = bits >> (j - j0) & 1u;
    }
  }
  return out;
}

int mask_cover(const CompiledMask& mask, int64_t p0, int64_t p1, int64_t j0, int64_t j1) {
  const MaskProgram program{mask.nodes.data(), static_cast<int>(mask.nodes.size())};
  return static_cast<int>(mask_cover(program, 0, {p0, p1, j0, j1}));
}

}  // namespace

void register_masks(py::module_& m) {
  py::class_<CompiledMask>(m, "MaskProgram").def(py::init<const py::list&>());
  m.def("mask_dense", &mask_dense, "visible(q_offset + i, j) as bool (Sq, Sk)");
  m.def("mask_cover", &mask_cover, "0 none, 1 all, 2 some, for positions p0..p1 and keys j0..j1, inclusive");
}

}  // namespace qkv::python
