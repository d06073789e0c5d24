// SPDX-License-Identifier: Apache-2.0
#define QKV_LEVEL v2
#include "cpu/entry-inl.h"

namespace qkv {
extern const KernelTable v2_table;
const KernelTable v2_table = v2::make_table("v2", false);
}  // namespace qkv
