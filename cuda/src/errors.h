// SPDX-License-Identifier: Apache-2.0
// How the plugin's host side fails: by these exceptions inside, by a status and a text at the C table.
#pragma once

#include <string>

namespace qkv::cuda {

struct Refusal {  // an ordinary reason
  std::string text;
};
struct OutOfMemory {
  std::string text;
};

// Throws for anything but 0; remembers when the context is lost.
void check(int error, const char* what);

std::string bytes_text(int64_t bytes);  // "1.5 GiB"

}  // namespace qkv::cuda
