// SPDX-License-Identifier: Apache-2.0
// What the host side needs of CUDA, and nothing else: runtime.cu calls cudart, cuda/tests/emulation the host's memory.
// Functions return a cudaError_t as an int, 0 for success.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "tensor_map.h"

namespace qkv::cuda {

struct DeviceFacts {
  char name[256] = "";
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t shared_per_block = 0, l2 = 0;
};

struct Stream;  // cudaStream_t
struct Event;   // cudaEvent_t

int driver_version(int* version);  // 0: no driver
int runtime_version();
int device_count(int* n);
int device_facts(int device, DeviceFacts* facts);
int current_device(int* device);
int use_device(int device);
int device_of_memory(const void* data, int* device);  // below 0: none reaches it

int allocate(void** data, size_t bytes);
int release(void* data);
int allocate_pinned(void** data, size_t bytes);
int free_memory(size_t* bytes);

int make_stream(Stream** stream);
int make_event(Event** event);
int record(Event* event, Stream* stream);
int wait(Event* event);                            // the host
int wait_on_device(Stream* stream, Event* event);  // later work of the stream
bool capturing(Stream* stream);                    // its work goes into a graph
int synchronize(Stream* stream);
int synchronize_device();
int copy(void* to, const void* from, size_t bytes, Stream* stream);  // asynchronous where the host side is pinned
int copy_at_once(void* to, const void* from, size_t bytes, Stream* stream);  // reads pageable memory before it returns
int clear(void* data, size_t bytes, Stream* stream);

// For 64 columns a row, swizzled as device/hopper.cuh has it. False: the driver has no such maps or does not take this.
bool make_tensor_map(const TensorShape& shape, TensorMap* map);

const char* error_text(int error);
bool is_out_of_memory(int error);
bool is_no_device(int error);
bool loses_context(int error);  // nothing works in this process any more
bool lacks_code(int error);     // the binary holds nothing that this GPU runs

// Compiler and architectures of this plugin.
const char* build_text();

}  // namespace qkv::cuda
