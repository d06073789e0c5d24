// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <stdlib.h>

#include <initializer_list>

#include "errors.h"
#include "qkv/stats.h"

namespace qkv {
#define QKV_KERNEL_ROW(name) extern const KernelTable portable_##name;
QKV_KERNEL_ROWS
#undef QKV_KERNEL_ROW
#define QKV_HOPPER_ROW(name) extern const HopperTable hopper_##name;
QKV_HOPPER_ROWS
#undef QKV_HOPPER_ROW
}  // namespace qkv

namespace qkv::cuda {
namespace {

#define QKV_HOPPER_ROW(name) &hopper_##name,
const HopperTable* const kHopperTables[] = {QKV_HOPPER_ROWS nullptr};  // head_dim rising within a dtype
#undef QKV_HOPPER_ROW

#define QKV_KERNEL_ROW(name) &portable_##name,
const KernelTable* const kTables[] = {QKV_KERNEL_ROWS};  // head_dim rising within a dtype
#undef QKV_KERNEL_ROW

// A part of the keys has at least so many tiles: what a block does before and after its walk stays small.
constexpr int64_t kPartTiles = 4;
constexpr int64_t kMostWhole = 256;  // columns of q and k that a tile takes at once; more go by pieces
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t most_keys(const Problem& p) {
  int64_t most = p.cu_k || p.kv_lens ? 0 : p.Sk;
  for (int64_t b = 0; b < p.B && (p.cu_k || p.kv_lens); ++b) most = sequence(p, b).Sk > most ? sequence(p, b).Sk : most;
  return most;
}

int64_t most_rows(const Problem& p) {
  if (!p.cu_q) return result_rows(p);
  int64_t most = 0;
  for (int64_t b = 0; b < p.B; ++b) most = p.cu_q[b + 1] - p.cu_q[b] > most ? p.cu_q[b + 1] - p.cu_q[b] : most;
  return most;
}

// Into how many parts of `least_tiles` or more, for a kernel that is bound by memory: such that the most tiles that one
// place works off, in waves of `places` blocks, are few. What a block does beside its walk takes as long as a third of
// a tile.
int64_t even_parts(int64_t blocks, int64_t places, int64_t tiles, int64_t least, int64_t least_tiles) {
  constexpr int64_t kWaves = 8;
  const int64_t first = divided(blocks * least, places), limit = tiles / least_tiles;
  int64_t best = least, shortest = INT64_MAX;
  for (int64_t waves = first; waves == first || waves <= kWaves; ++waves) {
    int64_t parts = waves * places / blocks;
    if (parts > limit) parts = limit;
    if (parts < least) parts = least;
    const int64_t each = divided(tiles, parts);
    parts = divided(tiles, each) > least ? divided(tiles, each) : least;  // the fewest that are as short
    const int64_t time = divided(blocks * parts, places) * (each * 3 + 1);
    if (time < shortest) {
      shortest = time;
      best = parts;
    }
  }
  return best;
}

// Is all that hides keys a band, if anything is: the same number for all rows, or ever more?
bool hides_by_band(const Problem& p, bool* none) {
  *none = true;
  if (p.cu_q || p.cu_k || p.q_lens || p.kv_lens || p.mask.data) return *none = false;
  for (int i = 0; i < p.program.n; ++i) {
    const MaskOp op = p.program.nodes[i].op;
    if (op == MaskOp::All || op == MaskOp::And) continue;
    *none = false;
    if (op != MaskOp::Band) return false;
  }
  return true;
}

// Tasks that all take the same time can be dealt out beforehand; so can two for each block, if they take ever less.
bool can_be_dealt(const Problem& p, const Plan& plan) {
  bool none = false;
  const bool band = hides_by_band(p, &none);
  return none || (band && plan.blocks <= 2 * plan.grid && plan.section == p.B * plan.groups);
}

// Of how many pairs (batch element, group) are the tiles taken in turn? Of as many as half of the L2 cache holds K and
// V of. But a section of tasks that become shorter needs two for each of the `places`, so that short ones end it.
int64_t section_size(const Problem& p, const Plan& plan, int64_t kv_bytes, int64_t places, int64_t cache) {
  const int64_t pairs = p.B * plan.groups;
  int64_t size = kv_bytes > 0 && cache / kv_bytes > 1 ? cache / kv_bytes : 1;
  bool none = false;
  hides_by_band(p, &none);
  if (!none && plan.chunks > 0 && size * plan.chunks < 2 * places) size = divided(2 * places, plan.chunks);
  if (size > pairs) size = pairs > 0 ? pairs : 1;
  return pairs > 0 ? divided(pairs, divided(pairs, size)) : size;  // of about the same size each
}

// Is the mask p - before <= j <= p + after?
bool find_band(const Problem& p, int64_t& before, int64_t& after) {
  if (p.mask.data || p.bias.data) return false;
  before = after = kUnbounded;
  for (int i = 0; i < p.program.n; ++i) {
    const MaskNode& m = p.program.nodes[i];
    if (m.op == MaskOp::Band) {
      before = m.a < before ? m.a : before;
      after = m.b < after ? m.b : after;
    } else if (m.op != MaskOp::All && m.op != MaskOp::And) return false;
  }
  return true;
}

int64_t group_size(const Problem& p) { return p.heads ? 1 : p.Hq / (p.Hkv ? p.Hkv : 1); }

// Rows on multiples of 16 bytes with unit stride: 16 bytes at a time.
int32_t can_copy_async(const Problem& p, const View& view) {
  const int64_t size = itemsize(view.dtype);
  if (!view.data || view.d != 1) return 0;
  if (reinterpret_cast<uintptr_t>(view.data) % 16 || view.h * size % 16 || view.s * size % 16) return 0;
  for (int t = 0; t < p.n_lead; ++t) {
    if (view.lead[t] * size % 16) return 0;
  }
  return 1;
}

}  // namespace

const KernelTable* find_table(const Problem& p, std::string& reason) {
  const bool any = p.score != Score::dot || p.focus.centre.data || has_stats(p) || p.D > kMostWhole;
  const DType dtype = any && p.dtype != DType::f64 ? DType::f32 : p.dtype;
  const int64_t head_dim = p.D > p.Dv && !any ? p.D : p.Dv;
  for (const KernelTable* t : kTables) {
    if (t->any == any && t->dtype == dtype && head_dim <= t->head_dim) return t;
  }
  reason = "head_dim is " + std::to_string(head_dim) + "; the kernels go up to 256";
  return nullptr;
}

// What the environment asks for: one of these words, or nothing.
std::string asked(const char* name, std::initializer_list<const char*> words) {
  const char* const value = getenv(name);
  if (!value || !*value) return "";
  std::string all;
  for (const char* word : words) {
    if (word == std::string(value)) return word;
    all += (all.empty() ? "" : " or ") + std::string(word);
  }
  throw Refusal{std::string(name) + " is '" + value + "'; expected " + all + ", or nothing"};
}

// float32 takes tensor cores where the work pays for two more walks over q, k and v; QKV_CUDA_F32=fma never does,
// QKV_CUDA_F32=pairs wherever it can be.
bool use_pairs(const Problem& p, const KernelTable& table, const Choice& c, const DeviceFacts& facts) {
  if (!table.forward_halved || c.few || !c.forward || p.cu_q || !p.v.data || p.D < 16 || !(p.scale <= 1e6))
    return false;
  if (table.halved.shared > facts.shared_per_block) return false;
  const std::string wanted = asked("QKV_CUDA_F32", {"fma", "pairs"});
  if (!wanted.empty()) return wanted == "pairs";
  return static_cast<double>(p.B * p.Hq) * static_cast<double>(p.Sq * p.Sk) * static_cast<double>(p.D + p.Dv) >= 1e9;
}

// QKV_CUDA_KERNELS=portable keeps to what every GPU runs.
const HopperTable* hopper_table(const Problem& p, const KernelTable& table, const Choice& c, const DeviceFacts& facts) {
  if (facts.major != 9 || table.any || c.few || !c.forward || p.Dv == 0) return nullptr;
  if (!asked("QKV_CUDA_KERNELS", {"portable"}).empty()) return nullptr;
  for (const HopperTable* const* t = kHopperTables; *t; ++t) {
    if ((*t)->dtype == p.dtype && (*t)->head_dim == table.head_dim && (*t)->tile.shared <= facts.shared_per_block)
      return *t;
  }
  return nullptr;
}

Choice choose(const Problem& p, const KernelTable& table, const DeviceFacts& facts) {
  Choice c;
  c.table = &table;
  c.few = most_rows(p) * group_size(p) <= int64_t{table.few.rows} * table.few_tiles;
  c.general =
      table.any || p.softcap != 0 || p.bias.data || p.alibi || p.weights || !(p.scale >= 1e-30 && p.scale <= 1e30);
  c.forward = p.out.data || p.lse || normaliser_bytes(p) > 0;
  c.halved = use_pairs(p, table, c, facts);
  c.hopper = hopper_table(p, table, c, facts);
  return c;
}

Plan make_plan(const Problem& p, const Choice& choice, const DeviceFacts& facts) {
  const KernelTable::Tile& tile = choice.tile();
  Plan plan;
  plan.group_size = group_size(p);
  plan.groups = p.heads ? p.n_heads : (plan.group_size ? p.Hkv : 0);
  plan.rows = most_rows(p) * plan.group_size;
  plan.chunks = divided(plan.rows, tile.rows);
  const int64_t keys = most_keys(p), pairs = p.B * plan.groups, size = itemsize(p.dtype);
  // Of a portable kernel at least two blocks fit a multiprocessor.
  const int64_t places = int64_t{facts.multiprocessors} * (choice.hopper ? 1 : 2);
  plan.section = section_size(p, plan, keys * (p.D + p.Dv) * size, places, facts.l2 / 2);
  // Both kernels of a halved problem take the same parts.
  const int64_t unit = choice.halved && choice.table->many.keys > tile.keys ? choice.table->many.keys : tile.keys;
  const int64_t tiles = divided(keys, unit), blocks = pairs * plan.chunks;
  if (blocks > 0) {
    int64_t parts = divided(places, blocks);
    if (parts > tiles / kPartTiles) parts = tiles / kPartTiles;
    if ((choice.few || tile.part_keys) && tiles > 0) {
      const int64_t least = tile.part_keys ? divided(tiles, tile.part_keys / tile.keys) : 1;
      parts = even_parts(blocks, places, tiles, least, tile.part_keys ? 2 : kPartTiles);
    }
    const int64_t each = pairs * plan.rows * (p.Dv + 2) * (size == 8 ? 8 : 4);  // bytes of one part of all rows
    if (parts * each > kMostPartialBytes) parts = kMostPartialBytes / each;
    if (parts > 1) {
      plan.part_keys = divided(tiles, parts) * unit;
      plan.parts = divided(keys, plan.part_keys);
    }
  }
  plan.band = find_band(p, plan.before, plan.after);
  plan.blocks = plan.grid = blocks * plan.parts;
  if (choice.hopper && plan.grid > facts.multiprocessors) {
    plan.grid = facts.multiprocessors;
    plan.drawn = !can_be_dealt(p, plan);
  }
  return plan;
}

void set_alignment(const Problem& on_device, Plan& plan) {
  plan.async_q = can_copy_async(on_device, on_device.q);
  plan.async_k = can_copy_async(on_device, on_device.k);
  plan.async_v = can_copy_async(on_device, on_device.v);
  plan.async_out = can_copy_async(on_device, on_device.out);
}

Plan fma_plan(const Plan& plan, const KernelTable& table) {
  Plan f = plan;
  f.chunks = divided(plan.rows, table.many.rows);
  f.blocks = plan.blocks / plan.chunks * f.chunks;
  return f;
}

namespace {

// Row by row, pair by pair; every row begins on a multiple of 16 bytes.
int64_t place(const Problem& p, int64_t heads, int64_t rows, int64_t columns, char* data, View& view) {
  view.d = 1;
  view.s = 2 * halved_columns(columns);
  view.h = rows * view.s;
  int64_t stride = heads * view.h;
  for (int t = p.n_lead - 1; t >= 0; --t) {
    view.lead[t] = stride;
    stride *= p.lead[t];
  }
  view.data = data;
  return p.B * heads * view.h * 2;
}

}  // namespace

int64_t place_pairs(const Problem& p, char* data, Problem& pairs, Halved& halved) {
  pairs = p;
  char* at = data;
  halved.range = reinterpret_cast<HalvedRange*>(at);
  at += divided(range_bytes(p), 16) * 16;
  at += place(p, p.Hq, p.Sq, p.D, at, pairs.q);
  at += place(p, p.Hkv, p.Sk, p.D, at, pairs.k);
  at += place(p, p.Hkv, p.Sk, p.Dv, at, pairs.v);
  halved.q_unit = reinterpret_cast<float*>(at);
  return at - data + p.B * p.Hq * p.Sq * static_cast<int64_t>(sizeof(float));
}

int64_t range_bytes(const Problem& p) { return p.B * p.Hkv * static_cast<int64_t>(sizeof(HalvedRange)); }

const KernelTable& weights_table(const Problem& p, const KernelTable& table) {
  if (table.weights) return table;
  Problem without_v = p;
  without_v.Dv = 0;
  std::string reason;
  return *find_table(without_v, reason);
}

const KernelTable& align_table(DType dtype) {
  Problem p;
  p.dtype = dtype;
  p.score = Score::additive;
  std::string reason;
  return *find_table(p, reason);
}

Plan weights_plan(const Problem& p, const Plan& plan, const KernelTable& table) {
  Plan w = plan;
  w.chunks = divided(plan.rows, table.many.rows);
  w.parts = 1;
  w.part_keys = 0;
  w.blocks = p.B * plan.groups * w.chunks;
  return w;
}

Plan stats_plan(const Problem& p, const Plan& plan, const KernelTable& table, bool by_keys) {
  Plan s = weights_plan(p, plan, table);
  if (!by_keys) return s;
  s.by_keys = 1;
  s.chunks = 1;
  s.part_keys = table.many.keys;
  s.parts = divided(most_keys(p), s.part_keys);
  s.blocks = p.B * plan.groups * s.parts;
  return s;
}

int64_t partial_bytes(const Problem& p, const Plan& plan) {
  return plan.parts > 1 ? p.B * plan.groups * plan.rows * plan.parts * (p.Dv + 2) * (p.dtype == DType::f64 ? 8 : 4) : 0;
}

int64_t normaliser_bytes(const Problem& p) {
  if (!(p.weights || has_stats(p)) || p.lse_in || p.normalizer == Normalizer::none) return 0;
  return p.B * result_heads(p) * result_rows(p) * 2 * (p.dtype == DType::f64 ? 8 : 4);
}

}  // namespace qkv::cuda
