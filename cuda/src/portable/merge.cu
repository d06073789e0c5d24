// SPDX-License-Identifier: Apache-2.0
// The launches of merge.cuh, for the tables of all dtypes and head_dims.
#include "device/launch.cuh"
#include "portable/merge.cuh"

namespace qkv::inline QKV_LEVEL {

template <class A>
int merge(const KernelArgs& args, int general, void* stream) {
  const int64_t rows = args.problem.B * args.plan.groups * args.plan.rows, each = Merge<A, true>::kRows;
  const int64_t blocks = (rows + each - 1) / each;
  return general ? launch<Merge<A, true>>(args, blocks, stream) : launch<Merge<A, false>>(args, blocks, stream);
}

template int merge<float>(const KernelArgs&, int, void*);
template int merge<double>(const KernelArgs&, int, void*);

}  // namespace qkv::inline QKV_LEVEL
