// SPDX-License-Identifier: Apache-2.0
// The functions of cuda/src/device/intrinsics.cuh for the host. Fragments are laid out as the PTX ISA documents them;
// asynchronous copies arrive when they are waited for, and not sooner: until then their target holds NaN. Products are
// exact, their sums rounded to float once per instruction.
#pragma once

#include <math.h>
#include <string.h>

#include <bit>

#include "fibers.h"
#include "qkv/dtype.h"
#include "races.h"

namespace qkv::inline QKV_LEVEL {

struct Half {
  static constexpr DType kDType = DType::f16;
};
struct Bfloat {
  static constexpr DType kDType = DType::bf16;
};
struct Halves {
  static constexpr DType kDType = DType::f32;
};

// --- threads -------------------------------------------------------------------------------------------------

inline int thread_index() { return emulation::current_thread(); }
inline void sync_block() {
  emulation::meet_block("sync_block", nullptr, [](void**, int) {});
}

struct Vote {
  bool x;
  uint32_t result;
};
inline void combine_votes(void** brought, int n) {
  uint32_t result = 0;
  for (int i = 0; i < n; ++i) result |= static_cast<uint32_t>(static_cast<Vote*>(brought[i])->x) << (i % 32);
  for (int i = 0; i < n; ++i) static_cast<Vote*>(brought[i])->result = result;
}
inline bool any_in_block(bool x) {
  Vote v{x, 0};
  emulation::meet_block("any_in_block", &v, combine_votes);
  return v.result != 0;
}
inline uint32_t ballot(bool x) {
  Vote v{x, 0};
  emulation::meet_warp("ballot", &v, combine_votes);
  return v.result;
}
inline void sync_warp() { ballot(true); }
inline int unknown(int x) { return x; }
inline bool any_in_warp(bool x) { return ballot(x) != 0; }
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

template <class A>
inline A shuffle_xor(A x, int lanes) {
  struct Exchange {
    A x, result;
    int lanes;
  } e{x, x, lanes};
  emulation::meet_warp("shuffle_xor", &e, [](void** brought, int n) {
    for (int i = 0; i < n; ++i) {
      auto* own = static_cast<Exchange*>(brought[i]);
      own->result = static_cast<Exchange*>(brought[i ^ own->lanes])->x;
    }
  });
  return e.result;
}

template <class A>
inline A shuffle_from(A x, int lane) {
  struct Exchange {
    A x, result;
    int lane;
  } e{x, x, lane};
  emulation::meet_warp("shuffle_from", &e, [](void** brought, int n) {
    for (int i = 0; i < n; ++i) {
      auto* own = static_cast<Exchange*>(brought[i]);
      own->result = static_cast<Exchange*>(brought[own->lane])->x;
    }
  });
  return e.result;
}

inline void atomic_min(int64_t* at, int64_t x) { emulation::min_at(at, x); }
inline void atomic_max(int64_t* at, int64_t x) { emulation::max_at(at, x); }
inline void atomic_or(uint32_t* at, uint32_t x) { emulation::or_at(at, x); }
inline uint32_t atomic_add(uint32_t* at, uint32_t x) {  // in device memory, which nobody watches
  const uint32_t before = *at;
  *at += x;
  return before;
}

// --- copies from device memory to shared memory ---------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Copies {  // of one thread: copies queued, and how many belonged to the groups that were committed
  static constexpr int kMost = 4096;
  Copy copy[kMost];
  int count = 0, groups = 0, end_of_group[64];
};
inline Copies* all_copies() {
  static Copies* const all = new Copies[emulation::kMaxThreads];
  return all;
}
inline Copies& copies() { return all_copies()[emulation::current_thread()]; }
inline int boxes_on_their_way = 0;  // of hopper.cuh
inline void end_copies() {          // of a block: its shared memory will be another's
  if (boxes_on_their_way) emulation::fail("a block ends while boxes are on their way");
  for (int i = 0; i < emulation::kMaxThreads; ++i) {
    if (all_copies()[i].count) emulation::fail("a block ends while copies are under way");
    all_copies()[i].groups = 0;
  }
}
inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (bytes && reinterpret_cast<uintptr_t>(global) % 16)) {
    emulation::fail("copy_async: an address is not a multiple of 16");
  }
  Copies& c = copies();
  if (c.count == Copies::kMost) emulation::fail("copy_async: too many under way");
  memset(shared, 0xff, 16);
  emulation::copy_begins(shared, 16);
  c.copy[c.count++] = {shared, global, bytes};
}
inline void copy_async(void* shared, const void* global) { copy_async(shared, global, 16); }
inline void commit_copies() {
  Copies& c = copies();
  if (c.groups == 64) emulation::fail("commit_copies: too many groups");
  c.end_of_group[c.groups++] = c.count;
}
// The oldest groups come.
inline void land_copies(int landed) {
  Copies& c = copies();
  const int end = c.end_of_group[landed - 1];
  for (int i = 0; i < end; ++i) {
    char bytes[16] = {};
    if (c.copy[i].bytes) memcpy(bytes, c.copy[i].from, static_cast<size_t>(c.copy[i].bytes));
    emulation::copy_lands(c.copy[i].to, 16, emulation::current_thread());
    memcpy(c.copy[i].to, bytes, 16);
  }
  for (int i = end; i < c.count; ++i) c.copy[i - end] = c.copy[i];
  for (int g = landed; g < c.groups; ++g) c.end_of_group[g - landed] = c.end_of_group[g] - end;
  c.count -= end;
  c.groups -= landed;
}
template <int N>
inline void wait_copies() {
  if (copies().groups > N) land_copies(copies().groups - N);
}

// --- matrices ------------------------------------------------------------------------------------------------

using SharedAddress = const char*;
inline SharedAddress shared_address(const void* shared) { return static_cast<const char*>(shared); }

struct MatrixLoad {
  uint32_t* x;
  uint16_t row[8];
};
inline void load_matrices_as(const char* kind, uint32_t (&x)[4], const char* row, emulation::Combine combine) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix: a row is not on a multiple of 16");
  MatrixLoad load{x, {}};
  for (int i = 0; i < 8; ++i) load.row[i] = reinterpret_cast<const uint16_t*>(row)[i];  // by whose lane it is
  emulation::meet_warp(kind, &load, combine);
}
template <bool Transposed>
inline void combine_loads(void** brought, int) {
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<MatrixLoad*>(brought[matrix * 8 + row])->row[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = Transposed ? element(i, 2 * t, g) : element(i, g, 2 * t);
      const uint32_t high = Transposed ? element(i, 2 * t + 1, g) : element(i, g, 2 * t + 1);
      static_cast<MatrixLoad*>(brought[lane])->x[i] = low | high << 16;
    }
  }
}
inline void load_matrices(uint32_t (&x)[4], SharedAddress row) {
  load_matrices_as("load_matrices", x, row, combine_loads<false>);
}
inline void load_matrices_transposed(uint32_t (&x)[4], SharedAddress row) {
  load_matrices_as("load_matrices_transposed", x, row, combine_loads<true>);
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
inline float element_of(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * i));
  return T::kDType != DType::bf16 ? f16_to_float(bits) : bf16_to_float(bits);
}
template <class T>
inline void combine_products(void** brought, int) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* x = static_cast<const Product*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = element_of<T>(x->a[0], i);
      a[g + 8][2 * t + i] = element_of<T>(x->a[1], i);
      a[g][2 * t + 8 + i] = element_of<T>(x->a[2], i);
      a[g + 8][2 * t + 8 + i] = element_of<T>(x->a[3], i);
      b[2 * t + i][g] = element_of<T>(x->b[0], i);
      b[2 * t + 8 + i][g] = element_of<T>(x->b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* x = static_cast<Product*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      double sum = x->c[i];
      for (int k = 0; k < 16; ++k) {
        sum += static_cast<double>(a[g + i / 2 * 8][k]) * static_cast<double>(b[k][2 * t + i % 2]);
      }
      x->c[i] = static_cast<float>(sum);
    }
  }
}
template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product x{c, a, {b0, b1}};
  emulation::meet_warp("multiply_add", &x, combine_products<T>);
}

// --- numbers -------------------------------------------------------------------------------------------------

template <class T>
inline uint32_t pack(float low, float high) {
  const auto bits = [](float x) -> uint32_t {
    return T::kDType != DType::bf16 ? double_to_f16(static_cast<double>(x)) : float_to_bf16(x);
  };
  return bits(low) | bits(high) << 16;
}

inline void unpack(uint32_t pair, float (&x)[2]) {
  x[0] = f16_to_float(static_cast<uint16_t>(pair));
  x[1] = f16_to_float(static_cast<uint16_t>(pair >> 16));
}
template <class T>
inline uint32_t add_zeros(uint32_t sum, uint32_t x) {
  float parts[2];
  for (int i = 0; i < 2; ++i) parts[i] = element_of<T>(sum, i) + 0.0f * element_of<T>(x, i);
  return pack<T>(parts[0], parts[1]);
}
inline uint32_t float_as_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_as_float(uint32_t x) { return std::bit_cast<float>(x); }

inline float power_of_two(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline double power_of_two(double x) { return exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

}  // namespace qkv::inline QKV_LEVEL
