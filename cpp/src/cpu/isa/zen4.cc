// SPDX-License-Identifier: Apache-2.0
#define QKV_LEVEL zen4
#include "cpu/entry-inl.h"

namespace qkv {
extern const KernelTable zen4_table;
const KernelTable zen4_table = zen4::make_table("zen4");
}  // namespace qkv
