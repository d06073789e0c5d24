// SPDX-License-Identifier: Apache-2.0
// The map of one call: validate, select a backend, run.
#include <math.h>

#include <vector>

#include "qkv/qkv.h"
#include "qkv/softmax.h"

namespace qkv {

void run(const Problem& problem, const std::string& backend) {
  validate(problem);
  const Backend& chosen = select_backend(problem, backend, nullptr);
  chosen.run(problem);
  if (stopped(problem)) throw Interrupted();
}

void merge(const MergeProblem& m) {
  std::vector<double> o(static_cast<size_t>(m.Dv));
  for (int64_t row = 0; row < m.rows; ++row) {
    SoftmaxState total;
    for (double& x : o) x = 0;
    for (int64_t part = 0; part < m.n; ++part) {
      const double lse = load_as_double(m.lses[part], m.lse_dtype, row);
      if (lse == -HUGE_VAL && !mutant(24)) continue;  // saw nothing: its out does not count, whatever it holds
      const Rescale r = total.merge({lse, 1});
      for (int64_t d = 0; d < m.Dv; ++d) {
        o[d] = o[d] * r.self + load_as_double(m.outs[part], m.dtype, row * m.Dv + d) * r.other;
      }
    }
    for (int64_t d = 0; d < m.Dv; ++d) {
      store_from_double(m.out, m.dtype, row * m.Dv + d, total.l == 0 ? 0 : o[d] / total.l);
    }
    store_from_double(m.lse, m.lse_dtype, row, total.lse());
  }
}

}  // namespace qkv
