// SPDX-License-Identifier: Apache-2.0
// The launches of halves.cuh.
#include "device/launch.cuh"
#include "portable/halves.cuh"

namespace qkv {

int halve(const HalveArgs& args, void* stream) {
  const Problem& p = args.problem;
  int64_t runs = 0;
  for (int tensor = 0; tensor < 3; ++tensor) runs += QKV_LEVEL::HalvedRows::runs(p, tensor);
  const int64_t each = QKV_LEVEL::HalvedRows::kThreads / 32, blocks = (runs + each - 1) / each;
  const int error = QKV_LEVEL::launch<QKV_LEVEL::MeasureRows>(args, blocks, stream);
  return error ? error : QKV_LEVEL::launch<QKV_LEVEL::HalveRows>(args, blocks, stream);
}

}  // namespace qkv
