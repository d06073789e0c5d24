// SPDX-License-Identifier: Apache-2.0
#include "qkv/platform.h"

#ifdef QKV_MUTANTS
#include <stdlib.h>

namespace qkv {
int active_mutant = getenv("QKV_MUTANT") ? atoi(getenv("QKV_MUTANT")) : 0;
}  // namespace qkv
#endif
