// SPDX-License-Identifier: Apache-2.0
#define QKV_LEVEL v3
#include "cpu/entry-inl.h"

namespace qkv {
extern const KernelTable v3_table;
const KernelTable v3_table = v3::make_table("v3", false);
}  // namespace qkv
