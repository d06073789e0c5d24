// SPDX-License-Identifier: Apache-2.0
// float32 as pairs of float16, for tensor cores: x = 2^e (h + l) with h the nearest float16, l the nearest to the rest.
//
//     q k^T = 2^(e_q + e_k) (h h + h l + l h),  P v = 2^e_v (h h + h l + l h)          forward_mma.cuh, Halves
//
// Why        three products of float16 take a sixth of the time of multiply-adds on tensor cores since sm_80, and half
//            that of three products of tf32. h and l hold 22 bits and a sign; what is left out, l l, is below
//            2^-22 |x| |y|.
// Exponents  e of a row of q is its own: its largest element comes to lie below 2^15. k and v have one for all keys of
// a
//            batch element and head. l ends at 2^-24, 2^-39 below the largest element: so |error of an element| <=
//            2^-23 |x| + 2^-40 max, max over the row of q, over all keys of k and v.
// Refusal    where the rows of k, or of v, have maxima more than 2^kSpan apart, that would be too much for the smaller
//            ones; and there is no exponent for what is not finite. Such a head is `wide`, and left to forward_fma.cuh.
// Work       two walks over q, k and v, a warp per row: little beside the products, from some hundred rows on.
// References Ootomo & Yokota 2022 (arXiv 2203.03341).
#pragma once

#include "portable/lanes.cuh"

namespace qkv::inline QKV_LEVEL {

constexpr int kHalfTop = 14;                             // 2^14 <= the largest element < 2^15, after scaling
constexpr int kSpan = 12;                                // exponents of rows of one head
constexpr int kLeastExponent = 87, kMostExponent = 172;  // of a row, biased by 127: products of scales stay normal

// Which exponents the rows of a head have, biased, without rows of zeros: 0 where there is none.
QKV_DEVICE bool fits(int64_t top, int64_t bottom_from_255, int64_t span) {
  if (top == 0) return true;
  const int64_t bottom = 255 - bottom_from_255;
  return top <= kMostExponent && bottom >= kLeastExponent && top - bottom <= span;
}
QKV_DEVICE bool is_wide(const HalvedRange& r) {
  return !fits(r.top[0], r.bottom[0], 255) || !fits(r.top[1], r.bottom[1], kSpan) ||
         !fits(r.top[2], r.bottom[2], kSpan);
}

QKV_DEVICE const HalvedRange& range_of(const KernelArgs& args, const Task& task) {
  return args.halved.range[task.batch * args.problem.Hkv + task.kv_head];
}

// 2^n for a normal n.
QKV_DEVICE float exact_power(int64_t n) { return bits_as_float(static_cast<uint32_t>(n + 127) << 23); }
// What the scaled elements of a tensor are multiplied with to be what they were.
QKV_DEVICE float unit_of(int64_t exponent) { return exponent == 0 ? 1.0f : exact_power(exponent - 127 - kHalfTop); }

// Rows of q (0), k (1) and v (2), each warp kRun in a row of one head: visit(tensor, batch, head, row).
struct HalvedRows {
  static constexpr int kRun = 16, kThreads = 256;

  QKV_HD static int64_t heads(const Problem& p, int tensor) { return tensor == 0 ? p.Hq : p.Hkv; }
  QKV_HD static int64_t runs(const Problem& p, int tensor) {
    return ((tensor == 0 ? p.Sq : p.Sk) + kRun - 1) / kRun * heads(p, tensor) * p.B;
  }

  template <class Begin, class Visit, class End>
  QKV_DEVICE static void walk(const Problem& p, int64_t block, const Begin& begin, const Visit& visit, const End& end) {
    int64_t run = block * (kThreads / 32) + thread_index() / 32;
    int tensor = 0;
    while (tensor < 3 && run >= runs(p, tensor)) run -= runs(p, tensor++);
    if (tensor == 3) return;
    const int64_t rows = tensor == 0 ? p.Sq : p.Sk, each = (rows + kRun - 1) / kRun, pair = run / each;
    const int64_t batch = pair / heads(p, tensor), head = pair % heads(p, tensor);
    const int64_t first = run % each * kRun, there = tensor == 0 ? rows : sequence(p, batch).Sk;
    const int64_t kv_head = tensor == 0 ? head / (p.Hq / p.Hkv) : head;
    begin(tensor, batch * p.Hkv + kv_head);
    for (int64_t row = first; row < first + kRun && row < there; ++row) visit(tensor, batch, head, row);
    end(tensor, batch * p.Hkv + kv_head);
  }

  QKV_HD static const View& view_of(const Problem& p, int tensor) {
    return tensor == 0 ? p.q : (tensor == 1 ? p.k : p.v);
  }
  QKV_HD static int64_t columns_of(const Problem& p, int tensor) { return tensor == 2 ? p.Dv : p.D; }

  QKV_DEVICE static const float* row_of(const Problem& p, int tensor, int64_t batch, int64_t head, int64_t row) {
    const View& view = view_of(p, tensor);
    return reinterpret_cast<const float*>(view.data) + lead_offset(p, view, batch) + head * view.h + row * view.s;
  }

  // The biased exponent of the row's largest element, 255 if one is not finite.
  QKV_DEVICE static int64_t exponent_of(const Problem& p, int tensor, const float* x) {
    uint32_t most = 0;
    for (int64_t c = thread_index() % 32; c < columns_of(p, tensor); c += 32) {
      const uint32_t bits = float_as_bits(x[c * view_of(p, tensor).d]) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const uint32_t other = shuffle_xor(most, lanes);
      most = other > most ? other : most;
    }
    return most == 0 ? 0 : (most >> 23 ? most >> 23 : 1);
  }
};

struct MeasureRows {
  using Args = HalveArgs;
  static constexpr int kThreads = HalvedRows::kThreads, kBlocks = 4;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const Problem& p = args.problem;
    int64_t top = 0, bottom = 0;
    HalvedRows::walk(
        p, block, [](int, int64_t) {},
        [&](int tensor, int64_t batch, int64_t head, int64_t row) {
          const int64_t e = HalvedRows::exponent_of(p, tensor, HalvedRows::row_of(p, tensor, batch, head, row));
          if (e == 0) return;
          top = e > top ? e : top;
          bottom = 255 - e > bottom ? 255 - e : bottom;
        },
        [&](int tensor, int64_t slot) {
          if (thread_index() % 32 || top == 0) return;
          atomic_max(&args.halved.range[slot].top[tensor], top);
          atomic_max(&args.halved.range[slot].bottom[tensor], bottom);
        });
  }
};

struct HalveRows {
  using Args = HalveArgs;
  static constexpr int kThreads = HalvedRows::kThreads, kBlocks = 4;
  static constexpr int64_t kShared = 0;

  QKV_DEVICE static void run(const Args& args, int64_t block, char*) {
    const Problem& p = args.problem;
    int64_t exponent = 0;
    bool wide = false;
    HalvedRows::walk(
        p, block,
        [&](int tensor, int64_t slot) {
          exponent = args.halved.range[slot].top[tensor];
          wide = is_wide(args.halved.range[slot]);
        },
        [&](int tensor, int64_t batch, int64_t head, int64_t row) {
          if (wide) return;
          const float* const x = HalvedRows::row_of(p, tensor, batch, head, row);
          const int64_t e = tensor == 0 ? HalvedRows::exponent_of(p, tensor, x) : exponent;
          if (tensor == 0 && thread_index() % 32 == 0)
            args.halved.q_unit[(batch * p.Hq + head) * p.Sq + row] = unit_of(e);
          write(args, tensor, batch, head, row, x, e == 0 ? 1.0f : exact_power(kHalfTop + 127 - e));
        },
        [](int, int64_t) {});
  }

  // First all h of a row, then all l, two columns of a lane at a time; columns that fill up the last chunk are 0.
  QKV_DEVICE static void write(const Args& args, int tensor, int64_t batch, int64_t head, int64_t row, const float* x,
                               float scale) {
    const Problem& p = args.problem;
    const View &from = HalvedRows::view_of(p, tensor), &to = HalvedRows::view_of(args.views, tensor);
    const int64_t columns = HalvedRows::columns_of(p, tensor), padded = halved_columns(columns);
    auto* const high =
        reinterpret_cast<uint32_t*>(to.data) + (lead_offset(args.views, to, batch) + head * to.h + row * to.s) / 2;
    for (int64_t c = thread_index() % 32 * 2; c < padded; c += 64) {
      const float a = c < columns ? x[c * from.d] * scale : 0.0f,
                  b = c + 1 < columns ? x[(c + 1) * from.d] * scale : 0.0f;
      float h[2];
      const uint32_t both = pack<Half>(a, b);
      unpack(both, h);
      high[c / 2] = both;
      high[(padded + c) / 2] = pack<Half>(a - h[0], b - h[1]);
    }
  }
};

}  // namespace qkv::inline QKV_LEVEL
