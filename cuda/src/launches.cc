// SPDX-License-Identifier: Apache-2.0
#include "launches.h"

#include "boxes.h"
#include "kernels.h"
#include "qkv/stats.h"

namespace qkv::cuda {
namespace {

// Without rows, on a device: elsewhere it is 0 already.
void clear_received(const Problem& p, Stream* stream) {
  if (p.device < 0 || !p.stats.received) return;
  check(clear(p.stats.received, static_cast<size_t>(received_bytes(p)), stream), "clearing a result");
}

// The key side owns its sums, so it runs as a walk of its own; without keys there is nothing to add.
void launch_stats(const Problem& p, const KernelTable& table, KernelArgs args, Stream* stream) {
  const StatsOut& out = p.stats;
  const Plan plan = args.plan;
  args.plan = stats_plan(p, plan, table, false);
  if (out.entropy || out.distance || out.max || out.top_p) check(table.stats(args, stream), "launching the statistics");
  args.plan = stats_plan(p, plan, table, true);
  if (out.received && args.plan.blocks > 0) check(table.stats(args, stream), "launching the statistics of keys");
}

// The heads that pairs of float16 hold on tensor cores, then the others: a block that has nothing to do ends at once.
void launch_pairs(DeviceProblem& on_device, const Choice& choice, KernelArgs args, Stream* stream) {
  Problem pairs;
  const Buffer memory = on_device.scratch(place_pairs(args.problem, nullptr, pairs, args.halved));
  place_pairs(args.problem, memory.data(), pairs, args.halved);
  check(clear(args.halved.range, static_cast<size_t>(range_bytes(args.problem)), stream), "clearing the ranges");
  check(halve({args.problem, pairs, args.halved}, stream), "launching the halving");
  KernelArgs on_pairs{pairs, args.plan, args.halved};
  on_pairs.plan.async_q = on_pairs.plan.async_k = on_pairs.plan.async_v = 1;
  check(choice.table->forward_halved(on_pairs, choice.general, stream), "launching the kernel");
  args.plan = fma_plan(args.plan, *choice.table);
  check(choice.table->forward(args, 0, choice.general, stream), "launching the kernel for wide ranges");
}

void launch_hopper(DeviceProblem& on_device, const Choice& choice, const KernelArgs& args, Stream* stream) {
  HopperArgs on_hopper = hopper_args(args, choice);
  const Buffer next = on_device.scratch(args.plan.drawn ? sizeof(uint32_t) : 0);
  if (next.data()) check(clear(next.data(), sizeof(uint32_t), stream), "clearing a counter");
  on_hopper.next = reinterpret_cast<uint32_t*>(next.data());
  check(choice.hopper->forward(on_hopper, stream), "launching the kernel");
}

}  // namespace

void launch(const Problem& p, const DeviceFacts& facts, Memory& memory, Stream* stream) {
  std::string reason;
  const KernelTable* table = find_table(p, reason);
  const Choice choice = choose(p, *table, facts);
  const Plan plan = make_plan(p, choice, facts);
  if (plan.blocks == 0) {
    clear_received(p, stream);
    return;
  }
  DeviceProblem on_device(p, memory.pool, memory.copies, memory.staging, stream);
  KernelArgs args{on_device.problem, plan, {}};
  set_alignment(args.problem, args.plan);
  const Buffer partial = on_device.scratch(partial_bytes(p, plan));
  const Buffer normaliser = on_device.scratch(normaliser_bytes(p));
  args.plan.partial = partial.data();
  args.plan.normaliser = normaliser.data();
  const bool general = choice.general;
  if (choice.forward) {
    if (choice.halved) launch_pairs(on_device, choice, args, stream);
    else if (choice.hopper) launch_hopper(on_device, choice, args, stream);
    else check(table->forward(args, choice.few, general, stream), "launching the kernel");
    if (plan.parts > 1) check(table->merge(args, general, stream), "launching the merge");
  }
  if (p.weights) {
    const KernelTable& writes = weights_table(p, *table);
    args.plan = weights_plan(p, args.plan, writes);
    check(writes.weights(args, stream), "launching the weights' kernel");
  }
  if (has_stats(p)) launch_stats(p, *table, args, stream);
  on_device.fetch_results();
}

}  // namespace qkv::cuda
