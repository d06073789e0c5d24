// SPDX-License-Identifier: Apache-2.0
// Is every access to shared memory in order with those of other threads? Only a barrier of the block orders them: lanes
// that run in one warp, shuffles and votes do not. For each byte the last accesses since the last barrier are known;
// two by different threads, of which one writes, end the process with a message, whatever order they came in. So do a
// read of what no thread of the block wrote, and any access to where an asynchronous copy is under way.
//
// Barriers in shared memory (mbarrier) order whoever waits; here each that passes counts as one of the block, so that
// of kernels which have some less is seen.
//
// Ordinary accesses are seen where kernels are compiled with -fsanitize=thread (tests/emulated_cuda.py, races=True):
// the compiler then calls a function at each, here of races.cc instead of libtsan. Atomics and copies are always seen.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulation {

void watch_shared(const void* shared, size_t bytes);  // of a new block, whose bytes nobody wrote
void pass_barrier();                                  // all threads of the block

void copy_begins(void* shared, size_t bytes);             // by the current thread
void copy_lands(void* shared, size_t bytes, int thread);  // which began it; when somebody has waited for it

// Atomics of any memory.
void min_at(int64_t* at, int64_t x);
void max_at(int64_t* at, int64_t x);
void or_at(uint32_t* at, uint32_t x);

}  // namespace emulation
