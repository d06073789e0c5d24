// SPDX-License-Identifier: Apache-2.0
// What one CPU level provides: functions over plain structs, nothing else leaves its namespace.
#pragma once

#include "qkv/problem.h"

namespace qkv {

struct KernelTable {
  const char* level;
  int vector_bytes;
  int task_rows, keys;  // tile sizes, for explain()
  int64_t (*task_count)(const Problem&);
  int64_t (*merge_count)(const Problem&);    // tasks of a second round, usually none
  int64_t (*scratch_bytes)(const Problem&);  // per worker, a multiple of 64
  int64_t (*partial_bytes)(const Problem&);  // for all workers together, a multiple of 64
  void (*run_task)(const Problem&, int64_t task, void* scratch, void* partials, int worker);
  void (*run_merge)(const Problem&, int64_t task, void* scratch, void* partials, int worker);
  double (*fma_loop)(DType, int64_t steps);              // runs steps of independent fma and returns the FLOPs done
  double (*read_loop)(const char* data, int64_t bytes);  // reads it all; the value only defeats the optimiser
};

}  // namespace qkv
