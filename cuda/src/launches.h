// SPDX-License-Identifier: Apache-2.0
// From a problem to its kernels, in the order in which they run.
#pragma once

#include "device_problem.h"

namespace qkv::cuda {

struct Memory {  // of a device
  Pool pool;
  SmallCopies copies;
  Staging staging;
};

// On the current device, behind what the stream does already.
void launch(const Problem& p, const DeviceFacts& facts, Memory& memory, Stream* stream);

}  // namespace qkv::cuda
