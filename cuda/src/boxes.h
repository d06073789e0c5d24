// SPDX-License-Identifier: Apache-2.0
// How Hopper's copy engine sees the arrays of a problem.
#pragma once

#include "kernels.h"

namespace qkv::cuda {

// From a problem and its plan, arrays and strides those of the device.
HopperArgs hopper_args(const KernelArgs& args, const Choice& choice);

}  // namespace qkv::cuda
