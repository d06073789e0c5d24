// SPDX-License-Identifier: Apache-2.0
// From Python arguments to a Problem. A Call owns what the problem points to.
#pragma once

#include "device_array.h"
#include "gil.h"
#include "numpy_view.h"
#include "qkv/qkv.h"

namespace qkv::python {

// The mask program of a mask object, compiled once and kept on the object.
struct CompiledMask {
  std::vector<MaskNode> nodes;
  std::vector<std::vector<int64_t>> data;
  std::vector<Shape> shape;  // of the lengths of a Lengths node
  explicit CompiledMask(const py::list& program);
};

// Options in the order in which _api.py passes them as one tuple.
enum Option {
  kMask,
  kBias,
  kCausal,
  kWindow,
  kQOffset,
  kScale,
  kSoftcap,
  kAlibi,
  kSinks,
  kGate,
  kQLens,
  kKvLens,
  kNormalizer,
  kDropoutP,
  kRng,
  kOptions
};
constexpr const char* kOptionNames[] = {"mask",   "bias",    "causal",       "window",    "q_offset",
                                        "scale",  "softcap", "alibi_slopes", "sinks",     "head_gate",
                                        "q_lens", "kv_lens", "normalizer",   "dropout_p", "rng"};
static_assert(std::size(kOptionNames) == kOptions);

struct Explanation {  // what explain() collects instead of running
  std::string kernel, backend;
  std::vector<std::string> refusals, copies;
};
Explanation*& explaining();  // of this thread

class Call {
 public:
  explicit Call(const char* function) { problem.function = function; }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void arrays(py::handle q, py::handle k, py::handle v, py::handle layout, py::handle dtype);
  void packed(py::handle cu_q, py::handle cu_k);    // after arrays: attention_varlen
  void additive();                                  // before arrays with v: q and k are projected, float32 or float64
  void weight(py::handle weight);                   // after arrays: of additive scores
  void focus(py::handle centre, py::handle reach);  // after arrays: local_p
  void options(py::handle tuple);
  void options(const py::handle* option);          // kOptions of them
  void select(py::handle rows, py::handle heads);  // attention_weights, attention_stats
  void given_lse(py::handle lse);
  void dropout_option(py::handle dropout_p, py::handle rng);
  void draw_seed(const std::string& backend);  // from the generator, if rng is one

  void make_out(py::handle out);
  py::object make_lse();
  py::object make_weights();
  // A statistic, of bytes that are all `fill`: (lead, heads, rows[, extra]), or (lead, heads, Sk).
  py::object make_statistic(const py::dtype& dtype, const Shape& shape, int fill, void** data);
  Shape per_row(Py_ssize_t extra = -1) const;
  Shape per_key() const { return result_shape(true); }

  bool flag(const char* name, py::handle x) const;  // True or False
  void run(py::handle backend);                     // validates and runs; with explain() only explains
  py::object out();                                 // after run

  Problem problem;

 private:
  bool has_heads_ = true, swapped_ = false, projected_ = false;
  Shape lead_;                              // broadcast leading dimensions, as the user sees them
  py::object dtype_;                        // of q: a numpy.dtype
  std::vector<py::object> kept_;            // what no argument keeps alive
  std::vector<std::vector<int64_t>> ints_;  // their elements stay where they are when this grows
  std::vector<std::vector<double>> doubles_;
  std::vector<MaskNode> nodes_;
  ArrayView inputs_[8];  // q, k, v, mask, bias, head_gate, additive weights
  DeviceDims dims_[8];   // of those that no ndarray describes
  int n_inputs_ = 0;
  py::object out_, temporary_, generator_;
  std::vector<void*> others_;  // streams of arrays that are not the problem's

  const char* first_ = nullptr;  // the first array of q, k, v, mask, bias and out: where it lives, all live

  [[noreturn]] void value_error(const std::string& text) const;
  [[noreturn]] void type_error(const std::string& text) const;
  void place(const char* name, int device);
  void place_on(const char* name, int device, void* stream);
  const ArrayView* on_device(const char* name, py::handle x, bool boolean);
  bool out_on_device(py::handle out, const Shape& shape);
  void order_others() const;
  py::object header(const char* name, py::object array);
  py::object new_result(const py::dtype& dtype, const Shape& shape, char** data);
  ArrayView operand(const char* name, py::handle x, py::handle dtype);
  ArrayView read_as_is(const char* name, py::object array, DType dtype);
  int row_axis(const ArrayView& a) const { return a.ndim - (has_heads_ && swapped_ ? 3 : 2); }
  int head_axis(const ArrayView& a) const { return a.ndim - (swapped_ ? 2 : 3); }
  void bind(View& view, const ArrayView& a, const char* name);
  void bind_lead(View& view, const ArrayView& a, int tail, const char* name);
  void bind_scores(View& view, const ArrayView& a, int64_t columns, const char* name);
  Shape result_shape(bool per_key) const;
  py::object as_array(const char* name, py::handle x);
  const int64_t* integers(const char* name, py::handle x, Py_ssize_t& n);
  const int64_t* per_batch(const char* name, py::handle x);
  const int64_t* broadcast_ints(const char* name, const ArrayView& v);
  const double* per_head(const char* name, py::handle x);
  double number(const char* name, py::handle x);
  void mask_option(py::handle mask, py::handle causal, py::handle window);
  void mask_array(py::handle mask);
  void bias_option(py::handle bias);
  void gate_option(py::handle gate);
  void normalizer_option(py::handle normalizer);
  int64_t window_side(py::handle x);
  void set_lead();
};

}  // namespace qkv::python
