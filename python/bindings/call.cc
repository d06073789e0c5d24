// SPDX-License-Identifier: Apache-2.0
#include "call.h"

#include <math.h>
#include <pybind11/stl.h>

#include <chrono>

namespace qkv::python {

using std::string;
using std::to_string;

Explanation*& explaining() {
  static thread_local Explanation* current = nullptr;
  return current;
}

void Call::value_error(const string& text) const { throw ValueError(string(problem.function) + ": " + text); }
void Call::type_error(const string& text) const { throw TypeError(string(problem.function) + ": " + text); }

// --- arrays --------------------------------------------------------------------------------------------------

// Notes where an array lives; for one on a device, what describes it: an ndarray whose data is never read here.
py::object Call::header(const char* name, py::object array) {
  const bool on_device = is_device_array(array);
  const int device = on_device ? array.attr("device").cast<int>() : -1;
  if (first_.empty()) {
    first_ = name;
    problem.device = device;
    if (on_device) problem.stream = stream_of(array);
  } else if (device != problem.device) {
    const auto place = [](int d) { return d < 0 ? string("host memory") : "GPU memory (device " + to_string(d) + ")"; };
    type_error(first_ + " is in " + place(problem.device) + ", " + name + " in " + place(device) +
               "; q, k, v, mask, bias and out must live in one place");
  }
  if (!on_device) return array;
  if (void* const other = stream_of(array); other != problem.stream) device_order(device, other, problem.stream);
  py::object description = array.attr("_header");
  kept_.push_back(std::move(array));
  return description;
}

ArrayView Call::read_as_is(const char* name, py::object array, DType dtype) {
  ArrayView v = view_of(array, dtype);
  if (!v.regular && problem.device >= 0) {
    value_error(string(name) + " is in GPU memory and not aligned to its items; expected an aligned array");
  }
  if (!v.regular) {
    array = array.attr("copy")();
    v = view_of(array, dtype);
    if (explaining()) explaining()->copies.push_back(string(name) + ": not aligned to its items");
  }
  kept_.push_back(std::move(array));
  inputs_.push_back(v);
  return v;
}

bool Call::flag(const char* name, py::handle x) const {
  if (x.ptr() == Py_True || x.ptr() == Py_False) return x.ptr() == Py_True;
  const string type = Py_TYPE(x.ptr())->tp_name;
  if (type != "numpy.bool" && type != "numpy.bool_") {
    type_error(string(name) + " is " + type_text(x) + "; expected True or False");
  }
  return PyObject_IsTrue(x.ptr()) == 1;
}

// q, k or v: an array of a dtype that kernels know, or what _arrays.coerce makes of anything else.
ArrayView Call::operand(const char* name, py::handle x, py::handle dtype) {
  DType t;
  py::object array = py::reinterpret_borrow<py::object>(x);
  const bool as_bf16 = !dtype.is_none();
  if (as_bf16 || !is_plain_array(x) || !known_dtype(x, t) || t == DType::boolean) {
    array = py::module_::import("qkv._arrays").attr("coerce")(problem.function, name, x, dtype);
    array = header(name, std::move(array));
    if (!known_dtype(array, t)) t = DType::bf16;  // uint16 holding bfloat16
  } else {
    array = header(name, std::move(array));
  }
  if (!dtype_) dtype_ = py::reinterpret_borrow<py::object>(proxy(array)->descr);  // q comes first
  return read_as_is(name, std::move(array), t);
}

// lead strides and the last `tail` dimensions of an array whose leading dimensions broadcast to lead_.
void Call::bind(View& view, const ArrayView& a, int tail, const char* name) {
  const int64_t size = itemsize(a.dtype);
  view.data = a.data;
  view.dtype = a.dtype;
  const int have = a.ndim - tail, want = static_cast<int>(lead_.size());
  int slot = 0;
  for (int i = 0; i < want; ++i) {
    const int at = i - (want - have);
    const Py_ssize_t n = at < 0 ? 1 : a.shape[at];
    if (n != 1 && n != lead_[i]) {
      value_error(string(name) + " has shape " + shape_text(a) +
                  ", which does not broadcast to the leading dimensions " + shape_text(lead_));
    }
    if (lead_[i] != 1 && slot < kMaxLead) view.lead[slot++] = n == 1 ? 0 : a.strides[at] / size;
  }
}

void Call::set_lead() {
  Problem& p = problem;
  p.n_lead = 0;
  p.B = 1;
  for (const Py_ssize_t n : lead_) {
    if (__builtin_mul_overflow(p.B, static_cast<int64_t>(n), &p.B)) p.B = -1;
    if (n == 1) continue;
    if (p.n_lead < kMaxLead) p.lead[p.n_lead] = n;
    ++p.n_lead;
  }
}

void Call::arrays(py::handle q, py::handle k, py::handle v, py::handle layout, py::handle dtype) {
  Problem& p = problem;
  if (!layout.is_none()) {
    const bool text = py::isinstance<py::str>(layout);
    const string name = py::repr(layout).cast<string>();
    if (!text) type_error("layout is " + name + "; expected 'BHSD' or 'BSHD'");
    swapped_ = name == "'BSHD'";
    if (!swapped_ && name != "'BHSD'") value_error("layout is " + name + "; expected 'BHSD' or 'BSHD'");
  }
  if (!dtype.is_none() && !(py::isinstance<py::str>(dtype) && dtype.cast<string>() == "bfloat16")) {
    type_error("dtype is " + py::repr(dtype).cast<string>() +
               "; only 'bfloat16' is expected, for uint16 arrays that hold it");
  }
  const bool with_v = v.ptr() != nullptr;
  const py::handle scored = projected_ ? py::handle(Py_None) : dtype;
  ArrayView vv;
  if (projected_) vv = operand("v", v, dtype);  // the first: out is of its dtype
  const ArrayView qv = operand("q", q, scored), kv = operand("k", k, scored);
  if (!projected_) vv = with_v ? operand("v", v, dtype) : kv;
  const DType expected = projected_ ? (vv.dtype == DType::f64 ? DType::f64 : DType::f32) : vv.dtype;
  if (qv.dtype != expected || kv.dtype != expected) {
    type_error(string("q is ") + name(qv.dtype) + ", k is " + name(kv.dtype) +
               (with_v ? string(", v is ") + name(vv.dtype) : "") + "; they must have the same dtype");
  }
  const auto shapes = [&] {
    return "q has shape " + shape_text(qv) + ", k " + shape_text(kv) + (with_v ? ", v " + shape_text(vv) : string());
  };
  for (const ArrayView* a : std::initializer_list<const ArrayView*>{&qv, &kv, &vv}) {
    if (a->ndim < 2) value_error(shapes() + "; expected at least 2 dimensions: (S, D), (H, S, D) or more");
    if ((a->ndim == 2) != (qv.ndim == 2)) {
      value_error(shapes() + "; either all are (S, D), or all have heads: (H, S, D) or more");
    }
  }
  has_heads_ = qv.ndim > 2;
  const int tail = has_heads_ ? 3 : 2;
  p.dtype = vv.dtype;
  lead_.clear();
  for (const ArrayView* a : std::initializer_list<const ArrayView*>{&qv, &kv, &vv}) {  // NumPy's rule
    for (int i = 0; i < a->ndim - tail; ++i) {
      const int from_right = a->ndim - tail - i;
      while (static_cast<int>(lead_.size()) < from_right) lead_.insert(lead_.begin(), 1);
      Py_ssize_t& n = lead_[lead_.size() - static_cast<size_t>(from_right)];
      if (n == 1) n = a->shape[i];
      else if (a->shape[i] != 1 && a->shape[i] != n) {
        value_error(shapes() + "; the dimensions before the heads must broadcast (layout " +
                    (swapped_ ? "BSHD)" : "BHSD)"));
      }
    }
  }
  set_lead();
  const auto dims = [&](const ArrayView& a, View& view, const char* name) {
    bind(view, a, tail, name);
    const int64_t size = itemsize(a.dtype);
    const int last = a.ndim - 1, heads = has_heads_ ? (swapped_ ? last - 1 : last - 2) : -1;
    const int rows = has_heads_ && swapped_ ? last - 2 : last - 1;
    view.d = a.strides[last] / size;
    view.s = a.strides[rows] / size;
    view.h = has_heads_ ? a.strides[heads] / size : 0;
    struct Dims {
      int64_t H, S, D;
    };
    return Dims{has_heads_ ? a.shape[heads] : 1, a.shape[rows], a.shape[last]};
  };
  const auto qd = dims(qv, p.q, "q"), kd = dims(kv, p.k, "k"), vd = dims(vv, p.v, "v");
  if (!with_v) p.v = View{};
  p.Hq = qd.H;
  p.Sq = qd.S;
  p.D = qd.D;
  p.Hkv = kd.H;
  p.Sk = kd.S;
  p.Dv = with_v ? vd.D : 0;
  if (kd.D != qd.D) {
    value_error("q has head_dim " + to_string(qd.D) + ", k has " + to_string(kd.D) + "; they must be equal (" +
                shapes() + ")");
  }
  if (vd.S != kd.S) {
    value_error("k has length " + to_string(kd.S) + ", v has " + to_string(vd.S) + "; they must be equal (" + shapes() +
                ", layout " + (swapped_ ? "BSHD)" : "BHSD)"));
  }
  if (vd.H != kd.H) {
    value_error("k has " + to_string(kd.H) + " heads, v has " + to_string(vd.H) + "; they must be equal (" + shapes() +
                ")");
  }
  if (p.Hkv == 0 ? p.Hq != 0 : p.Hq % p.Hkv != 0) {
    value_error("q has " + to_string(p.Hq) + " heads, k has " + to_string(p.Hkv) +
                "; the heads of q must be a multiple of the heads of k");
  }
  if (p.D == 0) value_error("q and k have head_dim 0; expected at least 1");
  p.scale = 1 / sqrt(static_cast<double>(p.D));
}

// --- results -------------------------------------------------------------------------------------------------

std::vector<Py_ssize_t> Call::result_shape(bool per_key) const {
  std::vector<Py_ssize_t> s;
  if (!problem.cu_q) s = lead_;
  if (has_heads_) s.push_back(result_heads(problem));
  s.push_back(per_key ? problem.Sk : result_rows(problem));
  return s;
}

void Call::make_out(py::handle out) {
  Problem& p = problem;
  std::vector<Py_ssize_t> shape;
  if (!p.cu_q) shape = lead_;
  if (has_heads_ && swapped_) shape.insert(shape.end(), {p.Sq, p.Hq, p.Dv});
  else if (has_heads_) shape.insert(shape.end(), {p.Hq, p.Sq, p.Dv});
  else shape.insert(shape.end(), {p.Sq, p.Dv});
  py::object own;  // out, or what describes it on a device
  if (out.is_none()) {
    char* ignored = nullptr;
    out_ = new_result(py::reinterpret_borrow<py::dtype>(dtype_), shape, &ignored);
    own = p.device < 0 ? out_ : out_.attr("_header");
  } else {
    own = py::reinterpret_borrow<py::object>(out);
    if (!is_plain_array(out) && lives_on_device(out)) {
      own = py::module_::import("qkv._arrays").attr("coerce")(p.function, "out", out, py::none());
    }
    if (is_plain_array(out) || is_device_array(own)) own = header("out", own);
    if (!is_plain_array(own)) {
      const string type = Py_TYPE(out.ptr())->tp_name;
      const bool masked = type.find("MaskedArray") != string::npos;
      type_error("out is " + (masked ? "a masked array" : type) + "; expected a plain NumPy array");
    }
    if (!py::reinterpret_borrow<py::object>(proxy(own)->descr).equal(dtype_)) {
      type_error("out is " + type_text(own) + "; expected q's dtype, " + py::str(dtype_).cast<string>());
    }
    const ArrayView o = view_of(own, p.dtype);
    if (o.ndim != static_cast<int>(shape.size()) || !std::equal(shape.begin(), shape.end(), o.shape)) {
      value_error("out has shape " + shape_text(o) + "; expected " + shape_text(shape));
    }
    if (!o.writeable) value_error("out is read-only; expected a writeable array");
    if (self_overlapping(o)) value_error("out overlaps itself (strides " + shape_text(o.strides, o.ndim) + " bytes)");
    out_ = py::reinterpret_borrow<py::object>(out);
    bool shared = !o.regular;
    for (const ArrayView& in : inputs_) shared = shared || overlap(o, in);
    if (shared && p.device >= 0) value_error("out shares memory with an input; expected its own in GPU memory");
    if (shared) {
      if (explaining()) explaining()->copies.push_back("out: shares memory with an input");
      temporary_ = new_array(py::reinterpret_borrow<py::dtype>(dtype_), shape);
    }
  }
  const ArrayView o = view_of(temporary_ ? temporary_ : own, p.dtype);
  const std::vector<Py_ssize_t> lead = lead_;
  if (p.cu_q) lead_.clear();
  bind(p.out, o, has_heads_ ? 3 : 2, "out");
  lead_ = lead;
  const int last = o.ndim - 1;
  const int64_t size = itemsize(p.dtype);
  p.out.d = o.strides[last] / size;
  p.out.s = o.strides[has_heads_ && swapped_ ? last - 2 : last - 1] / size;
  p.out.h = has_heads_ ? o.strides[swapped_ ? last - 1 : last - 2] / size : 0;
}

py::array Call::make_per_row(const py::dtype& dtype, Py_ssize_t extra) {
  std::vector<Py_ssize_t> shape = result_shape(false);
  if (extra >= 0) shape.push_back(extra);
  return new_array(dtype, shape);
}

py::object Call::new_result(const py::dtype& dtype, const std::vector<Py_ssize_t>& shape, char** data) {
  if (problem.device < 0) {
    py::array a = new_array(dtype, shape);
    *data = static_cast<char*>(a.mutable_data());
    return a;
  }
  py::object a = py::module_::import("qkv._device")
                     .attr("empty")(py::tuple(py::cast(shape)), dtype, problem.device,
                                    reinterpret_cast<uintptr_t>(problem.stream));
  *data = reinterpret_cast<char*>(a.attr("ptr").cast<uintptr_t>());
  return a;
}

py::object Call::make_lse() {
  char* data = nullptr;
  py::object a = new_result(accumulator_dtype(problem.dtype), result_shape(false), &data);
  problem.lse = data;
  return a;
}

py::object Call::make_weights() {
  std::vector<Py_ssize_t> shape = result_shape(false);
  shape.push_back(static_cast<Py_ssize_t>(problem.Sk));
  char* data = nullptr;
  py::object a = new_result(accumulator_dtype(problem.dtype), shape, &data);
  problem.weights = data;
  // What no walk reaches is masked; the device's backend clears its own.
  if (problem.device < 0) memset(data, 0, py::cast<size_t>(a.attr("nbytes")));
  return a;
}

py::array Call::make_per_key() { return new_array(accumulator_dtype(problem.dtype), result_shape(true)); }

py::object Call::out() {
  if (temporary_ && !explaining()) out_[py::ellipsis()] = temporary_;
  return out_;
}

// --- running -------------------------------------------------------------------------------------------------

namespace {

struct Signals {  // Ctrl-C, looked for every 50 ms by the thread that called
  std::chrono::steady_clock::time_point next = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  bool raised = false;
};

void look_for_signals(Control& control) {
  auto& signals = *static_cast<Signals*>(control.user);
  const auto now = std::chrono::steady_clock::now();
  if (now < signals.next) return;
  signals.next = now + std::chrono::milliseconds(50);
  const py::gil_scoped_acquire gil;
  if (!signals.raised && PyErr_CheckSignals() != 0) {
    signals.raised = true;
    __atomic_store_n(&control.stop, 1, __ATOMIC_RELAXED);
  }
}

// Work this small is over before another thread could take the GIL.
bool tiny(const Problem& p) {
  const double pairs =
      static_cast<double>(p.B) * static_cast<double>(p.Hq) * static_cast<double>(p.Sq) * static_cast<double>(p.Sk + 1);
  return pairs < 4096 && p.D + p.Dv <= 512;
}

}  // namespace

void Call::run(py::handle backend) {
  string requested = "auto";
  if (!backend.is_none()) {
    const char* text = PyUnicode_Check(backend.ptr()) ? PyUnicode_AsUTF8(backend.ptr()) : nullptr;
    if (!text) {
      PyErr_Clear();  // a str that is no text
      const string found = "backend is " + type_text(backend) + "; expected 'auto', 'cuda', 'cpu' or 'reference'";
      if (PyUnicode_Check(backend.ptr())) value_error(found);
      type_error(found);
    }
    requested = text;
  }
  if (Explanation* e = explaining()) {
    validate(problem);
    const Backend& chosen = select_backend(problem, requested, &e->refusals);
    e->backend = chosen.name;
    e->kernel = chosen.describe(problem);
    return;
  }
  draw_seed(requested);
  if (tiny(problem) && requested != "reference") {
    qkv::run(problem, requested);
    return;
  }
  Signals signals;
  Control control;
  control.poll = look_for_signals;
  control.user = &signals;
  problem.control = &control;
  try {
    const py::gil_scoped_release release;
    qkv::run(problem, requested);
  } catch (const Interrupted&) {
    problem.control = nullptr;
    throw py::error_already_set();
  }
  problem.control = nullptr;
}

}  // namespace qkv::python
