// SPDX-License-Identifier: Apache-2.0
// The only file that calls cudart.
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdio.h>

#include "runtime.h"

namespace qkv::cuda {
namespace {

cudaStream_t raw(Stream* s) { return reinterpret_cast<cudaStream_t>(s); }
cudaEvent_t raw(Event* e) { return reinterpret_cast<cudaEvent_t>(e); }

// Reported errors also stay behind as the "last error" of the thread: taken away, or the next launch reports them.
int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace

int driver_version(int* version) { return taken(cudaDriverGetVersion(version)); }
int runtime_version() { return CUDART_VERSION; }
int device_count(int* n) { return taken(cudaGetDeviceCount(n)); }

int device_facts(int device, DeviceFacts* facts) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return taken(error);
  snprintf(facts->name, sizeof(facts->name), "%s", properties.name);
  facts->major = properties.major;
  facts->minor = properties.minor;
  facts->multiprocessors = properties.multiProcessorCount;
  facts->shared_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  facts->l2 = properties.l2CacheSize;
  return 0;
}

int current_device(int* device) { return taken(cudaGetDevice(device)); }
int use_device(int device) { return taken(cudaSetDevice(device)); }

int device_of_memory(const void* data, int* device) {
  cudaPointerAttributes attributes;
  const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
  *device = error == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered ? attributes.device : -1;
  return taken(error);
}

int allocate(void** data, size_t bytes) { return taken(cudaMalloc(data, bytes)); }
int release(void* data) { return taken(cudaFree(data)); }
int allocate_pinned(void** data, size_t bytes) { return taken(cudaHostAlloc(data, bytes, cudaHostAllocPortable)); }
int free_memory(size_t* bytes) {
  size_t total = 0;
  return taken(cudaMemGetInfo(bytes, &total));
}

int make_stream(Stream** stream) {
  return taken(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking));
}
int make_event(Event** event) {
  return taken(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
}
int record(Event* event, Stream* stream) { return taken(cudaEventRecord(raw(event), raw(stream))); }
int wait(Event* event) { return taken(cudaEventSynchronize(raw(event))); }
int wait_on_device(Stream* stream, Event* event) { return taken(cudaStreamWaitEvent(raw(stream), raw(event), 0)); }
bool capturing(Stream* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return taken(cudaStreamIsCapturing(raw(stream), &status)) != 0 || status != cudaStreamCaptureStatusNone;
}
int synchronize(Stream* stream) { return taken(cudaStreamSynchronize(raw(stream))); }
int synchronize_device() { return taken(cudaDeviceSynchronize()); }
int copy(void* to, const void* from, size_t bytes, Stream* stream) {
  return taken(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, raw(stream)));
}
// The driver stages pageable memory before it returns, but where the GPU reads it through the host's page tables.
int copy_at_once(void* to, const void* from, size_t bytes, Stream* stream) {
  int device = 0, direct = 0;
  int error = copy(to, from, bytes, stream);
  if (!error) error = current_device(&device);
  if (!error) error = taken(cudaDeviceGetAttribute(&direct, cudaDevAttrPageableMemoryAccessUsesHostPageTables, device));
  return error || !direct ? error : synchronize(stream);
}
int clear(void* data, size_t bytes, Stream* stream) { return taken(cudaMemsetAsync(data, 0, bytes, raw(stream))); }

// The one function of the driver that cudart does not have; it touches no GPU.
bool make_tensor_map(const TensorShape& shape, TensorMap* map) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (taken(error) != 0 || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint64_t size[5], stride[4];
  for (int i = 0; i < 5; ++i) size[i] = shape.size[i];
  for (int i = 0; i < 4; ++i) stride[i] = shape.stride[i];
  return encode && encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, shape.data, size,
                          stride, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
bool is_out_of_memory(int error) { return error == cudaErrorMemoryAllocation; }
bool is_no_device(int error) { return error == cudaErrorNoDevice; }
bool lacks_code(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
         error == cudaErrorInvalidDeviceFunction;
}

// The errors of which CUDA's documentation says that the process must be started again.
bool loses_context(int error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorCudartUnloading:
    case cudaErrorContextIsDestroyed: return true;
    default: return false;
  }
}

const char* build_text() { return QKV_CUDA_BUILD; }

}  // namespace qkv::cuda
