// SPDX-License-Identifier: Apache-2.0
// Additive scores in float: the identity that all kernels compute them by, and where it ends.
//
//     s = sum over d of w_d tanh(q_d + k_d)
//     w tanh(a + b) = w - 2 / z  with  z = c + (c e^2b) e^2a,  c = 1 / w
//
// The exponentials are made once per query and, times c, once per key of a tile or task; a term then costs a
// multiply-add, and four share a reciprocal:
//     1 / z0 + 1 / z1 = (z0 + z1) / (z0 z1),  S / P + S' / P' = (S P' + S' P) / (P P').
// No argument is clamped: large ones of opposite sign cancel, and tanh(60 - 59.5) is far from 0.
//
// Range      c is scaled by a power of two, the unit, such that the largest w has 2^-31 < c <= 2^-30, and the product
//            of four z is above 2^-124. |z| is kept below 2^31 and the product below 2^124: a term that small is off
//            by less than 2^-62 of the largest w. A w whose c would be above 1 counts as 0, if all such sum to less
//            than u max |w|.
// Near       Where query and key have |a| <= kNear everywhere, z needs no limit: the same bits, sooner.
// Far        A query or key with |a| > kFar somewhere, or not finite, takes tanh itself, and so do all where some w are
//            too large or too small for that. That is decided for each pair of a query and a key by the two alone: a
//            row must not depend on its neighbours.
// Zero       The sum at tanh = 0 is computed by the same operations, so a score of exactly 0 is exact.
// Numerics   |ds| <= |scale| (27 |w| + (3/2 sqrt(D) + 3) sum |w|) u: python/qkv/_bounds.py has the parts.
// References Bahdanau, Cho & Bengio 2014 (arXiv 1409.0473).
#pragma once

#include <math.h>

#include "qkv/platform.h"

namespace qkv::inline QKV_LEVEL {

constexpr float kNear = 5.3f;            // e^(4 kNear) is below kMostDivisor
constexpr float kFar = 32;               // c e^64 and c e^-64 are normal numbers
constexpr float kMostDivisor = 0x1p31f;  // of |z|
constexpr float kNegligible = 0x1p-24f;  // of the largest w: what all that count as 0 may sum to

struct InverseUnit {
  float unit;  // 2^(e - 31), of a largest |w| in [2^(e - 1), 2^e)
  bool usual;  // false: some w is not finite, or the largest is too large or too small
};

// most: the largest |w|; infinite or NaN where one is.
QKV_HD inline InverseUnit inverse_unit(float most) {
  InverseUnit x{0, most <= 0x1p30f && (most >= 0x1p-90f || most == 0)};
  int exponent = 0;
  if (x.usual && most > 0) frexp(static_cast<double>(most), &exponent);
  x.unit = static_cast<float>(ldexp(1.0, exponent - 31));
  return x;
}

}  // namespace qkv::inline QKV_LEVEL
