// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

namespace qkv::cuda {
namespace {

Stream* const kPerThread = reinterpret_cast<Stream*>(2);  // cudaStreamPerThread

}  // namespace

// To the next of eight steps between powers of two: at most an eighth is wasted, and sizes meet again.
int64_t Pool::rounded(int64_t bytes) {
  int64_t step = 512;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void Pool::free_all() {
  for (const auto& [size, block] : cached_) {
    if (release(block.data) != 0) continue;  // waits for the device, so whatever used it is done
    stats_.cached -= size;
  }
  cached_.clear();
}

bool Pool::in_order(Stream* before, Stream* stream) {
  return before == stream && before != nullptr && before != kPerThread;
}

void* Pool::take(int64_t bytes, Stream* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t size = rounded(bytes);
  void* data = nullptr;
  auto other = cached_.end();
  for (auto it = cached_.lower_bound(size); it != cached_.end() && it->first <= size + size / 4; ++it) {
    if (in_order(it->second.stream, stream)) {
      data = it->second.data;
      used_[data] = it->first;
      cached_.erase(it);
      break;
    }
    if (other == cached_.end()) other = it;
  }
  if (!data && other != cached_.end()) {
    check(synchronize_device(), "waiting for the GPU");  // not for its stream, which may be gone by now
    data = other->second.data;
    used_[data] = other->first;
    cached_.erase(other);
  }
  if (data) {
    stats_.cached -= used_[data];
  } else {
    int error = allocate(&data, static_cast<size_t>(size));
    if (is_out_of_memory(error)) {
      free_all();
      error = allocate(&data, static_cast<size_t>(size));
    }
    if (is_out_of_memory(error)) {
      size_t left = 0;
      const bool known = free_memory(&left) == 0;
      throw OutOfMemory{"out of GPU memory: " + bytes_text(size) + " asked for" +
                        (known ? ", " + bytes_text(static_cast<int64_t>(left)) + " free" : "")};
    }
    check(error, "allocating GPU memory");
    ++stats_.allocations;
    used_[data] = size;
  }
  stats_.in_use += used_[data];
  if (stats_.in_use > stats_.peak) stats_.peak = stats_.in_use;
  return data;
}

void Pool::give(void* data, Stream* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = used_.find(data);
  if (it == used_.end()) return;
  stats_.in_use -= it->second;
  stats_.cached += it->second;
  cached_.insert({it->second, {data, stream}});
  used_.erase(it);
}

DeviceMemory Pool::stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void Pool::trim() {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_all();
}

}  // namespace qkv::cuda
