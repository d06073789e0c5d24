// SPDX-License-Identifier: Apache-2.0
// The policies that CPU and CUDA share, held against brute force without Python: additive.h, dtype.h, mask.h,
// softmax.h, dropout.h, and the transposes, functions and thresholds of every level that this file is compiled for
// (-DQKV_LEVEL=..., -march=...). Exits with the number of failures; tests/test_cpp.py compiles and runs it.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu/entry-inl.h"

namespace qkv {
namespace {

using namespace QKV_LEVEL;

int failures = 0;
void check(bool ok, const char* what, double a = 0, double b = 0) {
  if (ok) return;
  if (++failures < 20) printf("FAILED %s (%.17g, %.17g)\n", what, a, b);
}

uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }
int64_t random_below(int64_t n) { return static_cast<int64_t>(random_bits() >> 8) % n; }

void test_half() {  // every float16, there and back; and every midpoint rounds to even
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const auto x = static_cast<uint16_t>(h);
    const float f = f16_to_float(x);
    if (f != f) {
      const uint16_t back = double_to_f16(f);
      check((back & 0x7c00) == 0x7c00 && (back & 0x3ff) != 0, "f16 NaN stays NaN");
    } else {
      check(double_to_f16(f) == x, "f16 round trip", f);
    }
    if ((x & 0x7fff) < 0x7bff) {
      const double middle = (static_cast<double>(f) + f16_to_float(static_cast<uint16_t>(x + 1))) / 2;
      check(double_to_f16(middle) == (x % 2 == 0 ? x : x + 1), "f16 ties to even", middle);
    }
    const float b = bf16_to_float(x);
    if (b == b) check(float_to_bf16(b) == x, "bf16 round trip", b);
    else check(bf16_to_float(float_to_bf16(b)) != bf16_to_float(float_to_bf16(b)), "bf16 NaN stays NaN");
  }
}

void test_masks() {  // random programs: bits against the leaves, cover against bits
  const int64_t ids[40] = {0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 0, 0, 1, 1, 5, 5, 5, 5, 5, 5};
  const int64_t some[3] = {2, 17, 40}, blocks[12] = {1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1};
  const MaskNode leaves[] = {{MaskOp::All, 0, 0, nullptr, 0},        {MaskOp::Band, kUnbounded, 0, nullptr, 0},
                             {MaskOp::Band, 5, 3, nullptr, 0},       {MaskOp::Prefix, 21, 0, nullptr, 0},
                             {MaskOp::Document, 0, 0, ids, 40},      {MaskOp::Global, 0, 0, some, 3},
                             {MaskOp::Strided, 3, 0, nullptr, 0},    {MaskOp::Dilated, 4, 2, nullptr, 0},
                             {MaskOp::BlockSparse, 7, 4, blocks, 12}};
  constexpr int kinds = sizeof(leaves) / sizeof(leaves[0]);
  for (int round = 0; round < 400; ++round) {
    const MaskNode &x = leaves[random_below(kinds)], &y = leaves[random_below(kinds)];
    const bool negate = random_below(2), both = random_below(2);
    MaskNode nodes[4] = {x, y, {both ? MaskOp::And : MaskOp::Or, 0, 0, nullptr, 0}, {MaskOp::Not, 0, 0, nullptr, 0}};
    const MaskProgram program{nodes, negate ? 4 : 3};
    const auto expected = [&](int64_t p, int64_t j) {
      const bool a = leaf_visible(x, 0, p, j), b = leaf_visible(y, 0, p, j);
      return (both ? a && b : a || b) != negate;
    };
    const int64_t p0 = random_below(60) - 10, j0 = random_below(50);
    const Rect r{p0, p0 + random_below(12), j0, j0 + random_below(32)};
    bool any_seen = false, all_seen = true;
    for (int64_t p = r.p0; p <= r.p1; ++p) {
      const uint32_t bits = mask_bits(program, 0, p, r.j0);
      for (int64_t j = r.j0; j <= r.j1; ++j) {
        const bool seen = bits >> (j - r.j0) & 1u;
        check(seen == expected(p, j), "mask bits", static_cast<double>(p), static_cast<double>(j));
        any_seen = any_seen || seen;
        all_seen = all_seen && seen;
      }
    }
    const Cover cover = mask_cover(program, 0, r);
    if (cover == Cover::All) check(all_seen, "cover promised all");
    if (cover == Cover::None) check(!any_seen, "cover promised none");
  }
}

void test_softmax_state() {  // merging in any grouping is the sum
  for (int round = 0; round < 200; ++round) {
    double s[6], total = 0;
    for (double& x : s) {
      x = random_below(4) == 0 ? -HUGE_VAL : static_cast<double>(random_below(2000)) / 100 - 10;
      total += exp(x);
    }
    SoftmaxState left, right, all;
    for (int i = 0; i < 6; ++i) (i < 3 ? left : right).merge({s[i], 1});
    all.merge(right);
    all.merge(left);
    if (total == 0) check(all.lse() == -HUGE_VAL, "an empty state has lse -inf");
    else check(fabs(all.lse() - log(total)) < 1e-13, "merge", all.lse(), log(total));
  }
}

void test_philox() {  // known answers of Random123
  const Philox a = philox(0, 0, 0, 0, 0, 0);
  check(a.word[0] == 0x6627e8d5u && a.word[3] == 0x9b00dbd8u, "philox of zeros");
  const Philox b = philox(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u);
  check(b.word[0] == 0xd16cfe09u && b.word[1] == 0x94fdccebu && b.word[2] == 0x5001e420u && b.word[3] == 0x24126ea1u,
        "philox of the digits of pi");
  for (int round = 0; round < 200; ++round) {
    const int64_t j = random_below(1000), i = random_below(1000);
    const Dropout d = make_dropout(0.25, random_bits());
    check(dropout_keeps(d, 1, 2, i, j) == (dropout_words(d.seed, 1, 2, i, j / 4 * 4).word[j % 4] >= 0x40000000u),
          "dropout keeps");
  }
}

// Rows of every kind in the lanes: the weights sum to 1, the others' keys are below the threshold, and a lane alone has
// the same bits.
template <class A>
void test_threshold(Normalizer kind) {
  constexpr int L = 2 * kLanes<A>;
  static A y[700 * L], alone[700 * L];
  for (int round = 0; round < 60; ++round) {
    const int64_t n = 1 + random_below(700);
    for (int i = 0; i < L; ++i) {
      const int spread = static_cast<int>(random_below(12));
      for (int64_t r = 0; r < n; ++r) {
        const A x = -static_cast<A>(random_below(1 << 20)) / static_cast<A>(1 << 20);
        const A far = static_cast<A>(1.9 * static_cast<double>(r) / static_cast<double>(n));
        y[r * L + i] = r == 0 ? 0 : (spread == 11 ? -far * far : ldexp(x, 3 - spread));
      }
    }
    bool searched[L], one[L] = {};
    for (int i = 0; i < L; ++i) searched[i] = i % 7 != 3;
    const A h = kind == Normalizer::sparsemax ? 1 : static_cast<A>(0.5);
    Threshold<A, 2> found, single;
    threshold<A, 2>(kind, y, n, h, searched, found);
    const int lane = static_cast<int>(random_below((L + 6) / 7)) * 7;
    for (int64_t r = 0; r < n; ++r) {
      for (int i = 0; i < L; ++i) alone[r * L + i] = i == lane ? y[r * L + i] : -kInf<A>;
    }
    one[lane] = true;
    threshold<A, 2>(kind, alone, n, h, one, single);
    for (int i = 0; i < L; ++i) {
      const A t = found.t[i / kLanes<A>][i % kLanes<A>], rest = found.rest[i / kLanes<A>][i % kLanes<A>];
      if (!searched[i]) {
        check(t == 0 && rest == 0, "a lane that is not searched");
        continue;
      }
      if (i == lane) {
        check(t == single.t[i / kLanes<A>][i % kLanes<A>] && rest == single.rest[i / kLanes<A>][i % kLanes<A>],
              "a lane depends on itself", t, rest);
      }
      double sum = 0;
      for (int64_t r = 0; r < n; ++r) {
        const double d = static_cast<double>(h) * y[r * L + i] - t - static_cast<double>(rest);
        if (d > 0) sum += kind == Normalizer::sparsemax ? d : d * d;
      }
      const double u = sizeof(A) == 4 ? 0x1p-24 : 0x1p-53;
      check(fabs(sum - 1) < 16 * u * sqrt(static_cast<double>(n)), "weights sum to 1", sum - 1, static_cast<double>(n));
    }
  }
}

template <class A>
void test_level() {
  constexpr int w = kLanes<A>;
  Vec<A> x[w];
  for (int i = 0; i < w; ++i) {
    for (int j = 0; j < w; ++j) x[i][j] = static_cast<A>(i * w + j);
  }
  transpose<A>(x);
  for (int i = 0; i < w; ++i) {
    for (int j = 0; j < w; ++j) check(x[i][j] == static_cast<A>(j * w + i), "transpose");
  }
  uint32_t bits[32], before[32];
  for (int i = 0; i < 32; ++i) before[i] = bits[i] = random_bits();
  transpose_bits(bits);
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 32; ++j) check((bits[i] >> j & 1) == (before[j] >> i & 1), "transpose_bits");
  }
  // Relative errors in units of u: the polynomial's and a few roundings.
  const double u = sizeof(A) == 4 ? 0x1p-24 : 0x1p-53;
  for (int i = 0; i <= 200000; ++i) {
    const A t = static_cast<A>(-i) / 1700, e = static_cast<A>(i - 100000) / 7000;
    const double y = qkv::QKV_LEVEL::exp2(splat(t))[0], r = ::exp2(static_cast<double>(t));
    check(fabs(y - r) <= 6 * u * r, "exp2", t, (y - r) / r / u);
    const double h = qkv::QKV_LEVEL::tanh<A>(splat(e))[0], g = ::tanh(static_cast<double>(e));
    check(fabs(h - g) <= 6 * u * fabs(g), "tanh", e, (h - g) / g / u);
  }
  check(qkv::QKV_LEVEL::exp2(splat(A{0}))[0] == 1, "exp2(0) is 1");
  check(qkv::QKV_LEVEL::exp2(splat(-kInf<A>))[0] == 0, "exp2(-inf) is 0");
  check(qkv::QKV_LEVEL::exp2(splat(A{-2000}))[0] == 0, "exp2 below the range is 0");
  const A nan = static_cast<A>(__builtin_nan(""));
  check(!(qkv::QKV_LEVEL::exp2(splat(nan))[0] <= kInf<A>), "exp2(NaN) is NaN");
  check(!(qkv::QKV_LEVEL::tanh<A>(splat(nan))[0] <= kInf<A>), "tanh(NaN) is NaN");
  check(!(maximum(splat(A{1}), splat(nan))[0] <= kInf<A>), "maximum lets a NaN through");
}

void test_inverse_unit() {  // the largest weight's inverse is in (2^-31, 2^-30], and the unit a power of two
  for (int e = -90; e < 30; ++e) {
    for (int i = 0; i < 4; ++i) {
      const float most = ldexpf(i < 3 ? 1 + 0.3f * static_cast<float>(i) : 0x1.fffffep0f, e);
      const InverseUnit x = inverse_unit(most);
      int ignored;
      check(x.usual && frexpf(x.unit, &ignored) == 0.5f, "the unit is a power of two", most, x.unit);
      check(x.unit / most > 0x1p-31f && x.unit / most <= 0x1p-30f, "range of the largest weight", most, x.unit);
    }
  }
  check(inverse_unit(0).usual && inverse_unit(0x1p30f).usual, "weights of 0 and of 2^30");
  const float odd[] = {0x1.fffffep-91f, 0x1.000002p30f, HUGE_VALF, nanf("")};
  for (const float x : odd) check(!inverse_unit(x).usual, "weights without a unit", x);
}

}  // namespace
}  // namespace qkv

int main() {
  qkv::test_half();
  qkv::test_masks();
  qkv::test_softmax_state();
  qkv::test_philox();
  qkv::test_inverse_unit();
  qkv::test_threshold<float>(qkv::Normalizer::sparsemax);
  qkv::test_threshold<float>(qkv::Normalizer::entmax15);
  qkv::test_threshold<double>(qkv::Normalizer::sparsemax);
  qkv::test_threshold<double>(qkv::Normalizer::entmax15);
  qkv::test_level<float>();
  qkv::test_level<double>();
  printf("%d failures\n", qkv::failures);
  return qkv::failures != 0;
}
