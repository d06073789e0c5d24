// SPDX-License-Identifier: Apache-2.0
// What one CPU level provides: functions over plain structs, nothing else leaves its namespace.
#pragma once

#include "qkv/alignment.h"
#include "qkv/problem.h"
#include "qkv/rotation.h"

namespace qkv {

// What a row sees on average, as far as it can be told from a mask program without walking over the keys.
struct KeysSeen {
  int64_t before, after;  // the nearest so many
  int64_t document;       // of so many that belong together
  double share;           // so much of those; 0: not known
};

constexpr int kScratchArrays = 18;

struct Plan {                          // how a problem is cut into tasks
  int64_t threads;                     // that are expected to share them
  int64_t groups;                      // kv heads, or the heads asked for
  int64_t group_size;                  // query heads in the lanes of one task
  int64_t task_rows;                   // rows of a chunk
  int64_t chunks;                      // of the rows of a group; 0 where parts do all rows
  int64_t parts;                       // the most that the keys of a sequence with few queries are cut into; 0: of none
  int64_t part_heads;                  // groups of a task of parts
  int64_t part_run;                    // parts of one
  int64_t part_sets, part_runs;        // how many such tasks its groups and its parts are
  int64_t part_tasks;                  // the first of the tasks
  int64_t partial_size;                // values that a part of a group leaves behind
  int64_t worker_rows;                 // rows a worker has room for
  int64_t tasks;                       // all of them
  int64_t merges;                      // tasks of a second round, usually none
  int64_t scratch_bytes;               // per worker, a multiple of 64
  int64_t scratch_at[kScratchArrays];  // where its arrays are, in values
  int64_t partials_bytes;              // for all workers together, a multiple of 64
  KeysSeen keys_seen;
  double fold, rest;  // the scale of scores, cut into two factors (ScoreRule)
  bool pairs;         // the problem is of bfloat16, which the processor multiplies in pairs
};

struct Choice {        // for explain(): the kernel of the sequence with the most rows
  const char* kernel;  // which product, and what is in its lanes
  int lanes;           // of a tile
  const char* level;   // where another level's kernels run; else nullptr
};

struct KernelTable {
  const char* level;
  bool dots;  // of bfloat16: the processor has the instruction
  int vector_bytes;
  int keys;  // per block, for explain()
  // For so many threads. What a row's result is does not depend on the plan.
  Plan (*plan)(const Problem&, int threads, bool dots);
  Choice (*choose)(const Problem&, bool dots);
  void (*run_task)(const Problem&, const Plan&, int64_t task, void* scratch, void* partials, int worker);
  void (*run_merge)(const Problem&, const Plan&, int64_t task, void* scratch, const void* partials);
  int64_t (*align_bytes)(const Alignment&);  // scratch per worker
  void (*align)(const Alignment&, int64_t head, void* scratch);
  void (*rotate)(const Rotation&, int64_t first, int64_t end, void* scratch);  // those rows of all; 2 D of A
  double (*fma_loop)(DType, int64_t steps, bool dots);   // runs steps of independent fma and returns the FLOPs done
  double (*read_loop)(const char* data, int64_t bytes);  // reads it all; the value only defeats the optimiser
};

extern const KernelTable v4_table;

}  // namespace qkv
