// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of a layer's steps as a LayerTable.
#include "device/launch.cuh"
#include "portable/layer_steps.cuh"

namespace qkv {
namespace {

int64_t blocks_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

template <class Body>
int launch_tiles(const LinearArgs& args, void* stream) {
  return launch<Body>(args, args.plan.row_tiles * args.plan.column_tiles, stream);
}

template <class Element, Height H>
int launch_order(const LinearArgs& args, void* stream) {
  return args.plan.by_columns ? launch_tiles<MmaLinear<Element, H, Order::Columns>>(args, stream)
                              : launch_tiles<MmaLinear<Element, H, Order::Rows>>(args, stream);
}

template <class Element>
int mma_linear(const LinearArgs& args, int few, void* stream) {
  return few ? launch_order<Element, Height::Few>(args, stream) : launch_order<Element, Height::Many>(args, stream);
}

template <class A>
int fma_linear(const LinearArgs& args, int few, void* stream) {
  return few ? launch_tiles<FmaLinear<A, Height::Few>>(args, stream)
             : launch_tiles<FmaLinear<A, Height::Many>>(args, stream);
}

template <class M>
constexpr LinearTable::Tile tile_of() {
  return {M::kRows, M::kColumns};
}

template <class Element>
constexpr LinearTable mma_table(const char* name) {
  return {name, tile_of<LinearTile<Element, Height::Many, Order::Rows>>(),
          tile_of<LinearTile<Element, Height::Few, Order::Rows>>(), mma_linear<Element>};
}

template <class A>
constexpr LinearTable fma_table(const char* name) {
  return {name, tile_of<FmaLinearTile<A, Height::Many>>(), tile_of<FmaLinearTile<A, Height::Few>>(), fma_linear<A>};
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

const LayerTable portable_layers{mma_table<Half>("float16"),
                                 mma_table<Bfloat>("bfloat16"),
                                 fma_table<float>("float32"),
                                 fma_table<double>("float64"),
                                 norm,
                                 elementwise};

}  // namespace qkv
