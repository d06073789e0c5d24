// SPDX-License-Identifier: Apache-2.0
#define QKV_LEVEL neon
#include "cpu/entry-inl.h"

namespace qkv {
extern const KernelTable neon_table;
const KernelTable neon_table = neon::make_table("neon", false);
}  // namespace qkv
