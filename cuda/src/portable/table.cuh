// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of one dtype and padded head_dim as a KernelTable.
#pragma once

#include "device/launch.cuh"
#include "portable/forward_fma.cuh"
#include "portable/merge.cuh"
#include "portable/results_mma.cuh"

namespace qkv::inline QKV_LEVEL {

template <class Element, int D>
struct Mma {  // Half or Bfloat
  using A = float;
  static constexpr DType kDType = Element::kDType;
  template <Height H, bool General>
  using Forward = MmaForward<Element, D, H, General>;
  using Weights = MmaWeights<Element, D>;
};

template <class Element, int D>
struct Fma {  // float or double
  using A = Element;
  static constexpr DType kDType = sizeof(A) == 4 ? DType::f32 : DType::f64;
  template <Height H, bool General>
  using Forward = FmaForward<Element, D, H, General>;
  using Weights = FmaWeights<Element, D>;
};

template <class Kernels, Height H>
int launch_forward(const KernelArgs& args, int general, void* stream) {
  if (general) return launch<typename Kernels::template Forward<H, true>>(args, args.plan.blocks, stream);
  return launch<typename Kernels::template Forward<H, false>>(args, args.plan.blocks, stream);
}

template <class Kernels>
int forward(const KernelArgs& args, int few, int general, void* stream) {
  return few ? launch_forward<Kernels, Height::Few>(args, general, stream)
             : launch_forward<Kernels, Height::Many>(args, general, stream);
}

template <class Kernels>
int merge(const KernelArgs& args, int general, void* stream) {
  using A = typename Kernels::A;
  const int64_t rows = args.problem.B * args.plan.groups * args.plan.rows, each = Merge<A, true>::kRows;
  const int64_t blocks = (rows + each - 1) / each;
  return general ? launch<Merge<A, true>>(args, blocks, stream) : launch<Merge<A, false>>(args, blocks, stream);
}

template <class Kernels>
int weights(const KernelArgs& args, void* stream) {
  return launch<typename Kernels::Weights>(args, args.plan.blocks, stream);
}

template <class Body>
constexpr KernelTable::Tile tile_of() {
  return {Body::M::kRows, Body::M::kKeys, Body::kThreads, static_cast<int>(Body::kShared)};
}

template <class Kernels, int D>
constexpr KernelTable make_table() {
  return {Kernels::kDType,
          D,
          tile_of<typename Kernels::template Forward<Height::Many, false>>(),
          tile_of<typename Kernels::template Forward<Height::Few, false>>(),
          forward<Kernels>,
          merge<Kernels>,
          weights<Kernels>};
}

}  // namespace qkv::inline QKV_LEVEL
