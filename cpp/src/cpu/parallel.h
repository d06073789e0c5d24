// SPDX-License-Identifier: Apache-2.0
// Threads. parallel.cc is the only file that knows OpenMP.
//
// One team of workers serves the whole process. OpenMP makes it (once, in a parallel region that never ends, led
// by a thread of its own, so OMP_PLACES and OMP_PROC_BIND hold) and is the source of limits; work is handed over
// by a futex per worker. Why not a region per call: libgomp keeps a pool per calling thread, so the threads of a
// process would grow with its callers times the limit; how its idle threads wait is fixed when it loads; a region in
// a forked child hangs. Here a process has at most limit - 1 workers plus its callers, a caller that finds all
// workers busy does its work alone, and a forked child makes a fresh team.
#pragma once

#include <stdint.h>

#include "qkv/problem.h"

namespace qkv {

// run(context, task, worker) for task = 0 ... count - 1, in that order of starting, on at most width threads
// (worker < width); the caller is worker 0. Must not throw. Ends early when control says stop.
using TaskFunction = void (*)(void* context, int64_t task, int worker);
void parallel_for(int64_t count, int width, TaskFunction run, void* context, Control* control);

// min(set_num_threads, the calling thread's omp_get_max_threads(), cores this process may use now).
int thread_limit();
void set_thread_limit(int n);

}  // namespace qkv
