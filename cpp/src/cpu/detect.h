// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>

namespace qkv {

// Do this processor and operating system run code compiled for the level (v2, v3, v4: x86-64-v2 ...; zen4: v4 and
// the bfloat16 dot; amx: zen4 and tile registers; neon)?
bool cpu_runs(const char* level);

}  // namespace qkv
