// SPDX-License-Identifier: Apache-2.0
// The project's only macros. Everything that depends on compiler flags lives in namespace qkv::QKV_LEVEL, so
// that the same inline text compiled for two CPU levels can never be merged by the linker.
#pragma once

#ifndef QKV_LEVEL
#define QKV_LEVEL base  // host code; isa/*.cc say v2, v3, v4, amx or neon; .cu files say device
#endif

#ifdef __CUDACC__
#define QKV_HD __host__ __device__
#define QKV_DEVICE __device__ __forceinline__
#define QKV_UNROLL _Pragma("unroll")
#else
#define QKV_HD
#define QKV_DEVICE inline  // the same kernel text on the host: cuda/tests/emulation
#define QKV_UNROLL
#endif

// Before loops over vectors in registers, of so many turns as the compiler knows: an index that must be a constant for
// the language takes unroll (cpu/unroll-inl.h), which takes longer to compile, a function a turn.
#ifdef __clang__
#define QKV_FLAT _Pragma("unroll")
#else
#define QKV_FLAT _Pragma("GCC unroll 64")
#endif

// Before loops that are rare: nvcc copies them four times and more, and they take longer to compile than all the rest.
#ifdef __CUDA_ARCH__
#define QKV_ROLLED _Pragma("unroll 1")
#else
#define QKV_ROLLED
#endif

#define QKV_INLINE inline __attribute__((always_inline))

namespace qkv {

inline namespace QKV_LEVEL {}  // namespace QKV_LEVEL

#ifdef QKV_MUTANTS
extern int active_mutant;  // read from QKV_MUTANT when the library loads
#endif

inline namespace QKV_LEVEL {

// Planted bugs for tests/mutants.py: the suite must notice each of them. In an ordinary build this is the
// constant false and leaves no trace in the code.
#if defined(QKV_MUTANTS) && !defined(__CUDACC__)
inline bool mutant(int id) { return id == active_mutant; }
#else
QKV_HD constexpr bool mutant(int) { return false; }
#endif

}  // namespace QKV_LEVEL
}  // namespace qkv
