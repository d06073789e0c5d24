// SPDX-License-Identifier: Apache-2.0
// Device memory that is kept: cudaMalloc and cudaFree wait for the device. A block that is given back serves later work
// of the same stream at once; another stream gets it only after all work of the device has come to its end.
#pragma once

#include <map>
#include <mutex>
#include <vector>

#include "errors.h"
#include "qkv/plugin.h"
#include "runtime.h"

namespace qkv::cuda {

class Pool {
 public:
  // OutOfMemory when the driver has none even after everything cached was given back. The device is the current one.
  void* take(int64_t bytes, Stream* stream);
  // noexcept in effect: what is not ours is left alone. nullptr: work of any stream may still use it.
  void give(void* data, Stream* stream);
  DeviceMemory stats();
  void trim();
  // Does what used a block come before what `stream` does next? Not for a stream that is nobody's, or each thread's.
  static bool in_order(Stream* before, Stream* stream);

 private:
  struct Block {
    void* data;
    Stream* stream;  // whose work may still use it
  };
  static int64_t rounded(int64_t bytes);
  void free_all();

  std::mutex mutex_;
  std::multimap<int64_t, Block> cached_;  // by size
  std::map<void*, int64_t> used_;
  DeviceMemory stats_;
};

// A block for the length of a call.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Pool& pool, int64_t bytes, Stream* stream)
      : pool_(&pool), stream_(stream), data_(bytes > 0 ? pool.take(bytes, stream) : nullptr) {}
  Buffer(Buffer&& o) noexcept : pool_(o.pool_), stream_(o.stream_), data_(o.data_) { o.data_ = nullptr; }
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(pool_, o.pool_);
    std::swap(stream_, o.stream_);
    std::swap(data_, o.data_);
    return *this;
  }
  ~Buffer() {
    if (data_) pool_->give(data_, stream_);
  }
  char* data() const { return static_cast<char*>(data_); }

 private:
  Pool* pool_ = nullptr;
  Stream* stream_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace qkv::cuda
