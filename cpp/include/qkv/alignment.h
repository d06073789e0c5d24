// SPDX-License-Identifier: Apache-2.0
// Monotonic alignments: the one recurrence over rows of scores that no softmax of a row can express.
#pragma once

#include "qkv/problem.h"

namespace qkv {

// A = float, double for float64. Rows are taken in order; state carries the alignment of the row before.
struct Alignment {
  const char* function;       // for messages
  int64_t heads, rows, keys;  // heads: of all batch elements
  DType dtype;                // f32 or f64
  void* energy;               // (heads, rows, keys) A: in scores, -inf where masked; out the alignment
  void* chunk;                // (heads, rows, keys) A: likewise; out the weights of the chunks. nullptr: none
  int64_t width;              // keys of a chunk; 0: from the first on
  bool hard;                  // stop at the first score above 0, instead of with probability sigmoid(score)
  double* state;              // (heads, keys): the alignment of the row before, then of the last row
};

inline namespace QKV_LEVEL {

template <class A>
constexpr double kNormal = sizeof(A) == 4 ? 0x1p-126 : 0x1p-1022;
template <class A>
constexpr A kLowest = sizeof(A) == 4 ? static_cast<A>(-0x1.fffffep127) : static_cast<A>(-0x1.fffffffffffffp1023);

// The walk of one row: r_j = r_j-1 (1 - p_j-1) + a_j of the row before, a_j = p_j r_j. What is below the normal range
// counts as 0, and a key that no walk comes to has no influence, whatever its p holds.
template <class A>
struct Walk {
  double reach = 0;

  // The next key: `state` becomes this row's alignment with it, which is returned as it is stored.
  QKV_HD QKV_INLINE A step(double& state, A stop, A pass) {
    reach += state;
    if (reach < kNormal<double>) reach = 0;
    state = reach == 0 ? 0 : reach * static_cast<double>(stop);
    const A stored = state < kNormal<A> ? A{0} : static_cast<A>(state);
    if (reach != 0) reach *= mutant(51) ? 1 - static_cast<double>(stored) : static_cast<double>(pass);
    return stored;
  }
};

// Chunks from the first key on: with m_k the maximum up to k and l_k the sum of e^(u - m_k),
// b_j = e^(u_j - m_j) t_j, t_j = a_j / l_j + t_j+1 e^(m_j - m_j+1): no factor is above 1.
template <class A>
struct PastSum {  // keys rising
  double sum = 0;

  // own: e^(u_k - m_k), rise: e^(m_k-1 - m_k). The share a_k / l_k.
  QKV_HD QKV_INLINE A step(A share, A own, A rise) {
    sum = sum * static_cast<double>(rise) + static_cast<double>(own);
    return share == 0 ? share : static_cast<A>(static_cast<double>(share) / sum);
  }
};

template <class A>
struct PastTail {  // keys falling
  double tail = 0;

  // share: a_k / l_k, rise as above, of this key. The weight.
  QKV_HD QKV_INLINE A step(A share, A own, A rise) {
    tail += static_cast<double>(share);
    const A weight = tail == 0 ? A{0} : static_cast<A>(tail * static_cast<double>(own));
    if (tail != 0) tail *= static_cast<double>(rise);
    return weight;
  }
};

}  // namespace QKV_LEVEL

}  // namespace qkv
