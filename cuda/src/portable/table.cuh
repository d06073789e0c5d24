// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of one dtype and padded head_dim as a KernelTable.
#pragma once

#include "device/launch.cuh"
#include "portable/alignment.cuh"
#include "portable/results_decode.cuh"
#include "portable/results_fma.cuh"
#include "portable/results_mma.cuh"
#include "portable/stats.cuh"

namespace qkv::inline QKV_LEVEL {

// float32 with a head_dim whose pairs fit shared memory (D = 256: not yet).
template <class Kernels, int D>
constexpr bool kHasHalved = Kernels::kDType == DType::f32 && !Kernels::kAny && D <= 128;

template <int D>
int forward_halved(const KernelArgs& args, int general, void* stream) {
  return general ? launch<MmaForward<Halves, D, Height::Many, true>>(args, args.plan.blocks, stream)
                 : launch<MmaForward<Halves, D, Height::Many, false>>(args, args.plan.blocks, stream);
}

template <class Element, int D>
struct Mma {  // Half or Bfloat
  static constexpr int kFewTiles = 1;
  using A = float;
  static constexpr DType kDType = Element::kDType;
  static constexpr bool kAny = false;
  template <Height H, bool General>
  using Forward = MmaForward<Element, D, H, General>;
  using Weights = MmaWeights<Element, D>;
};

template <class Element, int D>
struct Fma {                           // float or double
  static constexpr int kFewTiles = 4;  // whose blocks read K and V from the L2 cache: up to so many in no more time
  using A = Element;
  static constexpr DType kDType = sizeof(A) == 4 ? DType::f32 : DType::f64;
  static constexpr bool kAny = false;
  template <Height H, bool General>
  static constexpr auto forward() {
    if constexpr (H == Height::Few) return FmaDecode<Element, D, General>();
    else return FmaForward<Element, D, Height::Many, General ? Kind::General : Kind::Plain>();
  }
  template <Height H, bool General>
  using Forward = decltype(forward<H, General>());
  using Weights = FmaWeights<Element, D, Kind::General>;
};

// Where a tile of many rows is as low as one of few, it is the same kernel.
template <class Element, int D, Height H>
constexpr Height kHeight =
    FmaTile<Element, D, Height::Many>::kRows == FmaTile<Element, D, Height::Few>::kRows ? Height::Many : H;

template <class Element, int D>
struct Any {  // float for all dtypes but float64; D is that of v
  static constexpr int kFewTiles = 1;
  using A = Element;
  static constexpr DType kDType = sizeof(A) == 4 ? DType::f32 : DType::f64;
  static constexpr bool kAny = true;
  template <Height H, bool>
  using Forward = FmaForward<Element, D, kHeight<Element, D, H>, Kind::Any>;
  using Weights = FmaWeights<Element, D, Kind::Any>;
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

// In merge.cu: the same for all head_dims.
int merge_float(const KernelArgs& args, int general, void* stream);
int merge_double(const KernelArgs& args, int general, void* stream);

// Weights that do not meet v need no other kernel of any kind than that of the smallest head_dim.
template <class Kernels, int D>
constexpr bool kHasWeights = !Kernels::kAny || D == 64;

template <class Kernels>
int weights(const KernelArgs& args, void* stream) {
  return launch<typename Kernels::Weights>(args, args.plan.blocks, stream);
}

template <class Kernels>
int stats(const KernelArgs& args, void* stream) {
  return launch<StatsWalk<typename Kernels::A>>(args, args.plan.blocks, stream);
}

template <class A>
int align(const AlignArgs& args, void* stream) {
  const Alignment& x = args.problem;
  const auto blocks = [&](int64_t n) { return (n + kChunkThreads - 1) / kChunkThreads; };
  int error = launch<AlignWalk<A>>(args, x.heads, stream);
  if (!x.chunk || error) return error;
  if (x.width == 0) return launch<AlignPasts<A>>(args, blocks(x.heads * x.rows), stream);
  error = launch<AlignShares<A>>(args, blocks(x.heads * x.rows * x.keys), stream);
  return error ? error : launch<AlignWeights<A>>(args, blocks(x.heads * x.rows * x.keys), stream);
}

template <class Body>
constexpr KernelTable::Tile tile_of() {
  using M = typename Body::M;
  return {M::kRows, M::kKeys, Body::kThreads, static_cast<int>(Body::kShared), M::kPartKeys};
}

template <class Kernels, int D>
constexpr KernelTable make_table() {
  KernelTable t{Kernels::kDType,
                D,
                Kernels::kAny,
                tile_of<typename Kernels::template Forward<Height::Many, false>>(),
                tile_of<typename Kernels::template Forward<Height::Few, false>>(),
                {},
                Kernels::kFewTiles,
                forward<Kernels>,
                sizeof(typename Kernels::A) == 8 ? merge_double : merge_float,
                nullptr,
                nullptr,
                nullptr,
                nullptr};
  if constexpr (kHasHalved<Kernels, D>) {
    t.halved = tile_of<MmaForward<Halves, D, Height::Many, false>>();
    t.forward_halved = forward_halved<D>;
  }
  if constexpr (kHasWeights<Kernels, D>) t.weights = weights<Kernels>;
  if constexpr (kHasWeights<Kernels, D> && Kernels::kAny) {
    t.stats = stats<Kernels>;
    t.align = align<typename Kernels::A>;
  }
  return t;
}

}  // namespace qkv::inline QKV_LEVEL
