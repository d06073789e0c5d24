// SPDX-License-Identifier: Apache-2.0
// A problem as kernels see it: the same struct, with every pointer in device memory.
#pragma once

#include <vector>

#include "small_copies.h"
#include "staging.h"

namespace qkv::cuda {

int64_t received_bytes(const Problem& p);  // of the statistic of keys

class DeviceProblem {
 public:
  // Copies what lies in host memory: the small arrays and a bias by distance always; q, k, v, mask and a bias of scores
  // when p.device < 0.
  DeviceProblem(const Problem& p, Pool& pool, SmallCopies& copies, Staging& staging, Stream* stream);
  DeviceProblem(const DeviceProblem&) = delete;
  DeviceProblem& operator=(const DeviceProblem&) = delete;

  void fetch_results();  // p.device < 0: out, lse and weights to where the caller wants them
  Problem problem;
  Buffer scratch(int64_t bytes) { return Buffer(pool_, bytes, stream_); }

 private:
  struct Small {  // an array that goes into one block with the others
    const void* data;
    int64_t bytes;
    void** slot;  // what shall point to its copy
  };
  struct Result {  // of statistics
    void* to;
    int64_t bytes;
    char* from;
  };
  struct Kept {  // where the small arrays are, while they are read
    SmallCopies& copies;
    char* place = nullptr;
    ~Kept() {
      if (place) copies.release(place);
    }
  };
  template <class T>
  void small(const T*& slot, int64_t n);
  void program();
  void per_row(View& view, int64_t D);
  void send_small();
  void statistics();
  void input(View& view, int64_t H, int64_t S, int64_t D);
  char* take(int64_t bytes);

  const Problem& host_;
  Pool& pool_;
  SmallCopies& copies_;
  Kept kept_;
  Staging& staging_;
  Stream* stream_;
  std::vector<MaskNode> nodes_;
  std::vector<std::vector<char>> per_row_;
  std::vector<Small> small_;
  std::vector<Result> results_;
  std::vector<Buffer> buffers_;
};

}  // namespace qkv::cuda
