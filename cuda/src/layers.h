// SPDX-License-Identifier: Apache-2.0
// A layer's steps on arrays in GPU memory: queued on their stream, nothing waits.
#pragma once

#include <string>

#include "layer_plan.h"

namespace qkv::cuda {

void queue(const Linear& p);
void queue(const Norm& p);
void queue(const Elementwise& p);

std::string kernel_text(const Linear& p);  // kernel, tile, blocks

}  // namespace qkv::cuda
