// SPDX-License-Identifier: Apache-2.0
// What kernels ask of the machine, one function each: the only inline PTX of the portable kernels (sm_80 and newer).
// cuda/tests/emulation has the same functions for the host, so that the kernels' text can be tested without a GPU.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), lane = 4 g + t:
//   A (16 x 16)  a[0]: row g, columns 2t, 2t+1    a[1]: row g+8    a[2], a[3]: the same, columns + 8
//   B (16 x 8)   b[0]: rows 2t, 2t+1, column g    b[1]: rows + 8
//   C (16 x 8)   c[0], c[1]: row g, columns 2t, 2t+1    c[2], c[3]: row g+8
#pragma once

#include "qkv/dtype.h"

namespace qkv::inline QKV_LEVEL {

struct Half {  // tags: 16-bit elements are moved as bits
  static constexpr DType kDType = DType::f16;
};
struct Bfloat {
  static constexpr DType kDType = DType::bf16;
};
struct Halves {  // float32 as two float16: halves.cuh
  static constexpr DType kDType = DType::f32;
};

// --- threads -------------------------------------------------------------------------------------------------

QKV_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
QKV_DEVICE void sync_block() { __syncthreads(); }
QKV_DEVICE void sync_warp() { __syncwarp(); }

// The same number, of which the compiler knows nothing: what follows from it is not kept in registers from before.
QKV_DEVICE int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
QKV_DEVICE bool any_in_block(bool x) { return __syncthreads_or(x) != 0; }
QKV_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x) != 0; }
QKV_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
QKV_DEVICE int count_bits(uint32_t x) { return __popc(x); }

template <class A>
QKV_DEVICE A shuffle_xor(A x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

template <class A>
QKV_DEVICE A shuffle_from(A x, int lane) {  // what that lane has
  return __shfl_sync(0xffffffffu, x, lane);
}

QKV_DEVICE void atomic_min(int64_t* at, int64_t x) {
  atomicMin(reinterpret_cast<long long*>(at), static_cast<long long>(x));
}
QKV_DEVICE void atomic_max(int64_t* at, int64_t x) {
  atomicMax(reinterpret_cast<long long*>(at), static_cast<long long>(x));
}
QKV_DEVICE void atomic_or(uint32_t* at, uint32_t x) { atomicOr(at, x); }
QKV_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t x) { return atomicAdd(at, x); }  // what was there before

// --- copies from device memory to shared memory ---------------------------------------------------------------

using SharedAddress = uint32_t;
QKV_DEVICE SharedAddress shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes, of which the first `bytes` are read and the others become 0. Both addresses are multiples of 16.
QKV_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  const SharedAddress to = shared_address(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// All of the 16 bytes: fewer instructions.
QKV_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
QKV_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
QKV_DEVICE void wait_copies() {  // until at most the N latest groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- matrices ------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r names row r of matrix i. Lane 4 g + t gets of each matrix the
// elements 2t, 2t+1 of row g; transposed: of column g.
QKV_DEVICE void load_matrices(uint32_t (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row));
}
QKV_DEVICE void load_matrices_transposed(uint32_t (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row));
}

// c += a b. Volatile, as all lanes must come to it: it may not move to where only some want c.
template <class T>
QKV_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::kDType != DType::bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- numbers -------------------------------------------------------------------------------------------------

// Two floats, rounded to nearest; the first is the lower half.
template <class T>
QKV_DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (T::kDType != DType::bf16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The two float16 of a pair.
QKV_DEVICE void unpack(uint32_t pair, float (&x)[2]) {
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(x[0]), "=f"(x[1])
      : "r"(pair));
}
// sum + 0 x, pair by pair: NaN as soon as one x was not finite.
template <class T>
QKV_DEVICE uint32_t add_zeros(uint32_t sum, uint32_t x) {
  if constexpr (T::kDType != DType::bf16) asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(0));
  else asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(0));
  return sum;
}
QKV_DEVICE uint32_t float_as_bits(float x) { return __float_as_uint(x); }
QKV_DEVICE float bits_as_float(uint32_t x) { return __uint_as_float(x); }

// 2^x: +0 below the normal range and for -inf, NaN for NaN; 2 ulp in float.
QKV_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QKV_DEVICE double power_of_two(double x) { return exp2(x); }

// 1 / x, to 1 ulp.
QKV_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

QKV_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QKV_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

}  // namespace qkv::inline QKV_LEVEL
