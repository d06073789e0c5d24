// SPDX-License-Identifier: Apache-2.0
#define QKV_LEVEL v4
#include "cpu/entry-inl.h"

namespace qkv {
extern const KernelTable v4_table, zen4_table;
const KernelTable v4_table = v4::make_table("v4", false);
const KernelTable zen4_table = v4::make_table("zen4", true);
}  // namespace qkv
