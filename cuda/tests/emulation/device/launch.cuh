// SPDX-License-Identifier: Apache-2.0
// A launch on the host: blocks one after the other, shared memory full of NaN at the start and guarded at its end.
#pragma once

#include <string.h>

#include "device/intrinsics.cuh"

namespace qkv::inline QKV_LEVEL {

template <class Body>
int launch(const typename Body::Args& args, int64_t blocks, void*) {
  constexpr int64_t kMost = 227 * 1024, kGuard = 4096;  // what a block of a Hopper GPU may have
  if (Body::kShared > kMost || blocks < 1 || blocks > INT32_MAX) return 1;
  alignas(1024) static char shared[kMost + kGuard];
  struct Context {
    const typename Body::Args* args;
    int64_t block;
  } context{&args, 0};
  for (int64_t i = 0; i < blocks; ++i) {
    context.block = i % 2 ? i : (blocks - 1) / 2 * 2 - i;  // in no particular order
    memset(shared, 0xff, sizeof(shared));
    emulation::watch_shared(shared, static_cast<size_t>(Body::kShared));
    emulation::run_block(
        Body::kThreads,
        [](void* x) {
          const auto* c = static_cast<const Context*>(x);
          Body::run(*c->args, c->block, shared);
        },
        &context);
    end_copies();
    for (int64_t at = Body::kShared; at < kMost + kGuard; ++at) {
      if (shared[at] != '\xff') emulation::fail("a write beyond the block's shared memory");
    }
  }
  return 0;
}

}  // namespace qkv::inline QKV_LEVEL
