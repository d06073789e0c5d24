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

// A cudaError_t as an int: 0 is success.
template <class Body>
int launch(const typename Body::Args& args, int64_t blocks, void* stream) {
  if (Body::kShared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(entry<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Body::kShared));
    if (error != cudaSuccess)
      return static_cast<int>(cudaGetLastError());  // taken away: the next launch is not at fault
  }
  const auto count = static_cast<unsigned>(blocks);
  entry<Body><<<count, Body::kThreads, Body::kShared, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace qkv::inline QKV_LEVEL
