// SPDX-License-Identifier: Apache-2.0
// Tile registers (AMX), where the level has them; else the same names without an effect.
#pragma once

#include "cpu/pair-simd-inl.h"

namespace qkv::inline QKV_LEVEL {

// Eight registers of 16 rows of 64 bytes. C[16][16] += A[16][16 pairs] B[16 pairs][16].
#if defined(__AMX_BF16__) && defined(QKV_EMULATED)
constexpr bool kTileUnit = true;
struct TileUnit {
  const bool before = emulated::tiles.on;
  explicit TileUnit(bool needed) { emulated::tiles.on = needed; }
  ~TileUnit() { emulated::tiles.on = before; }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};
template <int T>
QKV_INLINE void tile_load_once(const void* p, int64_t row_bytes) {
  emulated::tile_load(T, p, row_bytes);
}
template <int T>
QKV_INLINE void tile_load(const void* p, int64_t row_bytes) {
  emulated::tile_load(T, p, row_bytes);
}
template <int T>
QKV_INLINE void tile_store(void* p, int64_t row_bytes) {
  emulated::tile_store(T, p, row_bytes);
}
template <int T>
QKV_INLINE void tile_zero() {
  emulated::tile_zero(T);
}
template <int C, int A, int B>
QKV_INLINE void tile_dot() {
  emulated::tile_dot(C, A, B);
}
#elif defined(__AMX_BF16__)
constexpr bool kTileUnit = true;
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Sets up the calling thread's tile registers, and back: others leave theirs behind, a task may run in another's poll.
struct TileUnit {
  const bool on;
  TileConfig before;
  explicit TileUnit(bool needed) : on(needed) {
    if (!on) return;
    const TileConfig config;
    asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before) : "m"(config));
  }
  ~TileUnit() {
    if (!on) return;
    if (before.palette != 0) asm volatile("ldtilecfg %0" : : "m"(before));
    else asm volatile("tilerelease");
  }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};
template <int T>  // of what will not be needed again soon
QKV_INLINE void tile_load_once(const void* p, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
QKV_INLINE void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
QKV_INLINE void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
QKV_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int C, int A, int B>
QKV_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#else
constexpr bool kTileUnit = false;
struct TileUnit {
  explicit TileUnit(bool) {}
};
template <int>
QKV_INLINE void tile_load_once(const void*, int64_t) {}
template <int>
QKV_INLINE void tile_load(const void*, int64_t) {}
template <int>
QKV_INLINE void tile_store(void*, int64_t) {}
template <int>
QKV_INLINE void tile_zero() {}
template <int, int, int>
QKV_INLINE void tile_dot() {}
#endif

}  // namespace qkv::inline QKV_LEVEL
