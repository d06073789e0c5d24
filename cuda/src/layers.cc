// SPDX-License-Identifier: Apache-2.0
#include "layers.h"

#include "errors.h"

namespace qkv::cuda {
namespace {

int64_t pieces(int64_t n, int64_t each) { return (n + each - 1) / each; }

const LinearTable& table_of(const Linear& p) {
  const DType x = p.x.dtype, w = p.w.dtype;
  if (x == DType::f64 || w == DType::f64) return portable_layers.f64;
  const bool mma = x == w && (p.y.dtype == x || p.y.dtype == DType::f32);
  if (mma && x == DType::f16) return portable_layers.f16;
  return mma && x == DType::bf16 ? portable_layers.bf16 : portable_layers.f32;
}

// Lines of elements of `size` bytes on multiples of 16 bytes, each at most 4 GiB after the first of a tile; of a list
// of several dimensions, after the first of all.
bool on_sixteen(const char* data, const int64_t* extents, const int64_t* steps, int n, int64_t step, int size) {
  constexpr int64_t kTileLines = 256, kReach = (int64_t{1} << 32) - 4096;
  bool ok = step == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  int64_t reach = 0;
  for (int t = 0; t < n; ++t) {
    ok = ok && steps[t] >= 0 && steps[t] * size % 16 == 0;
    reach += (n > 1 ? extents[t] : kTileLines) * steps[t] * size;
  }
  return ok && reach <= kReach;
}

struct Work {
  const LinearTable* table;
  LinearSize size = LinearSize::Few;
  LinearPlan plan;

  const LinearTable::Tile& tile() const { return table->tile[static_cast<int>(size)]; }
  void cut(const Linear& p, LinearSize s) {
    size = s;
    plan.row_tiles = pieces(p.rows, tile().rows);
    plan.column_tiles = pieces(p.columns, tile().columns);
  }
};

constexpr int64_t kSectionRows = 2048;  // as many as the columns of the tiles that run at the same time

Work plan_of(const Linear& p) {
  Work work{&table_of(p), {}, {}};
  LinearPlan& plan = work.plan;
  work.cut(p, LinearSize::Few);
  if (plan.row_tiles > 1) {
    work.cut(p, LinearSize::Many);
    if (plan.row_tiles < pieces(work.table->enough, plan.column_tiles)) work.cut(p, LinearSize::Some);
  }
  if (plan.row_tiles > INT32_MAX / plan.column_tiles) throw Refusal{"more than 2^31 tiles"};
  plan.section_tiles = pieces(kSectionRows, work.tile().rows);
  plan.by_columns = p.w.row == 1 && p.w.column != 1;
  const int size = work.table->element;  // a copy does not convert
  plan.async_x =
      itemsize(p.x.dtype) == size && on_sixteen(p.x.data, p.x.extent, p.x.step, p.x.n_dims, p.x.column, size);
  const int64_t across = plan.by_columns ? p.w.column : p.w.row, along = plan.by_columns ? p.w.row : p.w.column;
  plan.async_w = itemsize(p.w.dtype) == size && on_sixteen(p.w.data, nullptr, &across, 1, along, size);
  return work;
}

bool empty(const LayerStep& p) { return p.rows == 0 || p.columns == 0; }

void refuse_too_many(int64_t n, int64_t each, const char* what) {
  if (n > int64_t{INT32_MAX} * each) throw Refusal{std::string("more than 2^31 blocks of ") + what};
}

}  // namespace

void queue(const Linear& p) {
  if (empty(p)) return;
  const Work work = plan_of(p);
  check(work.table->linear({p, work.plan}, work.size, p.stream), "launching the product");
}

void queue(const Norm& p) {
  if (empty(p)) return;
  refuse_too_many(p.rows, 4, "rows");
  check(portable_layers.norm({p}, p.stream), "launching the norm");
}

void queue(const Elementwise& p) {
  if (empty(p)) return;
  refuse_too_many(p.rows * pieces(p.columns, 4), 128, "elements");
  check(portable_layers.elementwise({p}, p.stream), "launching a layer's step");
}

std::string kernel_text(const Linear& p) {
  const Work work = empty(p) ? Work{&table_of(p), {}, {}} : plan_of(p);
  const LinearTable::Tile& tile = work.tile();
  return std::string(work.table->kernel) + " product, " + std::to_string(tile.rows) + " rows x " +
         std::to_string(tile.columns) + " columns, " + std::to_string(work.plan.row_tiles * work.plan.column_tiles) +
         " blocks";
}

}  // namespace qkv::cuda
