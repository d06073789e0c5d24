// SPDX-License-Identifier: Apache-2.0
// The C++ API.
#pragma once

#include <string>

#include "qkv/alignment.h"
#include "qkv/backend.h"
#include "qkv/error.h"
#include "qkv/layers.h"
#include "qkv/problem.h"
#include "qkv/rotation.h"

namespace qkv {

// Validate, select a backend ("auto", "cpu", "cuda", "reference") and run. Throws before anything is written.
void run(const Problem&, const std::string& backend);

// Every check of shapes, ranges and indices that does not need to know where the arrays came from.
void validate(const Problem&);

// n partial results over disjoint keys -> one. outs[t] is (rows, Dv), lses[t] (rows,), both of type A.
struct MergeProblem {
  int64_t n, rows, Dv;
  const void* const* outs;
  const void* const* lses;
  DType dtype, lse_dtype;  // of outs and out; of lses and lse
  void* out;
  void* lse;
};
void merge(const MergeProblem&);

// Energies, and scores of chunks, become alignments: on the CPU but for "cuda".
void align(const Alignment&, const std::string& backend);

// A layer's steps on arrays in GPU memory; nothing waits.
void run(const Linear&);
void run(const Norm&);
void run(const Elementwise&);
std::string describe(const Linear&);

// Rotary embedding of rows: always on the CPU.
void rotate(const Rotation&);

// --- the CPU backend's knobs ---------------------------------------------------------------------------------
std::vector<std::string> cpu_levels();         // compiled in and runnable here, worst to best
std::string cpu_level();                       // in use; QKV_CPU_LEVEL chooses when the library loads
void set_cpu_level(const std::string& level);  // ValueError for an unknown one
int get_num_threads();                         // what a call from this thread may use
void set_num_threads(int n);

// Micro-benchmarks of the machine's limits at the level in use, on that many threads.
double fma_peak(DType dtype, int threads);          // FLOP/s
double read_bandwidth(int64_t bytes, int threads);  // bytes/s

}  // namespace qkv
