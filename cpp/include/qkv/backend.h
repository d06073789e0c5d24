// SPDX-License-Identifier: Apache-2.0
// Backends are named objects in a list, best first, that say why they cannot run something.
#pragma once

#include <string>
#include <vector>

#include "qkv/problem.h"

namespace qkv {

struct Backend {
  const char* name;
  bool (*available)(std::string& reason);                 // fills reason when it is not
  bool (*supports)(const Problem&, std::string& reason);  // the same for one problem
  void (*run)(const Problem&);                            // the problem is valid; noexcept in effect
  std::string (*describe)(const Problem&);                // kernel, level, tile, threads: for explain()
};

const std::vector<const Backend*>& backends();  // in priority order: cuda, cpu, reference

// The backend for this problem. "auto" takes the first that is available and supports it; a named one must.
// An unknown name is a ValueError that lists the known ones.
// refusals, when given, receives "name: reason" for each backend passed over.
const Backend& select_backend(const Problem&, const std::string& requested, std::vector<std::string>* refusals);

// Where libqkv_cuda.so would lie: set by the Python package, before anything asks for it.
void set_plugin_folder(const std::string& folder);

// --- memory of a CUDA device, for DeviceArray; BackendError without one, MemoryError when it is full -----------------
bool device_ready();       // is there one, as `available` of the backend says
std::string cuda_build();  // what the plugin was built for and with; empty without a plugin
void* device_allocate(int device, int64_t bytes, void* stream);
void device_release(int device, void* data, void* stream);
void device_copy(int device, void* to, const void* from, int64_t bytes, void* stream);  // either side may be the host
void device_synchronize(int device, void* stream);
void device_order(int device, void* before, void* after);  // the work of stream after waits for that of before
int device_of(const void* data);                           // below 0: of none
struct DeviceMemory device_memory(int device);             // plugin.h
void device_trim(int device);

}  // namespace qkv
