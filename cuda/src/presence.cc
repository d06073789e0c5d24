// SPDX-License-Identifier: Apache-2.0
#include "presence.h"

#include "runtime.h"

namespace qkv::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string find_devices(int* n) {
  int driver = 0;
  const int unknown = driver_version(&driver);
  const std::string needs = "; this build needs a driver for CUDA " + version_text(runtime_version());
  if (unknown || driver == 0) return "no NVIDIA driver is installed (libcuda.so.1)" + needs;
  if (driver / 1000 < runtime_version() / 1000) {
    return "the NVIDIA driver is too old: it supports CUDA " + version_text(driver) + needs;
  }
  const int error = device_count(n);
  if (is_no_device(error) || (error == 0 && *n == 0)) return "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES?)";
  if (error) return std::string("the NVIDIA driver does not start: ") + error_text(error);
  if (*n > kMostDevices) *n = kMostDevices;
  return "";
}

}  // namespace qkv::cuda
