// SPDX-License-Identifier: Apache-2.0
// Host arrays of any strides to compact device arrays and back, through pinned memory: while one chunk is under way the
// next is gathered.
#pragma once

#include <vector>

#include "pool.h"
#include "qkv/problem.h"

namespace qkv::cuda {

// A strided host array beside its compact copy: dimensions of stride 0 or extent 1 have no extent there, rows start on
// multiples of 16 bytes.
class Layout {
 public:
  Layout(const Problem& p, const View& host, int64_t H, int64_t S, int64_t D);
  int64_t bytes() const { return rows_ * pitch_; }
  bool padded() const { return pitch_ != columns_ * size_; }  // rows have bytes of nobody at their end
  View on_device(char* data) const;                           // the copy's view

  // Bytes begin ... end - 1 of the copy, from or to the host array.
  void gather(int64_t begin, int64_t end, char* copy) const;
  void scatter(int64_t begin, int64_t end, const char* copy) const;

 private:
  template <class Move>
  void for_pieces(int64_t begin, int64_t end, const Move& move) const;

  struct Dim {
    int64_t n, stride;  // extent in the copy, and bytes in the host array
  };
  std::vector<Dim> dims_;  // but for the last, outermost first
  View view_;              // of the copy
  char* host_;
  int64_t size_, columns_, column_step_, rows_ = 1, pitch_;  // pitch: bytes of a row of the copy
};

class Staging {  // two pinned chunks and a stream; one user at a time
 public:
  Stream* stream();
  void upload(const Layout& from, char* to);
  void upload(const void* from, int64_t bytes, char* to);
  void download(const char* from, const Layout& to);
  void download(const char* from, int64_t bytes, void* to);

 private:
  static constexpr int64_t kChunk = int64_t{4} << 20;  // long against the cost of a copy, half of it in a cache
  void prepare();
  template <class Fill>
  void send(int64_t bytes, char* to, const Fill& fill);
  template <class Take>
  void fetch(const char* from, int64_t bytes, const Take& take);

  Stream* stream_ = nullptr;
  void* chunk_[2] = {};
  Event* free_[2] = {};
};

}  // namespace qkv::cuda
