// SPDX-License-Identifier: Apache-2.0
// Alignments of host arrays on the GPU.
#pragma once

#include "qkv/alignment.h"
#include "staging.h"

namespace qkv::cuda {

void align(const Alignment& x, Pool& pool, Staging& staging);

}  // namespace qkv::cuda
