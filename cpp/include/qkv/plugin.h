// SPDX-License-Identifier: Apache-2.0
// The border to the CUDA plugin, a shared object of its own: a C table that begins with a hash of the version and
// of the struct sizes. Core and plugin come from one build; anything else is refused with a reason.
#pragma once

#include <stddef.h>

#include <initializer_list>

#include "qkv/problem.h"

namespace qkv {

constexpr uint64_t kPluginVersion = 1;
constexpr const char* kPluginSymbol = "qkv_cuda_plugin";

struct PluginTable {
  uint64_t hash;
  // Each returns false and fills text (at most size bytes, terminated) when it cannot.
  bool (*available)(char* text, size_t size);
  bool (*supports)(const Problem& problem, char* text, size_t size);
  bool (*run)(const Problem& problem, char* text, size_t size);
};

using PluginEntry = const PluginTable* (*)();

constexpr uint64_t plugin_hash() {
  uint64_t h = 1469598103934665603ull;  // FNV-1a
  for (const uint64_t x : {kPluginVersion, uint64_t{sizeof(Problem)}, uint64_t{sizeof(View)},
                           uint64_t{sizeof(MaskNode)}, uint64_t{sizeof(StatsOut)}, uint64_t{sizeof(PluginTable)}}) {
    h = (h ^ x) * 1099511628211ull;
  }
  return h;
}

}  // namespace qkv
