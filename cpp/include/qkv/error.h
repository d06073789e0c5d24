// SPDX-License-Identifier: Apache-2.0
// Errors, thrown once and before any kernel, in the user's words. bindings/module.cc maps them to Python's.
#pragma once

#include <stdexcept>
#include <string>

namespace qkv {

struct ValueError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct IndexError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct BackendError : std::runtime_error {  // no backend can run it: the text lists each one's reason
  using std::runtime_error::runtime_error;
};
struct MemoryError : std::runtime_error {  // a device's memory; the host's is std::bad_alloc
  using std::runtime_error::runtime_error;
};
struct Interrupted : std::runtime_error {  // Control::stop was set
  Interrupted() : std::runtime_error("interrupted") {}
};

}  // namespace qkv
