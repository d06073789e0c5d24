// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace qkv::cuda {

constexpr int kMostDevices = 64;

// Why this machine has no usable GPU; empty when it has *n, at most kMostDevices. Makes no context.
std::string find_devices(int* n);

}  // namespace qkv::cuda
