// SPDX-License-Identifier: Apache-2.0
// The registry, and the loader of the CUDA plugin.
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

#include <mutex>

#include "qkv/backend.h"
#include "qkv/error.h"
#include "qkv/layers.h"
#include "qkv/plugin.h"

namespace qkv {

extern const Backend cpu_backend, reference_backend;
void align_on_cpu(const Alignment&);

namespace {

std::string plugin_folder;

struct Plugin {
  const PluginTable* table = nullptr;
  std::string reason;  // why there is none
};

Plugin load_plugin() {
  Plugin plugin;
  const std::string path = plugin_folder + "/libqkv_cuda.so";
  if (access(path.c_str(), F_OK) != 0) {
    plugin.reason =
        "this installation has no CUDA plugin (libqkv_cuda.so beside the package): it was built without, because "
        "of " QKV_CUDA_STATUS;
    return plugin;
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    plugin.reason = std::string("libqkv_cuda.so does not load: ") + dlerror();
    return plugin;
  }
  const auto entry = reinterpret_cast<PluginEntry>(dlsym(library, kPluginSymbol));
  const PluginTable* table = entry ? entry() : nullptr;
  if (!table || table->hash != plugin_hash()) {
    plugin.reason = "libqkv_cuda.so is from another build of qkv; reinstall both together";
    return plugin;
  }
  plugin.table = table;
  return plugin;
}

// Loaded at first need: importing touches no driver. A library that was loaded stays loaded.
const Plugin& plugin() {
  static std::mutex mutex;
  static std::string folder;
  static const Plugin* loaded = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded || folder != plugin_folder) {
    loaded = new Plugin(load_plugin());
    folder = plugin_folder;
  }
  return *loaded;
}

struct Text {  // a buffer for the plugin's words
  char data[512] = "";
  operator PluginText() { return {data, sizeof(data)}; }
};

bool cuda_available(std::string& reason) {
  const Plugin& p = plugin();
  reason = p.reason;
  if (!p.table) return false;
  Text text;
  const bool ok = p.table->available(text);
  if (!ok) reason = text.data;
  return ok;
}

void check(PluginStatus status, const std::string& where, const Text& text) {
  if (status == PluginStatus::out_of_memory) throw MemoryError(where + ": cuda: " + text.data);
  if (status != PluginStatus::ok) throw BackendError(where + ": cuda: " + text.data);
}

const Backend cuda_backend{
    "cuda",
    cuda_available,
    [](const Problem& p, std::string& reason) {
      Text text;
      const bool ok = plugin().table->supports(p, text);
      if (!ok) reason = text.data;
      return ok;
    },
    [](const Problem& p) {
      Text text;
      check(plugin().table->run(p, text), p.function, text);
    },
    [](const Problem& p) {
      Text text;
      plugin().table->describe(p, text);
      return std::string(text.data);
    },
};

const PluginTable& device_table(const char* function) {
  std::string reason;
  if (!cuda_available(reason)) throw BackendError(std::string(function) + ": cuda: " + reason);
  return *plugin().table;
}

}  // namespace

void align(const Alignment& x, const std::string& backend) {
  if (backend != cuda_backend.name) return align_on_cpu(x);
  Text text;
  check(device_table(x.function).align(x, text), x.function, text);
}

void run(const Linear& p) {
  Text text;
  check(device_table(p.function).linear(p, text), p.function, text);
}
void run(const Norm& p) {
  Text text;
  check(device_table(p.function).norm(p, text), p.function, text);
}
void run(const Elementwise& p) {
  Text text;
  check(device_table(p.function).elementwise(p, text), p.function, text);
}
std::string describe(const Linear& p) {
  Text text;
  device_table(p.function).describe_linear(p, text);
  return text.data;
}

bool device_ready() {
  const PluginTable* const table = plugin().table;
  return table && table->available({nullptr, 0});
}

void set_plugin_folder(const std::string& folder) { plugin_folder = folder; }

// --- device memory -------------------------------------------------------------------------------------------

std::string cuda_build() {
  if (!plugin().table) return "";
  Text text;
  plugin().table->build(text);
  return text.data;
}

void* device_allocate(int device, int64_t bytes, void* stream) {
  Text text;
  void* data = nullptr;
  check(device_table("DeviceArray").allocate(device, bytes, stream, &data, text), "DeviceArray", text);
  return data;
}

void device_release(int device, void* data, void* stream) {
  if (plugin().table) plugin().table->release(device, data, stream);
}

void device_copy(int device, void* to, const void* from, int64_t bytes, void* stream) {
  Text text;
  check(device_table("DeviceArray").copy(device, to, from, bytes, stream, text), "DeviceArray", text);
}

void device_synchronize(int device, void* stream) {
  Text text;
  check(device_table("synchronize").synchronize(device, stream, text), "synchronize", text);
}

void device_order(int device, void* before, void* after) {
  Text text;
  check(device_table("DeviceArray").order(device, before, after, text), "DeviceArray", text);
}

int device_of(const void* data) {
  Text text;
  int device = -1;
  check(device_table("DeviceArray").device_of(data, &device, text), "DeviceArray", text);
  return device;
}

DeviceMemory device_memory(int device) {
  Text text;
  DeviceMemory memory;
  check(device_table("device_memory").memory(device, &memory, text), "device_memory", text);
  return memory;
}

void device_trim(int device) {
  Text text;
  check(device_table("trim_device_memory").trim(device, text), "trim_device_memory", text);
}

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list{&cuda_backend, &cpu_backend, &reference_backend};
  return list;
}

namespace {

constexpr const char* kKnownNames = "'auto', 'cuda', 'cpu' or 'reference'";

// "auto" goes where the arrays are. The reference is a specification, thousands of times slower, and only taken when
// asked for.
const Backend& automatic(const Problem& p) { return p.device < 0 ? cpu_backend : cuda_backend; }

std::string refusal(const Backend& b, const Problem& p) {
  std::string reason;
  const bool here = p.device < 0 || &b == &cuda_backend;
  if (here && b.available(reason) && b.supports(p, reason)) return "";
  return std::string(b.name) + ": " + (here ? reason : "the arrays are in GPU memory; it computes in host memory");
}

}  // namespace

const Backend& select_backend(const Problem& p, const std::string& requested, std::vector<std::string>* refusals) {
  std::string all;
  const auto note = [&](const std::string& text) {
    all += (all.empty() ? "" : "; ") + text;
    if (refusals) refusals->push_back(text);
  };
  if (requested != "auto") {
    const Backend* named = nullptr;
    for (const Backend* b : backends()) named = requested == b->name ? b : named;
    if (!named) throw ValueError(std::string(p.function) + ": backend is '" + requested + "'; expected " + kKnownNames);
    const Backend& b = *named;
    const std::string text = refusal(b, p);
    if (text.empty()) return b;
    note(text);
  } else {
    const std::string text = refusal(automatic(p), p);
    if (text.empty()) return automatic(p);
    note(text);
  }
  throw BackendError(std::string(p.function) + ": no backend can run this (" + all + ")");
}

}  // namespace qkv
