// SPDX-License-Identifier: Apache-2.0
// The functions of cuda/src/device/hopper.cuh for the host. A matrix in shared memory is read through its swizzle, from
// the address alone, as the hardware does. Products happen when they are waited for, and boxes come when
// somebody waits, the newest first: what reads a sum or a tile too early, or writes an operand, shows.
#pragma once

#include <vector>

#include "device/intrinsics.cuh"
#include "tensor_map.h"

namespace qkv::inline QKV_LEVEL {

// --- matrices in shared memory ---------------------------------------------------------------------------------

struct SharedMatrix {
  const char* at;
  int block;     // bytes from 64 columns to the next; 0 for rows
  bool columns;  // the columns of B lie side by side

  // Element i of what is summed over, of row (or column of B) n.
  uint16_t element(int n, int i) const {
    uintptr_t to = reinterpret_cast<uintptr_t>(at);
    if (columns) to += static_cast<uintptr_t>(n / 64 * block + i / 8 * 1024 + i % 8 * 128 + n % 64 * 2);
    else to += static_cast<uintptr_t>(n / 8 * 1024 + n % 8 * 128 + i * 2);
    to ^= (to >> 7 & 7) << 4;
    return *reinterpret_cast<const uint16_t*>(to);
  }
};
inline SharedMatrix rows_of(SharedAddress at) {
  if (reinterpret_cast<uintptr_t>(at) % 32 || reinterpret_cast<uintptr_t>(at) % 1024 >= 128)
    emulation::fail("wgmma: an operand that begins within a block of rows");
  return {at, 0, false};
}
inline SharedMatrix columns_of(SharedAddress at, int block) {
  if (reinterpret_cast<uintptr_t>(at) % 1024) emulation::fail("wgmma: an operand that is not on a multiple of 1024");
  return {at, block, true};
}
inline SharedMatrix moved(SharedMatrix matrix, int bytes) {
  if (matrix.columns) return columns_of(matrix.at + bytes, matrix.block);
  return rows_of(matrix.at + bytes);
}

struct MatrixStore {
  const uint32_t* x;
  uint16_t* row;
};
inline void store_matrices(SharedAddress row, const uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("stmatrix: a row is not on a multiple of 16");
  MatrixStore store{x, reinterpret_cast<uint16_t*>(const_cast<char*>(row))};
  emulation::meet_warp("store_matrices", &store, [](void** brought, int) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = static_cast<MatrixStore*>(brought[lane])->x[i];
        uint16_t* const to = static_cast<MatrixStore*>(brought[i * 8 + g])->row + t * 2;
        to[0] = static_cast<uint16_t>(pair);
        to[1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  });
}

// --- products --------------------------------------------------------------------------------------------------

struct GroupProduct {
  float (*c)[4];
  const uint32_t* in_registers;
  SharedMatrix a, b;
  bool add;
};
template <class T, int N>
inline void combine_group(void** brought, int) {
  static float a[64][16], b[16][N * 8];
  const auto* first = static_cast<const GroupProduct*>(brought[0]);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N * 8; ++n) b[k][n] = element_of<T>(first->b.element(n, k), 0);
    for (int row = 0; row < 64 && !first->in_registers; ++row) a[row][k] = element_of<T>(first->a.element(row, k), 0);
  }
  for (int thread = 0; thread < 128 && first->in_registers; ++thread) {
    const uint32_t* x = static_cast<const GroupProduct*>(brought[thread])->in_registers;
    const int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = element_of<T>(x[i / 2], i % 2);
  }
  for (int thread = 0; thread < 128; ++thread) {
    const auto* x = static_cast<const GroupProduct*>(brought[thread]);
    const int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 4; ++i) {
        double sum = x->add ? x->c[n][i] : 0;
        for (int k = 0; k < 16; ++k) {
          sum += static_cast<double>(a[g + i / 2 * 8][k]) * static_cast<double>(b[k][n * 8 + 2 * t + i % 2]);
        }
        x->c[n][i] = static_cast<float>(sum);
      }
    }
  }
}
struct Products {  // of one thread: queued, and how many belonged to the groups that were committed
  struct {
    GroupProduct x;
    emulation::Combine combine;
    const char* kind;
  } product[64];
  int count = 0, groups = 0, end_of_group[8];
};
inline Products& products() {
  static Products* const all = new Products[emulation::kMaxThreads];
  return all[emulation::current_thread()];
}
inline void begin_products() {}
inline void commit_products() {
  Products& p = products();
  if (p.groups == 8) emulation::fail("commit_products: too many groups");
  p.end_of_group[p.groups++] = p.count;
}
template <int N>
inline void wait_products() {
  Products& p = products();
  const int done = p.groups - N;
  if (done <= 0) return;
  const int end = p.end_of_group[done - 1];
  for (int i = 0; i < end; ++i) emulation::meet_group(p.product[i].kind, &p.product[i].x, p.product[i].combine);
  for (int i = end; i < p.count; ++i) p.product[i - end] = p.product[i];
  for (int g = done; g < p.groups; ++g) p.end_of_group[g - done] = p.end_of_group[g] - end;
  p.count -= end;
  p.groups -= done;
}
inline void queue_product(const GroupProduct& x, const char* kind, emulation::Combine combine) {
  Products& p = products();
  if (p.count == 64) emulation::fail("wgmma: too many products under way");
  p.product[p.count++] = {x, combine, kind};
}
template <class T, int N>
inline void multiply_rows(float (&c)[N][4], SharedMatrix a, SharedMatrix b, bool add) {
  queue_product({c, nullptr, a, b, add}, "multiply_rows", combine_group<T, N>);
}
template <class T, int N>
inline void multiply_columns(float (&c)[N][4], const uint32_t (&a)[4], SharedMatrix b, bool add) {
  queue_product({c, a, {}, b, add}, "multiply_columns", combine_group<T, N>);
}

// --- who waits for whom ----------------------------------------------------------------------------------------

inline void show_to_products() {}

using Barrier = uint64_t;  // as emulation::arrive_at has it
inline void make_barrier(Barrier* barrier, int arrivals) {
  *barrier = static_cast<uint64_t>(arrivals) | static_cast<uint64_t>(arrivals) << 16;
}
inline void arrive(Barrier* barrier) { emulation::arrive_at(barrier); }

// --- the copy engine -------------------------------------------------------------------------------------------

struct Box {
  char* shared;
  const TensorMap* map;
  BoxPlace at;
  Barrier* barrier;
  int thread;  // that began it
};
struct Expected {
  Barrier* barrier;
  int64_t bytes;
};
inline std::vector<Box>& loads() {  // on their way
  static std::vector<Box> all;
  return all;
}
inline std::vector<Expected>& expected() {  // arrivals that wait for so many bytes
  static std::vector<Expected> all;
  return all;
}

// f(bytes in shared memory, bytes of the array, or nullptr beyond it) for all chunks of a box.
template <class F>
inline void for_chunks(const Box& box, const F& f) {
  TensorShape shape;
  memcpy(&shape, box.map, sizeof(shape));  // fake_runtime.cc
  const int at[5] = {box.at.column, box.at.head, box.at.row, box.at.batch[0], box.at.batch[1]};
  const auto inside = [&](int i, int64_t x) { return x >= 0 && x < static_cast<int64_t>(shape.size[i]); };
  for (uint32_t r = 0; r < shape.box[1] * shape.box[2]; ++r) {
    const int64_t index[4] = {at[1] + r % shape.box[1], at[2] + r / shape.box[1], at[3], at[4]};
    char* row = static_cast<char*>(shape.data);
    bool there = true;
    for (int i = 0; i < 4; ++i) {
      there = there && inside(i + 1, index[i]);
      row += index[i] * static_cast<int64_t>(shape.stride[i]);
    }
    for (int e = 0; e < 64; ++e) {
      uintptr_t to = reinterpret_cast<uintptr_t>(box.shared) + r * 128 + static_cast<uintptr_t>(e * 2);
      to ^= (to >> 7 & 7) << 4;
      const int64_t column = at[0] + e;
      f(reinterpret_cast<uint16_t*>(to),
        there && inside(0, column) ? reinterpret_cast<uint16_t*>(row) + column : nullptr);
    }
  }
}
inline int box_bytes(const TensorMap& map) {
  TensorShape shape;
  memcpy(&shape, &map, sizeof(shape));
  return static_cast<int>(shape.box[0] * shape.box[1] * shape.box[2]) * 2;
}
inline void arrive_expecting(Barrier* barrier, int bytes) { expected().push_back({barrier, bytes}); }
inline void load_box(void* shared, const TensorMap& map, const BoxPlace& at, Barrier* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024) emulation::fail("load_box: not on a multiple of 1024");
  const auto bytes = static_cast<size_t>(box_bytes(map));
  memset(shared, 0xff, bytes);
  emulation::copy_begins(shared, bytes);
  loads().push_back({static_cast<char*>(shared), &map, at, barrier, emulation::current_thread()});
  ++boxes_on_their_way;
}
// The newest box comes: they come in any order, and this is the one in which most goes wrong.
inline void land_box() {
  const Box box = loads().back();
  loads().pop_back();
  --boxes_on_their_way;
  const int bytes = box_bytes(*box.map);
  emulation::copy_lands(box.shared, static_cast<size_t>(bytes), box.thread);
  for_chunks(box, [](uint16_t* to, const uint16_t* from) { *to = from ? *from : uint16_t{0}; });
  for (size_t i = 0; i < expected().size(); ++i) {
    Expected& e = expected()[i];
    if (e.barrier != box.barrier) continue;
    e.bytes -= bytes;
    if (e.bytes < 0) emulation::fail("more bytes come than a barrier was told of");
    if (e.bytes > 0) return;
    expected().erase(expected().begin() + static_cast<int64_t>(i));
    emulation::arrive_at(box.barrier);
    return;
  }
  emulation::fail("a box that no barrier was told of");
}
inline std::vector<Box>& stores() {  // of one thread: those that have not been read yet
  static auto* const all = new std::vector<Box>[emulation::kMaxThreads];
  return all[emulation::current_thread()];
}
// It is read at once, and must be the same when somebody waits for that.
inline void store_box(const void* shared, const TensorMap& map, const BoxPlace& at) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024) emulation::fail("store_box: not on a multiple of 1024");
  const Box box{static_cast<char*>(const_cast<void*>(shared)), &map, at, nullptr, emulation::current_thread()};
  for_chunks(box, [](const uint16_t* from, uint16_t* to) {
    if (to) *to = *from;
  });
  stores().push_back(box);
  ++boxes_on_their_way;
}
inline void commit_boxes() {}
inline void wait_boxes_read() {
  emulation::pause();
  for (const Box& box : stores()) {
    for_chunks(box, [](const uint16_t* from, const uint16_t* to) {
      if (to && *to != *from) emulation::fail("shared memory is written while a box of it is stored");
    });
  }
  boxes_on_their_way -= static_cast<int>(stores().size());
  stores().clear();
}

// --- waiting ---------------------------------------------------------------------------------------------------

inline void wait_phase(Barrier* barrier, uint32_t phase) {
  for (int i = 0; (*barrier >> 32 & 1) == (phase & 1); ++i) {
    if (i > 1000000) emulation::fail("a barrier in shared memory whose phase does not pass");
    if (i % 8 == 7 && !loads().empty()) land_box();
    emulation::pause();
  }
  emulation::waited_at(barrier);
}

template <int N>
inline void sync_threads(int id) {
  emulation::meet_some("sync_threads", id, N);
}
template <int N>
inline void arrive_threads(int id) {
  emulation::arrive_some("arrive_threads", id, N);
}
template <int N>
inline void take_registers() {}
template <int N>
inline void give_registers() {}

}  // namespace qkv::inline QKV_LEVEL
