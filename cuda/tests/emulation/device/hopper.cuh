// SPDX-License-Identifier: Apache-2.0
// The functions of cuda/src/device/hopper.cuh for the host. A matrix in shared memory is read through its swizzle, from
// the address alone, as the hardware does. Products happen when they are waited for, and copies that report to a
// barrier come when their thread next waits for one: what reads a sum too early, or writes an operand, shows.
#pragma once

#include "device/intrinsics.cuh"

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
inline void wait_phase(Barrier* barrier, uint32_t phase) {
  for (int i = 0; (*barrier >> 32 & 1) == (phase & 1); ++i) {
    if (i > 1000000) emulation::fail("a barrier in shared memory whose phase does not pass");
    if (copies().groups > 0 && copies().reports[0]) land_copies(1);
    emulation::pause();
  }
}

template <int N>
inline void sync_threads(int id) {
  emulation::meet_some("sync_threads", id, N);
}
template <int N>
inline void arrive_threads(int id) {
  emulation::arrive_some("arrive_threads", id, N);
}
inline void arrive_with_copies(Barrier* barrier) {
  commit_copies();
  copies().reports[copies().groups - 1] = barrier;
}
template <int N>
inline void take_registers() {}
template <int N>
inline void give_registers() {}

}  // namespace qkv::inline QKV_LEVEL
