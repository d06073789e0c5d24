// SPDX-License-Identifier: Apache-2.0
// Element types, and the scalar conversions that every level without hardware support shares.
#pragma once

#include <stdint.h>

#include "qkv/platform.h"

namespace qkv {

enum class DType : int32_t { f64, f32, f16, bf16, boolean, i64 };

inline namespace QKV_LEVEL {

QKV_HD constexpr int64_t itemsize(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::boolean: return 1;
  }
  return 0;
}

QKV_HD constexpr const char* name(DType t) {
  switch (t) {
    case DType::f64: return "float64";
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::boolean: return "bool";
    case DType::i64: return "int64";
  }
  return "?";
}

template <class To, class From>
QKV_HD QKV_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

QKV_HD QKV_INLINE float bf16_to_float(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
QKV_HD QKV_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  if (mutant(8)) return static_cast<uint16_t>(u >> 16);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

QKV_HD QKV_INLINE float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Shifted into place the exponent is 112 too small; the product corrects it, denormals included.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

// Rounds once, from double, so that a float64 intermediate is never rounded twice.
QKV_HD QKV_INLINE uint16_t double_to_f16(double x) {
  const uint64_t u = bit_cast<uint64_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 48) & 0x8000u);
  const double a = bit_cast<double>(u & 0x7fffffffffffffffull);
  if (a != a) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x1p-14) {  // the sum's last place is 2^-24: the rounding to a denormal happens in the addition
    return static_cast<uint16_t>(sign | (bit_cast<uint64_t>(a + 0x1p28) - bit_cast<uint64_t>(0x1p28)));
  }
  const uint64_t m = bit_cast<uint64_t>(a);
  const uint64_t rounded = m + 0x1ffffffffffull + ((m >> 42) & 1u);  // keep 10 bits of the mantissa
  return static_cast<uint16_t>(sign | ((rounded >> 42) - (static_cast<uint64_t>(1023 - 15) << 10)));
}

// Element i of a contiguous buffer of type t, as double (exact for every supported type).
QKV_HD QKV_INLINE double load_as_double(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f16: return f16_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::boolean: return static_cast<const uint8_t*>(p)[i] != 0;
    case DType::i64: return static_cast<double>(static_cast<const int64_t*>(p)[i]);
  }
  return 0;
}

// bfloat16 is rounded through float: double rounding costs at most half an ulp of float more.
QKV_HD QKV_INLINE void store_from_double(void* p, DType t, int64_t i, double x) {
  switch (t) {
    case DType::f64: static_cast<double*>(p)[i] = x; break;
    case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(x); break;
    case DType::f16: static_cast<uint16_t*>(p)[i] = double_to_f16(x); break;
    case DType::bf16: static_cast<uint16_t*>(p)[i] = float_to_bf16(static_cast<float>(x)); break;
    default: break;
  }
}

}  // namespace QKV_LEVEL
}  // namespace qkv
