// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <stdio.h>

namespace qkv::cuda {

std::string bytes_text(int64_t bytes) {
  const char* units[] = {"bytes", "KiB", "MiB", "GiB"};
  int unit = 0;
  double n = static_cast<double>(bytes);
  for (; n >= 1024 && unit < 3; ++unit) n /= 1024;
  char text[32];
  snprintf(text, sizeof(text), unit ? "%.1f %s" : "%.0f %s", n, units[unit]);
  return text;
}

}  // namespace qkv::cuda
