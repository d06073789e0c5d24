// SPDX-License-Identifier: Apache-2.0
// The options of what makes weights of scores: normalizer and dropout.
#include <math.h>

#include "call.h"
#include "register.h"

namespace qkv::python {

using std::string;
using std::to_string;

namespace {

constexpr Normalizer kNormalizers[] = {Normalizer::sigmoid, Normalizer::sparsemax, Normalizer::entmax15,
                                       Normalizer::hardmax};
constexpr const char* kNames = "softmax, softmax1, sigmoid, sparsemax, entmax15, hardmax";

bool is_generator(py::handle x) { return py::isinstance(x, py::module_::import("numpy.random").attr("Generator")); }

}  // namespace

// After the sinks: softmax1 is a softmax with a sink of 0, which shares the row with a sink that is given.
void Call::normalizer_option(py::handle x) {
  if (is_text(x, "softmax")) return;
  Problem& p = problem;
  for (const Normalizer n : kNormalizers) {
    if (!is_text(x, name(n))) continue;
    p.normalizer = n;
    return;
  }
  if (!PyUnicode_Check(x.ptr())) type_error("normalizer is " + type_text(x) + "; expected one of " + kNames);
  if (!is_text(x, "softmax1")) {
    value_error("normalizer is " + py::repr(x).cast<string>() + "; expected one of " + kNames);
  }
  if (!p.sinks) {
    doubles_.emplace_back(static_cast<size_t>(p.Hq), 0.0);
  } else {
    for (double& s : doubles_.back()) s = s > 0 ? s + log1p(exp(-s)) : log1p(exp(s));
  }
  p.sinks = doubles_.back().data();
}

void Call::dropout_option(py::handle dropout_p, py::handle rng) {
  if (PyFloat_CheckExact(dropout_p.ptr()) && PyFloat_AS_DOUBLE(dropout_p.ptr()) == 0 && rng.is_none()) return;
  const double p = number("dropout_p", dropout_p);
  if (!(p >= 0 && p < 1)) {
    value_error("dropout_p is " + py::str(dropout_p).cast<string>() + "; expected 0 <= dropout_p < 1");
  }
  const char* const expected = "; expected an int seed or a numpy.random.Generator";
  if (p == 0 && rng.is_none()) return;
  if (rng.is_none()) type_error("dropout_p is " + py::str(dropout_p).cast<string>() + " and rng is None" + expected);
  uint64_t seed = 0;
  if (PyIndex_Check(rng.ptr()) && !PyBool_Check(rng.ptr()) && !py::isinstance<py::array>(rng)) {
    const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(rng.ptr()));
    if (!index) throw py::error_already_set();
    seed = PyLong_AsUnsignedLongLong(index.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      value_error("rng is " + py::str(index).cast<string>() + "; expected a seed of 0 to 2^64 - 1");
    }
  } else if (is_generator(rng)) {
    if (p > 0) generator_ = py::reinterpret_borrow<py::object>(rng);
  } else {
    type_error("rng is " + type_text(rng) + expected);
  }
  problem.dropout = make_dropout(p, seed);
}

// A generator moves on once a call is sure to run: a refused one leaves it as it was.
void Call::draw_seed(const string& backend) {
  if (!generator_) return;
  validate(problem);
  select_backend(problem, backend, nullptr);
  const py::object words = py::module_::import("numpy").attr("uint64");
  const py::object drawn =
      generator_.attr("integers")(UINT64_MAX, py::arg("dtype") = words, py::arg("endpoint") = true);
  problem.dropout.seed = drawn.cast<uint64_t>();
}

namespace {

// True where a weight is kept, (B, Hq, Sq, Sk).
py::array dropout_mask(py::handle B, py::handle Hq, py::handle Sq, py::handle Sk, py::handle dropout_p,
                       py::handle rng) {
  Call call("dropout_mask");
  Problem& p = call.problem;
  p.B = B.cast<int64_t>();
  p.Hq = p.Hkv = Hq.cast<int64_t>();
  p.Sq = Sq.cast<int64_t>();
  p.Sk = Sk.cast<int64_t>();
  call.dropout_option(dropout_p, rng);
  call.draw_seed("reference");
  validate(p);
  py::array kept = new_array(py::dtype::of<bool>(), {p.B, p.Hq, p.Sq, p.Sk});
  auto* out = static_cast<bool*>(kept.mutable_data());
  const WithoutGil released;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t h = 0; h < p.Hq; ++h) {
      for (int64_t i = 0; i < p.Sq; ++i, out += p.Sk) {
        for (int64_t j = 0; j < p.Sk; j += 4) {
          const Philox words = dropout_words(p.dropout.seed, b, h, i, j);
          for (int64_t t = 0; t < 4 && j + t < p.Sk; ++t) out[j + t] = words.word[t] >= p.dropout.threshold;
        }
      }
    }
  }
  return kept;
}

}  // namespace

void register_weights(py::module_& m) { m.def("dropout_mask", &dropout_mask); }

}  // namespace qkv::python
