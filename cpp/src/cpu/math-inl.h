// SPDX-License-Identifier: Apache-2.0
// exp2 and tanh on vectors. Errors are relative, over the whole range, before the last rounding.
#pragma once

#include "cpu/simd.h"

namespace qkv::inline QKV_LEVEL {

// Minimax polynomials for 2^f on [0, 1), with p(0) = 1 exactly so that equal scores have equal, exact weights:
// degree 5, 2^-23.5 (float); degree 11, 2^-58.1 (double).
QKV_INLINE F exp2_polynomial(F f) {
  F p = splat(1.8671302823e-03f);
  p = fma(p, f, splat(9.0170297772e-03f));
  p = fma(p, f, splat(5.5799912661e-02f));
  p = fma(p, f, splat(2.4016444385e-01f));
  p = fma(p, f, splat(6.9315129519e-01f));
  return fma(p, f, splat(1.0f));
}
// 2^t: exactly +0 below the normal range and for -inf (a masked weight is exactly 0), NaN for NaN. t must be
// below 127 (1023): softmax never asks for more.
#if defined(__AVX512F__)
// reduce gives t - floor(t), and 0 for -inf; scalef multiplies by 2^floor(t). The mask: a subnormal weight would slow
// each fma that meets it a hundredfold.
QKV_INLINE F exp2(F t) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(normal, (__m512)exp2_polynomial((F)_mm512_reduce_ps((__m512)t, 9)), (__m512)t);
}
// 2^(a b), the product not rounded. n is a b to the nearest 16th: x counts them in its low bits, of which the last four
// look up 2^(i/16). What is left, at most a 32nd, takes six degrees instead of eleven: 2^-56.8, and exact at 0. Where n
// is the least normal power the result may be a 32nd of a power below it, subnormal.
QKV_INLINE D exp2_product(D a, D b) {
  constexpr double kSixteenths = 0x1.8p48;
  const D low{0x1p0,
              0x1.0b5586cf9890fp0,
              0x1.172b83c7d517bp0,
              0x1.2387a6e756238p0,
              0x1.306fe0a31b715p0,
              0x1.3dea64c123422p0,
              0x1.4bfdad5362a27p0,
              0x1.5ab07dd485429p0};
  const D high{0x1.6a09e667f3bcdp0, 0x1.7a11473eb0187p0, 0x1.8ace5422aa0dbp0, 0x1.9c49182a3f090p0,
               0x1.ae89f995ad3adp0, 0x1.c199bdd85529cp0, 0x1.d5818dcfba487p0, 0x1.ea4afa2a490dap0};
  const D x = fma(a, b, splat(kSixteenths)), n = x - splat(kSixteenths), f = fma(a, b, -n);
  const D root = (D)_mm512_permutex2var_pd((__m512d)low, (__m512i)x, (__m512d)high);
  D p = splat(1.5403756245457708718e-4);
  p = fma(p, f, splat(1.3333818815389239315e-3));
  p = fma(p, f, splat(9.6181291065256816657e-3));
  p = fma(p, f, splat(5.5504108652093572248e-2));
  p = fma(p, f, splat(2.4022650695910084695e-1));
  p = fma(p, f, splat(6.9314718055994686313e-1));
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)n, _mm512_set1_pd(-1022), _CMP_NLT_UQ);
  return (D)_mm512_maskz_scalef_pd(normal, (__m512d)fma(root * f, p, root), (__m512d)n);
}
QKV_INLINE D exp2(D t) { return exp2_product(t, splat(1.0)); }
QKV_INLINE F exp2_product(F a, F b) { return exp2(a * b); }
#else
QKV_INLINE D exp2_polynomial(D f) {
  D p = splat(6.2634646280886273577e-10);
  p = fma(p, f, splat(6.5595301931503004244e-9));
  p = fma(p, f, splat(1.0253212219093685786e-7));
  p = fma(p, f, splat(1.3208367319526269685e-6));
  p = fma(p, f, splat(1.5253175052870719973e-5));
  p = fma(p, f, splat(1.5403512309781894472e-4));
  p = fma(p, f, splat(1.3333558629561104517e-3));
  p = fma(p, f, splat(9.6181290995509270552e-3));
  p = fma(p, f, splat(5.5504108665602235161e-2));
  p = fma(p, f, splat(2.4022650695906330334e-1));
  p = fma(p, f, splat(6.9314718055994592839e-1));
  return fma(p, f, splat(1.0));
}
QKV_INLINE F exp2(F t) {
  const F n = floor(t);
  const IntVec<float> bits = (IntVec<float>)(n + splat(12582912.0f + 127.0f)) << 23;  // 2^n
  const F y = exp2_polynomial(t - n) * (F)bits;
  return t < splat(-126.0f) ? F{} : y;
}
QKV_INLINE D exp2(D t) {
  const D n = floor(t);
  const IntVec<double> bits = (IntVec<double>)(n + splat(6755399441055744.0 + 1023.0)) << 52;
  const D y = exp2_polynomial(t - n) * (D)bits;
  return t < splat(-1022.0) ? D{} : y;
}
QKV_INLINE F exp2_product(F a, F b) { return exp2(a * b); }
QKV_INLINE D exp2_product(D a, D b) { return exp2(a * b); }
#endif

// tanh x = x + x^3 P(x^2) (/ Q(x^2)) below 0.625, 1 - 2 / (e^2x + 1) above: about 2 ulp (Moshier, Cephes).
template <class A>
QKV_INLINE Vec<A> tanh(Vec<A> x) {
  constexpr A kLog2e = static_cast<A>(1.4426950408889634);
  const Vec<A> a = absolute<A>(x), x2 = x * x;
  Vec<A> small;
  if constexpr (sizeof(A) == 4) {
    Vec<A> p = splat(-5.70498872745e-3f);
    p = fma(p, x2, splat(2.06390887954e-2f));
    p = fma(p, x2, splat(-5.37397155531e-2f));
    p = fma(p, x2, splat(1.33314422036e-1f));
    p = fma(p, x2, splat(-3.33332819422e-1f));
    small = fma(p * x2, x, x);
  } else {
    Vec<A> p = splat(-9.64399179425052238628e-1);
    p = fma(p, x2, splat(-9.92877231001918586564e1));
    p = fma(p, x2, splat(-1.61468768441708447952e3));
    Vec<A> q = x2 + splat(1.12811678491632931402e2);
    q = fma(q, x2, splat(2.23548839060100448583e3));
    q = fma(q, x2, splat(4.84406305325125486048e3));
    small = fma(p / q * x2, x, x);
  }
  const IntVec<A> is_large = a >= splat(static_cast<A>(0.625));
  if (!any(is_large)) return small;
  // e^2a is capped where tanh is 1 to the last bit; a NaN stays a NaN.
  const Vec<A> t = a * splat(2 * kLog2e);
  const Vec<A> capped = t > splat(static_cast<A>(120)) ? splat(static_cast<A>(120)) : t;
  const Vec<A> one = splat(static_cast<A>(1));
  const Vec<A> large = one - (one + one) / (exp2(capped) + one);
  return is_large ? (x < Vec<A>{} ? -large : large) : small;
}

}  // namespace qkv::inline QKV_LEVEL
