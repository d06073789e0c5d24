// SPDX-License-Identifier: Apache-2.0
// The project's only macros. Everything that depends on compiler flags lives in namespace qkv::QKV_LEVEL, so
// that the same inline text compiled for two CPU levels can never be merged by the linker.
#pragma once

#ifndef QKV_LEVEL
#define QKV_LEVEL base  // host code; isa/*.cc say v2, v3, v4 or neon; .cu files say device
#endif

#ifdef __CUDACC__
#define QKV_HD __host__ __device__
#else
#define QKV_HD
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
#ifdef QKV_MUTANTS
inline bool mutant(int id) { return id == active_mutant; }
#else
constexpr bool mutant(int) { return false; }
#endif

}  // namespace QKV_LEVEL
}  // namespace qkv
