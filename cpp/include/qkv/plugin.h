// SPDX-License-Identifier: Apache-2.0
// The border to the CUDA plugin, a shared object of its own: a C table that begins with a hash of the version and
// of the struct sizes. Core and plugin come from one build; anything else is refused with a reason.
#pragma once

#include <stddef.h>

#include <initializer_list>

#include "qkv/alignment.h"
#include "qkv/layers.h"

namespace qkv {

constexpr uint64_t kPluginVersion = 5;
constexpr const char* kPluginSymbol = "qkv_cuda_plugin";

enum class PluginStatus : int32_t { ok = 0, refused = 1, out_of_memory = 2 };

struct PluginText {  // what a call that does not succeed says
  char* data;
  size_t size;
};

struct DeviceMemory {  // of a device's pool, in bytes
  int64_t in_use = 0, cached = 0, peak = 0;
  int64_t allocations = 0;  // from the driver, since the start
};

struct PluginTable {
  uint64_t hash;
  bool (*available)(PluginText);  // asked before every call: a process may fork, a context may be lost
  bool (*supports)(const Problem&, PluginText);
  PluginStatus (*run)(const Problem&, PluginText);
  PluginStatus (*align)(const Alignment&, PluginText);
  void (*describe)(const Problem&, PluginText);  // kernel, tile, parts
  void (*build)(PluginText);                     // architectures and compiler

  // A layer's steps on arrays in GPU memory: queued on their stream.
  PluginStatus (*linear)(const Linear&, PluginText);
  PluginStatus (*norm)(const Norm&, PluginText);
  PluginStatus (*elementwise)(const Elementwise&, PluginText);
  void (*describe_linear)(const Linear&, PluginText);  // kernel, tile, blocks

  // Memory of DeviceArray. Copies wait for the work of the stream before them and return when they are done.
  PluginStatus (*allocate)(int device, int64_t bytes, void* stream, void** data, PluginText);
  void (*release)(int device, void* data, void* stream);
  PluginStatus (*copy)(int device, void* to, const void* from, int64_t bytes, void* stream, PluginText);
  PluginStatus (*synchronize)(int device, void* stream, PluginText);
  PluginStatus (*order)(int device, void* before, void* after, PluginText);  // work of stream after waits for before
  PluginStatus (*device_of)(const void* data, int* device, PluginText);      // of which it is memory, below 0: of none
  PluginStatus (*memory)(int device, DeviceMemory*, PluginText);
  PluginStatus (*trim)(int device, PluginText);  // gives cached memory back to the driver
};

using PluginEntry = const PluginTable* (*)();

constexpr uint64_t plugin_hash() {
  uint64_t h = 1469598103934665603ull;  // FNV-1a
  for (const uint64_t x :
       {kPluginVersion, uint64_t{sizeof(Problem)}, uint64_t{sizeof(View)}, uint64_t{sizeof(MaskNode)},
        uint64_t{sizeof(StatsOut)}, uint64_t{sizeof(Alignment)}, uint64_t{sizeof(Linear)}, uint64_t{sizeof(Norm)},
        uint64_t{sizeof(Elementwise)}, uint64_t{sizeof(PluginTable)}, uint64_t{sizeof(DeviceMemory)}}) {
    h = (h ^ x) * 1099511628211ull;
  }
  return h;
}

}  // namespace qkv
