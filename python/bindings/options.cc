// SPDX-License-Identifier: Apache-2.0
// The options of attention: kinds, shapes and broadcasting, in the user's words.
#include <math.h>

#include "call.h"

namespace qkv::python {

using std::string;
using std::to_string;

CompiledMask::CompiledMask(const py::list& program) {
  if (program.size() > static_cast<size_t>(kMaskNodes)) {
    throw ValueError("mask: " + to_string(program.size()) + " nodes; expected at most " + to_string(kMaskNodes));
  }
  for (const py::handle item : program) {
    const auto [op, a, b, array] = item.cast<std::tuple<int, int64_t, int64_t, py::object>>();
    std::vector<int64_t> values;
    Shape dims;
    if (!array.is_none()) {
      const auto x = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
      if (!x) throw py::error_already_set();
      values.assign(x.data(), x.data() + x.size());
    }
    if (op == static_cast<int>(MaskOp::Lengths)) {  // data = shape (a entries), values
      if (a < 0 || a > static_cast<int64_t>(values.size())) throw ValueError("mask: lengths has invalid arguments");
      if (a > kMaxDims) throw ValueError("mask: lengths has " + to_string(a) + " dimensions");
      for (int64_t i = 0; i < a; ++i) dims.append(values[static_cast<size_t>(i)]);
      values.erase(values.begin(), values.begin() + a);
    }
    const bool leaf = op >= 0 && op <= static_cast<int>(MaskOp::Neighborhood);
    const bool operation = op >= static_cast<int>(MaskOp::And) && op <= static_cast<int>(MaskOp::Not);
    if (!leaf && !operation) throw ValueError("mask: unknown operation " + to_string(op));
    nodes.push_back({static_cast<MaskOp>(op), a, b, nullptr, static_cast<int64_t>(values.size())});
    const MaskNode& m = nodes.back();
    bool valid = true;  // what the leaves divide by or index with
    switch (m.op) {
      case MaskOp::Strided: valid = a >= 1; break;
      case MaskOp::Dilated: valid = a >= 0 && b >= 1; break;
      case MaskOp::Band: valid = a >= 0 && b >= 0; break;
      case MaskOp::BlockSparse: valid = a >= 1 && b >= 0 && (b == 0 ? m.n == 0 : m.n % b == 0); break;
      case MaskOp::Tree: valid = a >= 0 && m.n == 2 * a; break;
      case MaskOp::Neighborhood:
        valid = m.n >= 1 && values[0] >= 1 && values[0] <= 8 && m.n == 1 + 3 * values[0];
        for (int64_t i = 1; valid && i < m.n; ++i) valid = values[static_cast<size_t>(i)] >= 1;
        break;
      default: break;
    }
    if (!valid) throw ValueError("mask: operation " + to_string(op) + " has invalid arguments");
    data.push_back(std::move(values));
    shape.push_back(dims);
  }
  for (size_t i = 0; i < nodes.size(); ++i) nodes[i].data = data[i].data();
}

// --- small conversions ---------------------------------------------------------------------------------------

py::object Call::as_array(const char* name, py::handle x) {
  if (is_plain_array(x)) return py::reinterpret_borrow<py::object>(x);
  py::object array = py::module_::import("qkv._arrays").attr("as_array")(problem.function, name, x);
  const bool may = string(name) == "mask" || string(name) == "bias";
  if (!may && is_device_array(array)) {
    type_error(string(name) + " is in GPU memory; expected an array in host memory");
  }
  return array;
}

double Call::number(const char* name, py::handle x) {
  if (PyBool_Check(x.ptr()) || !(PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr()) || PyIndex_Check(x.ptr()) ||
                                 PyObject_HasAttrString(x.ptr(), "__float__"))) {
    type_error(string(name) + " is " + type_text(x) + "; expected a number");
  }
  const double value = PyFloat_AsDouble(x.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    type_error(string(name) + " is " + type_text(x) + "; expected one number");
  }
  return value;
}

const int64_t* Call::integers(const char* name, py::handle x, Py_ssize_t& n) {
  const py::object array = as_array(name, x);
  const char kind = py::reinterpret_borrow<py::dtype>(proxy(array)->descr).kind();
  const auto shape = py::reinterpret_borrow<py::array>(array);
  if (kind != 'i' && kind != 'u' && shape.size() != 0) {
    type_error(string(name) + " is " + type_text(array) + "; expected integers");
  }
  if (shape.ndim() != 1) {
    value_error(string(name) + " has " + to_string(shape.ndim()) + " dimensions; expected 1");
  }
  const auto ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  if (!ints) throw py::error_already_set();
  n = ints.size();
  std::vector<int64_t> values;
  values.reserve(static_cast<size_t>(n) + 1);  // an empty selection is not "not given"
  values.assign(ints.data(), ints.data() + n);
  // A uint64 beyond int64 has wrapped: make it one that no check lets through.
  for (int64_t& i : values) i = kind == 'u' && i < 0 ? INT64_MAX : i;
  ints_.push_back(std::move(values));
  return ints_.back().data();
}

// An integer or an integer array that broadcasts to the leading dimensions, as one entry per batch element.
const int64_t* Call::per_batch(const char* name, py::handle x) {
  if (x.is_none()) return nullptr;
  const size_t B = problem.B < 0 ? 0 : static_cast<size_t>(problem.B);
  if (PyLong_Check(x.ptr()) && !PyBool_Check(x.ptr())) {
    int too_big = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(x.ptr(), &too_big);
    if (too_big) value_error(string(name) + " is " + py::str(x).cast<string>() + "; expected at most 2^60");
    ints_.emplace_back(B, value);
    return ints_.back().data();
  }
  const py::object array = as_array(name, x);
  const char kind = py::reinterpret_borrow<py::dtype>(proxy(array)->descr).kind();
  if (kind != 'i' && kind != 'u') type_error(string(name) + " is " + type_text(array) + "; expected integers");
  const auto ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  if (!ints) throw py::error_already_set();
  const int64_t* const out = broadcast_ints(name, view_of(ints, DType::i64));
  for (int64_t& i : ints_.back()) i = kind == 'u' && i < 0 ? INT64_MAX : i;
  return out;
}

// One entry per batch element of an array that broadcasts to the leading dimensions.
const int64_t* Call::broadcast_ints(const char* name, const ArrayView& v) {
  const size_t B = problem.B < 0 ? 0 : static_cast<size_t>(problem.B);
  const int have = v.ndim, want = lead_.size();
  bool fits = have <= want;
  for (int i = 0; fits && i < have; ++i) fits = v.shape[i] == 1 || v.shape[i] == lead_[want - have + i];
  if (!fits) {
    value_error(string(name) + " has shape " + shape_text(v) + ", which does not broadcast to the leading dimensions " +
                shape_text(lead_));
  }
  std::vector<int64_t> out(B);
  out.reserve(B + 1);
  for (size_t b = 0; b < B; ++b) {
    size_t rest = b;
    Py_ssize_t offset = 0;
    for (int i = want - 1; i >= 0; --i) {
      const auto n = static_cast<size_t>(lead_[static_cast<size_t>(i)]);
      const int at = i - (want - have);
      if (at >= 0 && v.shape[at] != 1) offset += static_cast<Py_ssize_t>(rest % n) * v.strides[at];
      rest /= n;
    }
    out[b] = *reinterpret_cast<const int64_t*>(v.data + offset);
  }
  ints_.push_back(std::move(out));
  return ints_.back().data();
}

namespace {

bool real_kind(py::handle array) {
  const char kind = py::reinterpret_borrow<py::dtype>(proxy(array)->descr).kind();
  DType t;
  return kind == 'f' || kind == 'i' || kind == 'u' || (known_dtype(array, t) && t == DType::bf16);
}

}  // namespace

const double* Call::per_head(const char* name, py::handle x) {
  if (x.is_none()) return nullptr;
  const py::object array = as_array(name, x);
  if (!real_kind(array)) type_error(string(name) + " is " + type_text(array) + "; expected real numbers");
  const auto a =
      py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(array.attr("astype")("float64"));
  if (!a) throw py::error_already_set();
  if (a.ndim() != 1 || a.size() != problem.Hq) {
    value_error(string(name) + " has shape " + shape_text(view_of(a, DType::f64)) +
                "; expected one entry per head of q, (" + to_string(problem.Hq) + ",)");
  }
  doubles_.emplace_back(a.data(), a.data() + a.size());
  return doubles_.back().data();
}

// --- mask, gate ----------------------------------------------------------------------------------------------

int64_t Call::window_side(py::handle x) {
  if (x.is_none()) return kUnbounded;
  if (PyBool_Check(x.ptr()) || !PyIndex_Check(x.ptr())) {
    type_error("window has " + py::repr(x).cast<string>() + "; expected integers or None, as (left, right)");
  }
  int too_big = 0;
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(x.ptr()));
  if (!index) throw py::error_already_set();
  const int64_t n = PyLong_AsLongLongAndOverflow(index.ptr(), &too_big);
  if (too_big < 0 || (too_big == 0 && n < 0)) {
    value_error("window has " + py::str(x).cast<string>() + "; a side is 0 or more keys, or None for unbounded");
  }
  return too_big != 0 || n > kUnbounded ? kUnbounded : n;
}

void Call::mask_option(py::handle mask, py::handle causal, py::handle window) {
  int64_t left = kUnbounded, right = kUnbounded;
  if (!window.is_none()) {
    const bool pair = (PyTuple_Check(window.ptr()) || PyList_Check(window.ptr())) && py::len(window) == 2;
    if (!pair) {
      type_error("window is " + py::repr(window).cast<string>() +
                 "; expected a pair (left, right) of integers or None");
    }
    left = window_side(window[py::int_(0)]);
    right = window_side(window[py::int_(1)]);
  }
  if (flag("causal", causal) && right > 0) right = 0;

  if (!mask.is_none()) {
    static const py::object* const type = new py::object(py::module_::import("qkv.masks").attr("Mask"));
    if (py::isinstance(mask, *type)) {
      py::object compiled = mask.attr("_compiled");
      const auto& program = compiled.cast<const CompiledMask&>();
      nodes_ = program.nodes;
      for (size_t i = 0; i < nodes_.size(); ++i) {
        if (nodes_[i].op != MaskOp::Lengths || program.shape[i].empty()) continue;
        ArrayView v;  // C-contiguous values of that shape
        Shape strides = program.shape[i];
        Py_ssize_t step = static_cast<Py_ssize_t>(sizeof(int64_t));
        for (int d = strides.size(); d-- > 0; step *= program.shape[i][d]) strides[d] = step;
        v.data = reinterpret_cast<char*>(const_cast<int64_t*>(nodes_[i].data));
        v.dtype = DType::i64;
        v.ndim = strides.size();
        v.shape = program.shape[i].begin();
        v.strides = strides.begin();
        nodes_[i].data = broadcast_ints("mask: lengths", v);
        nodes_[i].n = problem.B;
      }
      kept_.push_back(std::move(compiled));
    } else {
      if (problem.cu_q) {
        value_error("mask is an array; packed sequences take mask objects (qkv.masks), applied to each sequence");
      }
      if (const ArrayView* const there = on_device("mask", mask, true)) {
        bind_scores(problem.mask, *there, problem.Sk, "mask");
      } else {
        mask_array(mask);
      }
    }
  }
  if (left != kUnbounded || right != kUnbounded) {
    const bool alone = nodes_.empty();
    nodes_.push_back({MaskOp::Band, left, right, nullptr, 0});
    if (!alone) nodes_.push_back({MaskOp::And, 0, 0, nullptr, 0});
  }
  problem.program = {nodes_.data(), static_cast<int>(nodes_.size())};
}

void Call::mask_array(py::handle mask) {
  const py::object array = header("mask", as_array("mask", mask));
  DType t;
  if (!known_dtype(array, t) || t != DType::boolean) {
    type_error("mask is " + type_text(array) + "; expected bool (True = attend). Pass additive terms as bias=");
  }
  bind_scores(problem.mask, read_as_is("mask", array, DType::boolean), problem.Sk, "mask");
}

void Call::gate_option(py::handle gate) {
  if (gate.is_none()) return;
  Problem& p = problem;
  const py::object given = as_array("head_gate", gate);
  if (!real_kind(given)) type_error("head_gate is " + type_text(given) + "; expected real numbers");
  py::object array = given.attr("astype")("float64");
  if (py::reinterpret_borrow<py::array>(array).ndim() == 1) array = array[py::make_tuple(py::ellipsis(), py::none())];
  const ArrayView a = read_as_is("head_gate", array, DType::f64);
  Shape full = lead_;
  full.append({p.Hq, p.Sq});
  const int want = full.size();
  bool fits = a.ndim >= 1 && a.ndim <= want;
  for (int i = 0; fits && i < a.ndim; ++i) fits = a.shape[i] == 1 || a.shape[i] == full[want - a.ndim + i];
  // One number per head means one for each: (1,) is no shorthand for all of them.
  const auto flat = py::reinterpret_borrow<py::array>(given);
  if (flat.ndim() == 1) fits = flat.size() == p.Hq;
  if (!fits) {
    value_error("head_gate has shape " + py::str(given.attr("shape")).cast<string>() + "; expected (Hq,) = (" +
                to_string(p.Hq) + ",) or one that broadcasts to (..., Hq, Sq) = " + shape_text(full));
  }
  const auto stride = [&](int from_right) {
    const int i = a.ndim - from_right;
    return i < 0 || a.shape[i] == 1 ? 0 : elements(a.strides[i], a.dtype);
  };
  p.gate.data = a.data;
  p.gate.dtype = DType::f64;
  p.gate.s = stride(1);
  p.gate.h = stride(2);
  int slot = 0;
  const int lead = lead_.size();
  for (int i = 0; i < lead; ++i) {
    if (lead_[i] != 1 && slot < kMaxLead) p.gate.lead[slot++] = stride(2 + lead - i);
  }
}

void Call::options(py::handle tuple) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != kOptions) type_error("options are incomplete");
  py::handle option[kOptions];
  for (int i = 0; i < kOptions; ++i) option[i] = PyTuple_GET_ITEM(tuple.ptr(), i);
  options(option);
}

void Call::options(const py::handle* option) {
  Problem& p = problem;
  if (!option[kMask].is_none() || !option[kWindow].is_none() || option[kCausal].ptr() != Py_False) {
    mask_option(option[kMask], option[kCausal], option[kWindow]);
  }
  bias_option(option[kBias]);
  if (const py::handle scale = option[kScale]; !scale.is_none()) p.scale = number("scale", scale);
  if (const py::handle softcap = option[kSoftcap]; !softcap.is_none()) p.softcap = number("softcap", softcap);
  p.alibi = per_head("alibi_slopes", option[kAlibi]);
  p.sinks = per_head("sinks", option[kSinks]);
  normalizer_option(option[kNormalizer]);
  dropout_option(option[kDropoutP], option[kRng]);
  gate_option(option[kGate]);
  p.q_lens = per_batch("q_lens", option[kQLens]);
  p.kv_lens = per_batch("kv_lens", option[kKvLens]);
  p.q_offset = per_batch("q_offset", option[kQOffset]);
}

void Call::select(py::handle rows, py::handle heads) {
  Problem& p = problem;
  const auto resolve = [&](const char* name, py::handle x, int64_t limit, int64_t& count) -> const int64_t* {
    if (x.is_none()) return nullptr;
    Py_ssize_t n = 0;
    py::object array = as_array(name, x);
    if (py::reinterpret_borrow<py::array>(array).ndim() == 0) array = array.attr("reshape")(1);
    integers(name, array, n);
    std::vector<int64_t>& values = ints_.back();
    for (int64_t& i : values) {
      if (i >= -limit && i < 0) i += limit;
    }
    count = n;
    return values.data();
  };
  p.rows = resolve("rows", rows, p.Sq, p.n_rows);
  if (!has_heads_ && !heads.is_none()) value_error("heads is given, but q and k have no heads: their shape is (S, D)");
  p.heads = resolve("heads", heads, p.Hq, p.n_heads);
}

void Call::given_lse(py::handle lse) {
  if (lse.is_none()) return;
  const py::object array = as_array("lse", lse);
  const py::dtype dtype = accumulator_dtype(problem.dtype);
  if (!py::reinterpret_borrow<py::dtype>(proxy(array)->descr).equal(dtype)) {
    type_error("lse is " + type_text(array) + "; expected " + py::str(dtype).cast<string>());
  }
  Shape full = lead_;
  if (has_heads_) full.append(problem.Hq);
  full.append(problem.Sq);
  const ArrayView v = view_of(array, problem.dtype == DType::f64 ? DType::f64 : DType::f32);
  if (v.ndim != full.size() || !std::equal(full.begin(), full.end(), v.shape)) {
    value_error("lse has shape " + shape_text(v) + "; expected (..., Hq, Sq) = " + shape_text(full));
  }
  validate(problem);  // rows and heads, before they are used as indices
  const py::module_ np = py::module_::import("numpy");
  py::object chosen = array;
  const auto take = [&](const int64_t* x, int64_t n, int axis) {
    py::array_t<int64_t> index(n);
    std::copy(x, x + n, index.mutable_data());
    chosen = np.attr("take")(chosen, index, axis);
  };
  if (problem.heads) take(problem.heads, problem.n_heads, -2);
  if (problem.rows) take(problem.rows, problem.n_rows, -1);
  chosen = np.attr("ascontiguousarray")(chosen);
  problem.lse_in = view_of(chosen, v.dtype).data;
  kept_.push_back(std::move(chosen));
}

}  // namespace qkv::python
