// SPDX-License-Identifier: Apache-2.0
#define QKV_LEVEL amx
#include "cpu/entry-inl.h"

namespace qkv {
extern const KernelTable amx_table;
const KernelTable amx_table = amx::make_table("amx", true);
}  // namespace qkv
