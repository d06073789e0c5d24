// SPDX-License-Identifier: Apache-2.0
// From a kernel's body, a class with kThreads, kBlocks (that should fit a multiprocessor) and run(args, block, shared),
// to a launch.
#pragma once

#include <cuda_runtime.h>

#include "device/intrinsics.cuh"

namespace qkv::inline QKV_LEVEL {

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kBlocks)
    entry(const __grid_constant__ typename Body::Args args) {
  extern __shared__ __align__(1024) char shared[];
  Body::run(args, static_cast<int64_t>(blockIdx.x), shared);
}

// Lets a kernel have more than 48 KiB of shared memory. A device remembers that for good: each is told once. (With
// <atomic>, each file of kernels would take two seconds longer.)
template <class Body>
cudaError_t allow_shared() {
  static uint64_t told = 0;  // a bit for each device; there are 64 at most
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << device;
  if (error != cudaSuccess || __atomic_load_n(&told, __ATOMIC_RELAXED) & bit) return error;
  error =
      cudaFuncSetAttribute(entry<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Body::kShared));
  if (error == cudaSuccess) __atomic_fetch_or(&told, bit, __ATOMIC_RELAXED);
  return error;
}

// A cudaError_t as an int: 0 is success.
template <class Body>
int launch(const typename Body::Args& args, int64_t blocks, void* stream) {
  if (Body::kShared > 48 * 1024) {
    // The error is taken away: the next launch is not at fault.
    if (allow_shared<Body>() != cudaSuccess) return static_cast<int>(cudaGetLastError());
  }
  const auto count = static_cast<unsigned>(blocks);
  entry<Body><<<count, Body::kThreads, Body::kShared, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace qkv::inline QKV_LEVEL
