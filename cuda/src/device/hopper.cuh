// SPDX-License-Identifier: Apache-2.0
// What kernels ask of Hopper (sm_90a) beyond intrinsics.cuh: products of a warpgroup, barriers in shared memory,
// registers that change hands. cuda/tests/emulation has the same functions for the host.
//
// A warpgroup is four warps, the first a multiple of four. Its product is C (64 x N) += A (64 x 16) B (16 x N): warp w
// holds rows 16 w ... 16 w + 15 of C, and of A where that is in registers, in the fragments of mma.m16n8k16.
#pragma once

#include "device/intrinsics.cuh"
#include "tensor_map.h"

namespace qkv::inline QKV_LEVEL {

// --- matrices in shared memory ---------------------------------------------------------------------------------

// Blocks of 64 columns, 128 bytes a row, rows one after the other, chunk c of 16 bytes of row r at c ^ (r mod 8); the
// first row of a block on a multiple of 1024 bytes. An operand begins at a row that is a multiple of 8 and a column
// that is a multiple of 16.
struct SharedMatrix {
  uint32_t low, high;
};

// Rows are those of A, or columns of B; its 16 columns are summed over.
QKV_DEVICE SharedMatrix rows_of(SharedAddress at) { return {(at & 0x3ffff) >> 4 | 1u << 16, 1024 >> 4 | 1u << 30}; }
// 16 rows, which are summed over; its columns are those of B, `block` bytes from 64 of them to the next.
QKV_DEVICE SharedMatrix columns_of(SharedAddress at, int block) {
  return {(at & 0x3ffff) >> 4 | static_cast<uint32_t>(block) >> 4 << 16, 1024 >> 4 | 1u << 30};
}
// The same so many bytes further on.
QKV_DEVICE SharedMatrix moved(SharedMatrix matrix, int bytes) {
  return {matrix.low + (static_cast<uint32_t>(bytes) >> 4), matrix.high};
}
QKV_DEVICE uint64_t descriptor(SharedMatrix matrix) { return uint64_t{matrix.high} << 32 | matrix.low; }

// Four matrices of 8 x 8, each lane with a row's address (as load_matrices) and two elements of a row of each.
QKV_DEVICE void store_matrices(SharedAddress row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// --- products --------------------------------------------------------------------------------------------------

// Before the first product, and wherever registers of C or A were written since.
QKV_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QKV_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
QKV_DEVICE void wait_products() {  // until at most the N latest groups are under way
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define QKV_C1(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define QKV_C4(i) QKV_C1(i), QKV_C1(i + 1), QKV_C1(i + 2), QKV_C1(i + 3)
#define QKV_C8 QKV_C4(0), QKV_C4(4)
#define QKV_C16 QKV_C8, QKV_C4(8), QKV_C4(12)
#define QKV_C32 QKV_C16, QKV_C4(16), QKV_C4(20), QKV_C4(24), QKV_C4(28)
#define QKV_R8                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define QKV_R16                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define QKV_R32                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// C = A B, or C += A B: A by its rows, B by its columns' rows (as K is).
template <class T, int N>
QKV_DEVICE void multiply_rows(float (&c)[N][4], SharedMatrix a, SharedMatrix b, bool add) {
  constexpr bool kHalf = T::kDType == DType::f16;
  static_assert(N == 8 || N == 16);
  if constexpr (kHalf == true && N == 8) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " QKV_R8
                 ", %32, %33, p, 1, 1, 0, 0;}"
                 : QKV_C8
                 : "l"(descriptor(a)), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == true && N == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " QKV_R16
                 ", %64, %65, p, 1, 1, 0, 0;}"
                 : QKV_C16
                 : "l"(descriptor(a)), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == false && N == 8) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " QKV_R8
                 ", %32, %33, p, 1, 1, 0, 0;}"
                 : QKV_C8
                 : "l"(descriptor(a)), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == false && N == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " QKV_R16
                 ", %64, %65, p, 1, 1, 0, 0;}"
                 : QKV_C16
                 : "l"(descriptor(a)), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  }
}

// The same with A in registers and B by its rows (as V is).
template <class T, int N>
QKV_DEVICE void multiply_columns(float (&c)[N][4], const uint32_t (&a)[4], SharedMatrix b, bool add) {
  constexpr bool kHalf = T::kDType == DType::f16;
  static_assert(N == 8 || N == 16 || N == 32);
  if constexpr (kHalf == true && N == 8) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " QKV_R8
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"
                 : QKV_C8
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == true && N == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " QKV_R16
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
                 : QKV_C16
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == true && N == 32) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 " QKV_R32
                 ", {%128, %129, %130, %131}, %132, p, 1, 1, 1;}"
                 : QKV_C32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == false && N == 8) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " QKV_R8
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"
                 : QKV_C8
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == false && N == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " QKV_R16
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
                 : QKV_C16
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  } else if constexpr (kHalf == false && N == 32) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " QKV_R32
                 ", {%128, %129, %130, %131}, %132, p, 1, 1, 1;}"
                 : QKV_C32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(add)));
  }
}

#undef QKV_C1
#undef QKV_C4
#undef QKV_C8
#undef QKV_C16
#undef QKV_C32
#undef QKV_R8
#undef QKV_R16
#undef QKV_R32

// --- who waits for whom ----------------------------------------------------------------------------------------

// What this thread wrote to shared memory, copies that it waited for included, before products read it.
QKV_DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier in shared memory of so many arrivals; it passes from phase to phase, numbered from 0.
using Barrier = uint64_t;
QKV_DEVICE void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
QKV_DEVICE void arrive(Barrier* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}
QKV_DEVICE void wait_phase(Barrier* barrier, uint32_t phase) {  // until it has passed; only its lowest bit counts
  asm volatile(
      "{.reg .pred done;\n"
      "again%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again%=;}" ::"r"(shared_address(barrier)),
      "r"(phase & 1)
      : "memory");
}

// N threads of the block meet; ids 1 ... 15.
template <int N>
QKV_DEVICE void sync_threads(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(N) : "memory");
}

template <int N>
QKV_DEVICE void arrive_threads(int id) {  // one of them, without waiting
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(N) : "memory");
}
// One of the arrivals, and so many bytes of boxes, too, have to come before the phase passes.
QKV_DEVICE void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile(
      "{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// --- the copy engine -------------------------------------------------------------------------------------------

// By one thread. What lies beyond the array comes as 0, and counts.
QKV_DEVICE void load_box(void* shared, const TensorMap& map, const BoxPlace& at, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch[0]), "r"(at.batch[1]),
      "r"(shared_address(barrier))
      : "memory");
}
// What lies beyond the array is left out. Who wrote it to shared memory has shown it, as to products.
QKV_DEVICE void store_box(const void* shared, const TensorMap& map, const BoxPlace& at) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(at.column), "r"(at.head), "r"(at.row), "r"(at.batch[0]), "r"(at.batch[1])
               : "memory");
}
QKV_DEVICE void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
QKV_DEVICE void wait_boxes_read() {  // until the shared memory of those committed may be written again
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- registers -------------------------------------------------------------------------------------------------

// The registers of each thread of a warpgroup; all of them call it.
template <int N>
QKV_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
QKV_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace qkv::inline QKV_LEVEL
