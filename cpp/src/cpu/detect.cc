// SPDX-License-Identifier: Apache-2.0
#include "cpu/detect.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qkv {

#if defined(__x86_64__)
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf) {
  Registers r;
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Which register files the operating system saves: bit 2 the 256-bit ones, bits 5-7 the 512-bit ones.
unsigned saved_state() {
  unsigned lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return lo;
}

bool has(unsigned word, std::initializer_list<int> bits) {
  for (const int b : bits) {
    if (!(word >> b & 1)) return false;
  }
  return true;
}

}  // namespace

bool cpu_runs(const char* level) {
  const Registers one = cpuid(1), seven = cpuid(7), extended = cpuid(0x80000001u);
  const bool v2 = has(one.c, {0, 9, 13, 19, 20, 23});  // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT
  if (strcmp(level, "v2") == 0) return v2;
  const bool saves = has(one.c, {27});                                                          // OSXSAVE
  const bool v3 = v2 && saves && (saved_state() & 6u) == 6u && has(one.c, {12, 22, 28, 29}) &&  // FMA MOVBE AVX F16C
                  has(seven.b, {3, 5, 8}) && has(extended.c, {5});                              // BMI1 AVX2 BMI2 LZCNT
  if (strcmp(level, "v3") == 0) return v3;
  return strcmp(level, "v4") == 0 && v3 && (saved_state() & 0xe6u) == 0xe6u &&
         has(seven.b, {16, 17, 28, 30, 31});  // AVX512 F DQ CD BW VL
}
#else
bool cpu_runs(const char* level) { return strcmp(level, "neon") == 0; }
#endif

}  // namespace qkv
