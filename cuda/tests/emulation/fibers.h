// SPDX-License-Identifier: Apache-2.0
// A block of GPU threads on one host thread: each is a fiber that runs until it meets the others at a barrier or in an
// instruction of the whole warp. Warps and lanes take turns in an order that changes from turn to turn, so that text
// which leans on an order fails.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulation {

constexpr int kMaxThreads = 512;

using Program = void (*)(void* context);

// Runs program(context) on so many fibers to their end. Ends the process with a message if they wait for each other
// forever: a barrier that not all of them reach.
void run_block(int threads, Program program, void* context);

int current_thread();

// The fiber waits until all fibers of its warp (of the block) have come here; each brings a pointer, and the last one
// runs combine(pointers, n) before all go on. kind tells instructions apart: fibers that meet in different ones are
// an error.
using Combine = void (*)(void** brought, int n);
void meet_warp(const char* kind, void* brought, Combine combine);
void meet_block(const char* kind, void* brought, Combine combine);
void meet_group(const char* kind, void* brought, Combine combine);  // four warps
void meet_some(const char* kind, int id, int n);                    // any n fibers that name the same id, below 16
void arrive_some(const char* kind, int id, int n);                  // one of them, which does not wait
// Barriers in shared memory: arrivals of a phase, those that are missing, phase: 16, 16, 32 bits.
void arrive_at(uint64_t* barrier);
void waited_at(uint64_t* barrier);
void pause();  // others take their turn

[[noreturn]] void fail(const char* message);

}  // namespace emulation
