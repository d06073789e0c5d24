// SPDX-License-Identifier: Apache-2.0
#include "call.h"

#include <math.h>
#include <pybind11/stl.h>
#include <string.h>
#include <time.h>

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

// Notes where an array lives.
void Call::place(const char* name, int device) {
  if (!first_) {
    first_ = name;
    problem.device = device;
  } else if (device != problem.device) {
    const auto text = [](int d) { return d < 0 ? string("host memory") : "GPU memory (device " + to_string(d) + ")"; };
    type_error(string(first_) + " is in " + text(problem.device) + ", " + name + " in " + text(device) +
               "; q, k, v, mask, bias and out must live in one place");
  }
}

// The same for an array on a device, which is ready on this stream.
void Call::place_on(const char* name, int device, void* stream) {
  const bool first = !first_;
  place(name, device);
  if (first) problem.stream = stream;
  if (stream == problem.stream) return;
  device_order(device, stream, problem.stream);
  others_.push_back(stream);
}

// An array in GPU memory that needs nothing of Python; nullptr for any other.
const ArrayView* Call::on_device(const char* name, py::handle x, bool boolean) {
  if (is_plain_array(x)) return nullptr;
  DeviceView found;
  if (!read_device_array(x, dims_[n_inputs_], found) || !found.array.regular) return nullptr;
  if ((found.array.dtype == DType::boolean) != boolean) return nullptr;
  place_on(name, found.device, found.stream);
  if (!dtype_) dtype_ = py::reinterpret_borrow<py::object>(found.dtype);
  return &(inputs_[n_inputs_++] = found.array);
}

// For an array on a device, what describes it: an ndarray whose data is never read here.
py::object Call::header(const char* name, py::object array) {
  if (!is_device_array(array)) {
    place(name, -1);
    return array;
  }
  place_on(name, array.attr("device").cast<int>(), stream_of(array));
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
  return inputs_[n_inputs_++] = v;
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
  const bool plain = dtype.is_none() && is_plain_array(x) && known_dtype(x, t) && t != DType::boolean;
  if (plain) {
    place(name, -1);
    if (!dtype_) dtype_ = py::reinterpret_borrow<py::object>(proxy(x)->descr);          // q comes first
    if (const ArrayView v = view_of(x, t); v.regular) return inputs_[n_inputs_++] = v;  // the caller keeps it alive
    return read_as_is(name, py::reinterpret_borrow<py::object>(x), t);
  }
  if (dtype.is_none()) {
    if (const ArrayView* const v = on_device(name, x, false)) return *v;
  }
  py::object array = py::module_::import("qkv._arrays").attr("coerce")(problem.function, name, x, dtype);
  array = header(name, std::move(array));
  if (!known_dtype(array, t)) t = DType::bf16;  // uint16 holding bfloat16
  if (!dtype_) dtype_ = py::reinterpret_borrow<py::object>(proxy(array)->descr);
  return read_as_is(name, std::move(array), t);
}

// q, k, v or out.
void Call::bind(View& view, const ArrayView& a, const char* name) {
  view.d = elements(a.strides[a.ndim - 1], a.dtype);
  view.s = elements(a.strides[row_axis(a)], a.dtype);
  view.h = has_heads_ ? elements(a.strides[head_axis(a)], a.dtype) : 0;
  bind_lead(view, a, has_heads_ ? 3 : 2, name);
}

// The dimensions before the last `tail`, which broadcast to lead_; packed sequences have none.
void Call::bind_lead(View& view, const ArrayView& a, int tail, const char* name) {
  view.data = a.data;
  view.dtype = a.dtype;
  if (problem.cu_q) return;
  const int have = a.ndim - tail, want = lead_.size();
  int slot = 0;
  for (int i = 0; i < want; ++i) {
    const int at = i - (want - have);
    const Py_ssize_t n = at < 0 ? 1 : a.shape[at];
    if (n != 1 && n != lead_[i]) {
      value_error(string(name) + " has shape " + shape_text(a) +
                  ", which does not broadcast to the leading dimensions " + shape_text(lead_));
    }
    if (lead_[i] != 1 && slot < kMaxLead) view.lead[slot++] = n == 1 ? 0 : elements(a.strides[at], a.dtype);
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
  swapped_ = is_text(layout, "BSHD");
  if (!layout.is_none() && !swapped_ && !is_text(layout, "BHSD")) {
    const string found = "layout is " + py::repr(layout).cast<string>() + "; expected 'BHSD' or 'BSHD'";
    if (PyUnicode_Check(layout.ptr())) value_error(found);
    type_error(found);
  }
  if (!dtype.is_none() && !is_text(dtype, "bfloat16")) {
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
      while (lead_.size() < from_right) lead_.prepend(1);
      Py_ssize_t& n = lead_[lead_.size() - from_right];
      if (n == 1) n = a->shape[i];
      else if (a->shape[i] != 1 && a->shape[i] != n) {
        value_error(shapes() + "; the dimensions before the heads must broadcast (layout " +
                    (swapped_ ? "BSHD)" : "BHSD)"));
      }
    }
  }
  set_lead();
  const auto dims = [&](const ArrayView& a, View& view, const char* name) {
    bind(view, a, name);
    struct Dims {
      int64_t H, S, D;
    };
    return Dims{has_heads_ ? a.shape[head_axis(a)] : 1, a.shape[row_axis(a)], a.shape[a.ndim - 1]};
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

// --- running -------------------------------------------------------------------------------------------------

namespace {

// Of a clock that is some milliseconds coarse, and read in a quarter of the time of others: small tasks ask often.
int64_t milliseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return int64_t{1000} * now.tv_sec + now.tv_nsec / 1000000;
}

constexpr int64_t kLookEvery = 50;  // ms

struct Signals {  // Ctrl-C, looked for by the thread that called
  int64_t next = milliseconds() + kLookEvery;
  bool raised = false;
  WithoutGil* gil = nullptr;
};

void look_for_signals(Control& control) {
  auto& signals = *static_cast<Signals*>(control.user);
  const int64_t now = milliseconds();
  if (now < signals.next) return;
  signals.next = now + kLookEvery;
  signals.gil->take();
  if (!signals.raised && PyErr_CheckSignals() != 0) {
    signals.raised = true;
    __atomic_store_n(&control.stop, 1, __ATOMIC_RELAXED);
  }
  signals.gil->give();
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
    Py_ssize_t size = 0;
    const char* text = PyUnicode_Check(backend.ptr()) ? PyUnicode_AsUTF8AndSize(backend.ptr(), &size) : nullptr;
    if (!text || strlen(text) != static_cast<size_t>(size)) {
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
    order_others();
    return;
  }
  Signals signals;
  Control control;
  control.poll = look_for_signals;
  control.user = &signals;
  problem.control = &control;
  try {
    WithoutGil released;
    signals.gil = &released;
    qkv::run(problem, requested);
  } catch (const Interrupted&) {
    problem.control = nullptr;
    throw py::error_already_set();
  }
  problem.control = nullptr;
  order_others();
}

// What comes next on the streams of the other arrays must find them written, or read, by this call.
void Call::order_others() const {
  for (void* const other : others_) device_order(problem.device, problem.stream, other);
}

}  // namespace qkv::python
