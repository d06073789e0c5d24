// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of an array.
#include "qkv/rotation.h"

#include "call.h"
#include "register.h"

namespace qkv::python {
namespace {

// Where the last two axes begin for each index of the others, in elements.
std::vector<int64_t> starts(const ArrayView& a) {
  std::vector<int64_t> at{0};
  for (int i = 0; i < a.ndim - 2; ++i) {
    std::vector<int64_t> next;
    for (const int64_t base : at) {
      for (int64_t t = 0; t < a.shape[i]; ++t) next.push_back(base + t * elements(a.strides[i], a.dtype));
    }
    at = std::move(next);
  }
  return at;
}

// Of x (..., S, D) by cos and sin (..., S, n), whose leading axes are broadcast already; out is new and contiguous. The
// Python side has made all of them; uint16 holds bfloat16.
void rotate(py::array x, const py::array& cos, const py::array& sin, bool interleaved, const py::array& out) {
  DType dtype, wide;
  if (!known_dtype(x, dtype)) dtype = DType::bf16;
  if (!known_dtype(cos, wide)) throw TypeError("rotate: cos has an unsupported dtype");
  if (!view_of(x, dtype).regular) x = x.attr("copy")();
  const ArrayView xv = view_of(x, dtype), cv = view_of(cos, wide);
  const std::vector<int64_t> x_at = starts(xv), angles_at = starts(cv);
  Rotation r{};
  r.outer = static_cast<int64_t>(x_at.size());
  r.rows = xv.shape[xv.ndim - 2];
  r.D = xv.shape[xv.ndim - 1];
  r.n = cv.shape[cv.ndim - 1];
  r.dtype = dtype;
  r.x = xv.data;
  r.x_at = x_at.data();
  r.x_s = elements(xv.strides[xv.ndim - 2], dtype);
  r.x_d = elements(xv.strides[xv.ndim - 1], dtype);
  r.cos = cv.data;
  r.sin = proxy(sin)->data;
  r.angles_at = angles_at.data();
  r.angles_s = elements(cv.strides[cv.ndim - 2], wide);
  r.out = proxy(out)->data;
  r.interleaved = interleaved;
  const WithoutGil released;
  qkv::rotate(r);
}

}  // namespace

void register_rotation(py::module_& m) { m.def("rotate", &rotate); }

}  // namespace qkv::python
