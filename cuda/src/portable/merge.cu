// SPDX-License-Identifier: Apache-2.0
// The launches of merge.cuh, for the tables of all dtypes and head_dims.
#include "portable/merge.cuh"
#include "portable/table.cuh"

namespace qkv::inline QKV_LEVEL {
namespace {

template <class A>
int merge(const KernelArgs& args, int general, void* stream) {
  const int64_t blocks = Merge<A, true>::blocks(args);
  return general ? launch<Merge<A, true>>(args, blocks, stream) : launch<Merge<A, false>>(args, blocks, stream);
}

}  // namespace

int merge_float(const KernelArgs& args, int general, void* stream) { return merge<float>(args, general, stream); }
int merge_double(const KernelArgs& args, int general, void* stream) { return merge<double>(args, general, stream); }

}  // namespace qkv::inline QKV_LEVEL
