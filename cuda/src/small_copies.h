// SPDX-License-Identifier: Apache-2.0
// Small host arrays that are on the GPU already. A causal mask is the same bytes in each call, and to send them takes
// the host longer than the launch: what one call sent, the next ones of its stream find.
#pragma once

#include <mutex>
#include <vector>

#include "pool.h"

namespace qkv::cuda {

class SmallCopies {
 public:
  static constexpr int64_t kMost = 1024;  // bytes of one

  // A place for these bytes, for the stream's next work; nobody writes there before it is released. `there`: they are,
  // or else the caller sends them and says so. nullptr: there is no place, or they are too many.
  char* take(const std::vector<char>& bytes, Stream* stream, bool* there);
  void sent(const char* place, const std::vector<char>& bytes);
  void release(const char* place);

 private:
  static constexpr int kSlots = 32;
  struct Slot {
    std::vector<char> bytes;   // that are there; empty: none
    Stream* stream = nullptr;  // that wrote and reads them; nullptr: nobody did
    int users = 0;
    uint64_t used = 0;  // when
  };
  Slot& slot_of(const char* place) { return slots_[(place - memory_) / kMost]; }

  std::mutex mutex_;
  char* memory_ = nullptr;  // of all slots, kept
  uint64_t now_ = 0;
  Slot slots_[kSlots];
};

}  // namespace qkv::cuda
