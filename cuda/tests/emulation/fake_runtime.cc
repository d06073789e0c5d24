// SPDX-License-Identifier: Apache-2.0
// cuda/src/runtime.h without a GPU: device memory is host memory, streams are done at once, and whatever a machine can
// lack or lose is set from outside with qkv_fake_set.
#include <stdlib.h>
#include <string.h>

#include <iterator>
#include <map>
#include <string>

#include "runtime.h"

namespace {

struct Fake {
  long driver = 13000, devices = 1, major = 9, multiprocessors = 4;
  long fail_allocation = -1;           // the n-th from now fails, and the next too: the pool tries twice
  long fail_facts = 0, fail_copy = 0;  // a cudaError_t
  long memory = 1 << 30;               // bytes in all
  long in_use = 0, allocations = 0, synchronizes = 0, device_synchronizes = 0, orders = 0;
  long capturing = 0;
  long boxes = 1;  // 0: the driver makes no tensor maps
  long calls = 0;  // of those that a call may make: the driver has its price for each
  std::map<void*, size_t> blocks;
} fake;

std::map<std::string, long*>& settings() {
  static std::map<std::string, long*> all{{"driver", &fake.driver},
                                          {"devices", &fake.devices},
                                          {"major", &fake.major},
                                          {"multiprocessors", &fake.multiprocessors},
                                          {"fail_allocation", &fake.fail_allocation},
                                          {"fail_copy", &fake.fail_copy},
                                          {"fail_facts", &fake.fail_facts},
                                          {"memory", &fake.memory},
                                          {"in_use", &fake.in_use},
                                          {"allocations", &fake.allocations},
                                          {"synchronizes", &fake.synchronizes},
                                          {"device_synchronizes", &fake.device_synchronizes},
                                          {"orders", &fake.orders},
                                          {"boxes", &fake.boxes},
                                          {"capturing", &fake.capturing},
                                          {"calls", &fake.calls}};
  return all;
}

constexpr int kOutOfMemory = 2, kNoDevice = 100, kIllegalAddress = 700;

}  // namespace

extern "C" __attribute__((visibility("default"))) int qkv_fake_set(const char* name, long value) {
  const auto it = settings().find(name);
  if (it == settings().end()) return 1;
  *it->second = value;
  return 0;
}
extern "C" __attribute__((visibility("default"))) long qkv_fake_get(const char* name) {
  const auto it = settings().find(name);
  return it == settings().end() ? -1 : *it->second;
}

namespace qkv::cuda {

int driver_version(int* version) {
  *version = static_cast<int>(fake.driver);
  return 0;
}
int runtime_version() { return 13000; }
int device_count(int* n) {
  *n = static_cast<int>(fake.devices);
  return fake.devices ? 0 : kNoDevice;
}
int device_facts(int, DeviceFacts* facts) {
  if (fake.fail_facts) return static_cast<int>(fake.fail_facts);
  strcpy(facts->name, "emulated GPU");
  facts->major = static_cast<int>(fake.major);
  facts->multiprocessors = static_cast<int>(fake.multiprocessors);
  facts->shared_per_block = 227 * 1024;
  facts->l2 = 1 << 20;
  return 0;
}
int current_device(int* device) {
  ++fake.calls;
  *device = 0;
  return 0;
}
int use_device(int) {
  ++fake.calls;
  return 0;
}
int device_of_memory(const void* data, int* device) {
  ++fake.calls;
  const auto next = fake.blocks.upper_bound(const_cast<void*>(data));
  const auto it = next == fake.blocks.begin() ? fake.blocks.end() : std::prev(next);
  *device = it != fake.blocks.end() && data < static_cast<const char*>(it->first) + it->second ? 0 : -1;
  return 0;
}

int allocate(void** data, size_t bytes) {
  ++fake.calls;
  if (fake.fail_allocation >= 0 && fake.fail_allocation-- <= 1) {
    if (fake.fail_allocation < 0) fake.fail_allocation = -1;
    return kOutOfMemory;
  }
  if (fake.in_use + static_cast<long>(bytes) > fake.memory) return kOutOfMemory;
  *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*data) return kOutOfMemory;
  memset(*data, 0xff, bytes);  // NaN: what nobody wrote shows
  fake.blocks[*data] = bytes;
  fake.in_use += static_cast<long>(bytes);
  ++fake.allocations;
  return 0;
}
int release(void* data) {
  ++fake.calls;
  fake.in_use -= static_cast<long>(fake.blocks[data]);
  fake.blocks.erase(data);
  free(data);
  return 0;
}
int allocate_pinned(void** data, size_t bytes) {
  *data = malloc(bytes);
  return *data ? 0 : kOutOfMemory;
}
int free_memory(size_t* bytes) {
  ++fake.calls;
  *bytes = static_cast<size_t>(fake.memory - fake.in_use);
  return 0;
}

int make_stream(Stream** stream) {
  *stream = reinterpret_cast<Stream*>(malloc(1));
  return 0;
}
int make_event(Event** event) {
  *event = reinterpret_cast<Event*>(malloc(1));
  return 0;
}
int record(Event*, Stream*) {
  ++fake.calls;
  return 0;
}
int wait(Event*) {
  ++fake.calls;
  return 0;
}
int wait_on_device(Stream*, Event*) {
  ++fake.calls;
  ++fake.orders;
  return 0;
}
bool capturing(Stream*) {
  ++fake.calls;
  return fake.capturing != 0;
}
int synchronize(Stream*) {
  ++fake.calls;
  ++fake.synchronizes;
  return 0;
}
int synchronize_device() {
  ++fake.calls;
  ++fake.device_synchronizes;
  return 0;
}
int copy(void* to, const void* from, size_t bytes, Stream*) {
  ++fake.calls;
  if (fake.fail_copy) return static_cast<int>(fake.fail_copy);
  memcpy(to, from, bytes);
  return 0;
}
int copy_at_once(void* to, const void* from, size_t bytes, Stream* stream) { return copy(to, from, bytes, stream); }
int clear(void* data, size_t bytes, Stream*) {
  ++fake.calls;
  memset(data, 0, bytes);
  return 0;
}

bool make_tensor_map(const TensorShape& shape, TensorMap* map) {
  static_assert(sizeof(shape) <= sizeof(*map));
  memcpy(map, &shape, sizeof(shape));
  return fake.boxes != 0;
}

const char* error_text(int error) {
  switch (error) {
    case kOutOfMemory: return "out of memory";
    case kIllegalAddress: return "an illegal memory access was encountered";
    default: return "error of the emulation";
  }
}
bool is_out_of_memory(int error) { return error == kOutOfMemory; }
bool is_no_device(int error) { return error == kNoDevice; }
bool lacks_code(int error) { return error == 209; }
bool loses_context(int error) { return error == kIllegalAddress; }
const char* build_text() { return "the emulation"; }

}  // namespace qkv::cuda
