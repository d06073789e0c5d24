// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of a layer's steps as a LayerTable.
#include "device/launch.cuh"
#include "portable/layer_steps.cuh"
#include "portable/linear_fma.cuh"
#include "portable/linear_mma.cuh"

namespace qkv {
namespace {

int64_t blocks_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

template <class Body>
int launch_tiles(const LinearArgs& args, void* stream) {
  return launch<Body>(args, args.plan.row_tiles * args.plan.column_tiles, stream);
}

template <template <class, LinearSize, Order> class Kernel, class Element, LinearSize S>
int launch_order(const LinearArgs& args, void* stream) {
  return args.plan.by_columns ? launch_tiles<Kernel<Element, S, Order::Columns>>(args, stream)
                              : launch_tiles<Kernel<Element, S, Order::Rows>>(args, stream);
}

template <template <class, LinearSize, Order> class Kernel, class Element>
int launch_size(const LinearArgs& args, LinearSize size, void* stream) {
  switch (size) {
    case LinearSize::Few: return launch_order<Kernel, Element, LinearSize::Few>(args, stream);
    case LinearSize::Some: return launch_order<Kernel, Element, LinearSize::Some>(args, stream);
    default: return launch_order<Kernel, Element, LinearSize::Many>(args, stream);
  }
}

template <class M>
constexpr LinearTable::Tile tile_of() {
  return {Frame<M>::kRows, Frame<M>::kColumns};
}

template <template <class, LinearSize, Order> class Kernel, class Element>
constexpr LinearTable table_of(const char* name, int enough) {
  using Largest = typename Kernel<Element, LinearSize::Many, Order::Rows>::M;
  return {name,
          {tile_of<typename Kernel<Element, LinearSize::Few, Order::Rows>::M>(),
           tile_of<typename Kernel<Element, LinearSize::Some, Order::Rows>::M>(), tile_of<Largest>()},
          sizeof(typename Largest::Stored),
          enough,
          launch_size<Kernel, Element>};
}

// In double where an array is.
int norm(const NormArgs& args, void* stream) {
  const Norm& p = args.problem;
  if (p.x.dtype == DType::f64)
    return launch<NormRows<double>>(args, blocks_of(p.rows, NormRows<double>::kRows), stream);
  return launch<NormRows<float>>(args, blocks_of(p.rows, NormRows<float>::kRows), stream);
}

int elementwise(const ElementwiseArgs& args, void* stream) {
  const Elementwise& p = args.problem;
  const int64_t blocks = blocks_of(p.rows * blocks_of(p.columns, Elements<float>::kEach), Elements<float>::kThreads);
  if (p.x.dtype == DType::f64) return launch<Elements<double>>(args, blocks, stream);
  return launch<Elements<float>>(args, blocks, stream);
}

}  // namespace

const LayerTable portable_layers{table_of<MmaLinear, Half>("float16", 48),
                                 table_of<MmaLinear, Bfloat>("bfloat16", 48),
                                 table_of<FmaLinear, float>("float32", 132),
                                 table_of<FmaLinear, double>("float64", 132),
                                 norm,
                                 elementwise};

}  // namespace qkv
