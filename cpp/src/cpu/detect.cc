// SPDX-License-Identifier: Apache-2.0
#include "cpu/detect.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qkv {

#if defined(__x86_64__)
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Linux keeps no room for the 8 KiB of tile registers until a process asks, once, for all its threads.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Which register files the operating system saves: bit 2 the 256-bit ones, 5-7 the 512-bit ones, 17 and 18 tiles.
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
#if defined(QKV_EMULATED)  // tests/avx512
  const char* const dots = getenv("QKV_EMULATE_BF16");
  return v3 && (strcmp(level, "v4") == 0 || !dots || *dots != '0');
#endif
  const bool v4 = v3 && (saved_state() & 0xe6u) == 0xe6u && has(seven.b, {16, 17, 28, 30, 31});  // AVX512 F DQ CD BW VL
  if (strcmp(level, "v4") == 0) return v4;
  const bool zen4 = v4 && has(cpuid(7, 1).a, {5});  // AVX512_BF16
  if (strcmp(level, "zen4") == 0) return zen4;
  return strcmp(level, "amx") == 0 && zen4 && has(seven.d, {22, 24}) &&  // AMX-BF16 AMX-TILE
         (saved_state() & 0x60000u) == 0x60000u && may_use_tiles();
}
#else
bool cpu_runs(const char* level) { return strcmp(level, "neon") == 0; }
#endif

}  // namespace qkv
