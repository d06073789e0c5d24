// SPDX-License-Identifier: Apache-2.0
#include "staging.h"

#include <string.h>

namespace qkv::cuda {

// --- layout --------------------------------------------------------------------------------------------------

Layout::Layout(const Problem& p, const View& host, int64_t H, int64_t S, int64_t D)
    : view_(host), host_(host.data), size_(itemsize(host.dtype)) {
  columns_ = host.d == 0 && D > 0 ? 1 : D;
  column_step_ = host.d * size_;
  pitch_ = (columns_ * size_ + 15) / 16 * 16;
  view_.d = columns_ == D ? 1 : 0;
  int64_t stride = pitch_ / size_;  // of the copy, from the innermost dimension outwards
  const auto dim = [&](int64_t n, int64_t from) -> int64_t {
    const bool kept = from != 0 && n != 1;
    const int64_t own = kept ? stride : 0;
    if (n == 0) rows_ = 0;
    if (kept) {
      dims_.insert(dims_.begin(), {n, from * size_});
      rows_ *= n;
      stride *= n;
    }
    return own;
  };
  view_.s = dim(S, host.s);
  view_.h = dim(H, host.h);
  for (int t = p.n_lead - 1; t >= 0; --t) view_.lead[t] = dim(p.lead[t], host.lead[t]);
  // Rows that follow each other in both are one: long runs are copied at once.
  while (!dims_.empty() && column_step_ == size_ && pitch_ == columns_ * size_ && dims_.back().stride == pitch_) {
    columns_ *= dims_.back().n;
    pitch_ *= dims_.back().n;
    rows_ = dims_.back().n ? rows_ / dims_.back().n : 0;
    dims_.pop_back();
  }
}

View Layout::on_device(char* data) const {
  View v = view_;
  v.data = data;
  return v;
}

// move(host address, offset in the copy, bytes of the copy) for each piece of a row, the padding at its end excepted.
template <class Move>
void Layout::for_pieces(int64_t begin, int64_t end, const Move& move) const {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / pitch_, first = at % pitch_;
    int64_t last = end - at < pitch_ - first ? first + end - at : pitch_;  // of this row, in bytes
    if (last > columns_ * size_) last = columns_ * size_;
    char* host = host_;
    int64_t rest = row;
    for (size_t i = dims_.size(); i-- > 0;) {
      host += rest % dims_[i].n * dims_[i].stride;
      rest /= dims_[i].n;
    }
    if (first < last) move(host + first / size_ * column_step_, at - begin, last - first);
    at = end - at < pitch_ - first ? end : at + pitch_ - first;
  }
}

void Layout::gather(int64_t begin, int64_t end, char* copy) const {
  for_pieces(begin, end, [&](const char* host, int64_t offset, int64_t bytes) {
    if (column_step_ == size_) {
      memcpy(copy + offset, host, static_cast<size_t>(bytes));
      return;
    }
    for (int64_t i = 0; i < bytes / size_; ++i) {
      memcpy(copy + offset + i * size_, host + i * column_step_, static_cast<size_t>(size_));
    }
  });
}

void Layout::scatter(int64_t begin, int64_t end, const char* copy) const {
  for_pieces(begin, end, [&](char* host, int64_t offset, int64_t bytes) {
    if (column_step_ == size_) {
      memcpy(host, copy + offset, static_cast<size_t>(bytes));
      return;
    }
    for (int64_t i = 0; i < bytes / size_; ++i) {
      memcpy(host + i * column_step_, copy + offset + i * size_, static_cast<size_t>(size_));
    }
  });
}

// --- copies --------------------------------------------------------------------------------------------------

void Staging::prepare() {
  if (!stream_) check(make_stream(&stream_), "making a stream");
  for (int i = 0; i < 2; ++i) {
    if (!free_[i]) check(make_event(&free_[i]), "making an event");
    if (!chunk_[i]) check(allocate_pinned(&chunk_[i], kChunk), "allocating pinned host memory");
  }
}

Stream* Staging::stream() {
  prepare();
  return stream_;
}

template <class Fill>
void Staging::send(int64_t bytes, char* to, const Fill& fill) {
  prepare();
  for (int64_t at = 0, i = 0; at < bytes; at += kChunk, ++i) {
    const int64_t n = bytes - at < kChunk ? bytes - at : kChunk;
    check(wait(free_[i % 2]), "copying to the GPU");
    fill(at, at + n, static_cast<char*>(chunk_[i % 2]));
    check(copy(to + at, chunk_[i % 2], static_cast<size_t>(n), stream_), "copying to the GPU");
    check(record(free_[i % 2], stream_), "copying to the GPU");
  }
}

template <class Take>
void Staging::fetch(const char* from, int64_t bytes, const Take& take) {
  prepare();
  const auto take_chunk = [&](int64_t i) {
    const int64_t at = i * kChunk, n = bytes - at < kChunk ? bytes - at : kChunk;
    check(wait(free_[i % 2]), "copying from the GPU");
    take(at, at + n, static_cast<const char*>(chunk_[i % 2]));
  };
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t at = i * kChunk, n = bytes - at < kChunk ? bytes - at : kChunk;
    check(copy(chunk_[i % 2], from + at, static_cast<size_t>(n), stream_), "copying from the GPU");
    check(record(free_[i % 2], stream_), "copying from the GPU");
    if (i > 0) take_chunk(i - 1);
  }
  if (chunks > 0) take_chunk(chunks - 1);
}

void Staging::upload(const Layout& from, char* to) {
  send(from.bytes(), to, [&](int64_t begin, int64_t end, char* chunk) { from.gather(begin, end, chunk); });
}
void Staging::upload(const void* from, int64_t bytes, char* to) {
  send(bytes, to, [&](int64_t begin, int64_t end, char* chunk) {
    memcpy(chunk, static_cast<const char*>(from) + begin, static_cast<size_t>(end - begin));
  });
}
void Staging::download(const char* from, const Layout& to) {
  fetch(from, to.bytes(), [&](int64_t begin, int64_t end, const char* chunk) { to.scatter(begin, end, chunk); });
}
void Staging::download(const char* from, int64_t bytes, void* to) {
  fetch(from, bytes, [&](int64_t begin, int64_t end, const char* chunk) {
    memcpy(static_cast<char*>(to) + begin, chunk, static_cast<size_t>(end - begin));
  });
}

}  // namespace qkv::cuda
