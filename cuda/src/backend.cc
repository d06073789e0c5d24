// SPDX-License-Identifier: Apache-2.0
// The plugin's table: is there a GPU, can it run this, run it.
#include <pthread.h>
#include <string.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "alignment.h"
#include "kernels.h"
#include "launches.h"
#include "layers.h"
#include "presence.h"
#include "qkv/plugin.h"
#include "qkv/stats.h"

namespace qkv::cuda {
namespace {

struct Device {
  DeviceFacts facts;
  Memory memory;
  std::mutex staging_mutex;
  std::mutex order_mutex;
  Event* order = nullptr;
};

struct State {
  std::recursive_mutex mutex;       // check() remembers a lost context, also of a question that was asked under it
  std::atomic<bool> ready{false};   // the driver was asked, there is a GPU, nothing is lost: known without the mutex
  std::atomic<bool> forked{false};  // this is a child of the process that asked the driver
  std::string lost;                 // why no call can succeed any more
  bool asked = false;               // the driver, for the devices
  int devices = 0;                  // that it has
  std::string missing;              // why there is none
  std::unique_ptr<Device> device[kMostDevices];
};

State& state() {
  static State* const s = new State;  // never destroyed: arrays may outlive everything
  return *s;
}

void say(PluginText to, const std::string& text) {
  if (to.size == 0) return;
  const size_t n = text.size() < to.size - 1 ? text.size() : to.size - 1;
  memcpy(to.data, text.data(), n);
  to.data[n] = 0;
}

bool ready(std::string& reason) {
  State& s = state();
  if (s.forked.load(std::memory_order_relaxed)) {
    reason =
        "this process was forked from one that had used CUDA, which does not work in a child; start it with "
        "multiprocessing's 'spawn', or use CUDA only in the children";
    return false;
  }
  if (s.ready.load(std::memory_order_acquire)) return true;
  const std::lock_guard lock(s.mutex);
  if (!s.asked) {
    // Before the driver: from here on children are told. A handler costs calls nothing, the process's number a syscall.
    pthread_atfork(nullptr, nullptr, [] { state().forked.store(true, std::memory_order_relaxed); });
    s.missing = find_devices(&s.devices);
    s.asked = true;
  }
  reason = s.missing.empty() ? s.lost : s.missing;
  s.ready.store(reason.empty(), std::memory_order_release);
  return reason.empty();
}

Device& device_of(int ordinal) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (ordinal < 0 || ordinal >= s.devices) {
    throw Refusal{"device " + std::to_string(ordinal) + " does not exist; the driver sees " +
                  std::to_string(s.devices)};
  }
  std::unique_ptr<Device>& d = s.device[ordinal];
  if (!d) {
    auto made = std::make_unique<Device>();
    check(device_facts(ordinal, &made->facts), "asking for the GPU's properties");
    d = std::move(made);
  }
  if (d->facts.major < 8) {
    throw Refusal{std::string(d->facts.name) + " has compute capability " + std::to_string(d->facts.major) + "." +
                  std::to_string(d->facts.minor) + "; the kernels need 8.0"};
  }
  return *d;
}

class OnDevice {  // makes a device the thread's current one, for a while
 public:
  explicit OnDevice(int ordinal) {
    check(current_device(&before_), "asking for the current GPU");
    if (before_ != ordinal) check(use_device(ordinal), "choosing the GPU");
    changed_ = before_ != ordinal;
  }
  ~OnDevice() {
    if (changed_) use_device(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int ordinal_of(const Problem& p) {
  int current = 0;
  if (p.device < 0) check(current_device(&current), "asking for the current GPU");
  return p.device < 0 ? current : p.device;
}

// f() with its exceptions as a status.
template <class F>
PluginStatus guarded(PluginText text, const F& f) {
  try {
    std::string reason;
    if (!ready(reason)) throw Refusal{reason};
    f();
    return PluginStatus::ok;
  } catch (const OutOfMemory& e) {
    say(text, e.text);
    return PluginStatus::out_of_memory;
  } catch (const Refusal& e) {
    say(text, e.text);
  } catch (const std::bad_alloc&) {
    say(text, "out of host memory");
    return PluginStatus::out_of_memory;
  } catch (const std::exception& e) {
    say(text, e.what());
  }
  return PluginStatus::refused;
}

// --- one call ------------------------------------------------------------------------------------------------

bool supports(const Problem& p, PluginText text) {
  return guarded(text, [&] {
           std::string reason;
           const bool scores = p.normalizer == Normalizer::none && p.device < 0 && p.weights && !p.out.data;
           if (p.normalizer != Normalizer::softmax && !scores) {
             throw Refusal{"its kernels know only the softmax normalizers"};
           }
           if (p.dropout.threshold) throw Refusal{"its kernels have no dropout"};
           const KernelTable* table = find_table(p, reason);
           if (!table) throw Refusal{reason};
           const Device& device = device_of(ordinal_of(p));
           const Choice choice = choose(p, *table, device.facts);
           if (make_plan(p, choice, device.facts).blocks > INT32_MAX) throw Refusal{"more than 2^31 tiles"};
           if (p.Hq > INT32_MAX) throw Refusal{"more than 2^31 heads"};
           const int64_t shared = choice.tile().shared;
           if (shared > device.facts.shared_per_block) {
             throw Refusal{std::string(device.facts.name) + " has " + bytes_text(device.facts.shared_per_block) +
                           " of shared memory per block; the kernel needs " + bytes_text(shared)};
           }
         }) == PluginStatus::ok;
}

PluginStatus run(const Problem& p, PluginText text) {
  return guarded(text, [&] {
    const int ordinal = ordinal_of(p);
    Device& device = device_of(ordinal);
    const OnDevice current(ordinal);
    if (p.device >= 0) {  // nothing passes through the staging chunks
      launch(p, device.facts, device.memory, static_cast<Stream*>(p.stream));
      return;
    }
    const std::lock_guard<std::mutex> lock(device.staging_mutex);
    launch(p, device.facts, device.memory, device.memory.staging.stream());
  });
}

const char* scores_text(const Problem& p, const Choice& choice) {
  if (p.score == Score::additive) return ", additive scores, ";
  return choice.general ? ", general scores, " : ", plain scores, ";
}

PluginStatus align_arrays(const Alignment& x, PluginText text) {
  return guarded(text, [&] {
    int ordinal = 0;
    check(current_device(&ordinal), "asking for the current GPU");
    Device& device = device_of(ordinal);
    const std::lock_guard<std::mutex> lock(device.staging_mutex);
    align(x, device.memory.pool, device.memory.staging);
  });
}

void describe(const Problem& p, PluginText text) {
  guarded(text, [&] {
    const Device& device = device_of(ordinal_of(p));
    std::string reason;
    const KernelTable* table = find_table(p, reason);
    const Choice choice = choose(p, *table, device.facts);
    const Plan plan = make_plan(p, choice, device.facts);
    const KernelTable::Tile& tile = choice.tile();
    say(text, std::string("forward on ") + device.facts.name + ", " + name(p.dtype) +
                  (choice.halved ? " as pairs of float16" : "") + (choice.hopper ? " Hopper" : "") +
                  " kernel of head_dim " + std::to_string(table->head_dim) + scores_text(p, choice) +
                  std::to_string(tile.rows) + " rows x " + std::to_string(tile.keys) + " keys, " +
                  std::to_string(plan.blocks) + " tasks on " + std::to_string(plan.grid) + " blocks, keys in " +
                  std::to_string(plan.parts) + (plan.parts == 1 ? " part" : " parts"));
  });
}

// --- a layer's steps ------------------------------------------------------------------------------------------

template <class Step>
PluginStatus queue_step(const Step& p, PluginText text) {
  return guarded(text, [&] {
    device_of(p.device);
    const OnDevice current(p.device);
    queue(p);
  });
}

void describe_linear(const Linear& p, PluginText text) {
  guarded(text, [&] { say(text, kernel_text(p) + " on " + device_of(p.device).facts.name); });
}

bool available(PluginText text) {
  std::string reason;
  const bool ok = ready(reason);
  say(text, reason);
  return ok;
}

void build(PluginText text) { say(text, build_text()); }

// --- memory --------------------------------------------------------------------------------------------------

PluginStatus allocate_array(int ordinal, int64_t bytes, void* stream, void** data, PluginText text) {
  return guarded(text, [&] {
    Device& device = device_of(ordinal);
    const OnDevice current(ordinal);
    *data = device.memory.pool.take(bytes, static_cast<Stream*>(stream));
  });
}

void release_array(int ordinal, void* data, void* stream) {
  char ignored[8];
  guarded({ignored, sizeof(ignored)}, [&] { device_of(ordinal).memory.pool.give(data, static_cast<Stream*>(stream)); });
}

PluginStatus copy_array(int ordinal, void* to, const void* from, int64_t bytes, void* stream, PluginText text) {
  return guarded(text, [&] {
    device_of(ordinal);
    const OnDevice current(ordinal);
    check(copy(to, from, static_cast<size_t>(bytes), static_cast<Stream*>(stream)), "copying an array");
    check(synchronize(static_cast<Stream*>(stream)), "copying an array");
  });
}

PluginStatus synchronize_device(int ordinal, void* stream, PluginText text) {
  return guarded(text, [&] {
    device_of(ordinal);
    const OnDevice current(ordinal);
    check(synchronize(static_cast<Stream*>(stream)), "waiting for the GPU");
  });
}

PluginStatus order(int ordinal, void* before, void* after, PluginText text) {
  return guarded(text, [&] {
    if (before == after) return;
    Device& device = device_of(ordinal);
    const OnDevice current(ordinal);
    const std::lock_guard<std::mutex> lock(device.order_mutex);
    if (!device.order) check(make_event(&device.order), "making an event");
    check(record(device.order, static_cast<Stream*>(before)), "ordering two streams");
    check(wait_on_device(static_cast<Stream*>(after), device.order), "ordering two streams");
  });
}

PluginStatus device_of_array(const void* data, int* device, PluginText text) {
  return guarded(text, [&] { check(device_of_memory(data, device), "asking where an array is"); });
}

PluginStatus memory(int ordinal, DeviceMemory* out, PluginText text) {
  return guarded(text, [&] { *out = device_of(ordinal).memory.pool.stats(); });
}

PluginStatus trim(int ordinal, PluginText text) {
  return guarded(text, [&] {
    Device& device = device_of(ordinal);
    const OnDevice current(ordinal);
    device.memory.pool.trim();
  });
}

const PluginTable kTable{plugin_hash(),
                         available,
                         supports,
                         run,
                         align_arrays,
                         describe,
                         build,
                         queue_step<Linear>,
                         queue_step<Norm>,
                         queue_step<Elementwise>,
                         describe_linear,
                         allocate_array,
                         release_array,
                         copy_array,
                         synchronize_device,
                         order,
                         device_of_array,
                         memory,
                         trim};

}  // namespace

void check(int error, const char* what) {
  if (error == 0) return;
  const std::string text = std::string(what) + ": " + error_text(error);
  if (is_out_of_memory(error)) throw OutOfMemory{text};
  if (lacks_code(error)) throw Refusal{text + " (this build has code for: " + build_text() + ")"};
  if (loses_context(error)) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    s.ready.store(false, std::memory_order_relaxed);
    s.lost = "the CUDA context of this process is lost (" + text + "); start the process again";
    throw Refusal{s.lost};
  }
  throw Refusal{text};
}

}  // namespace qkv::cuda

extern "C" __attribute__((visibility("default"))) const qkv::PluginTable* qkv_cuda_plugin() {
  return &qkv::cuda::kTable;
}
