// SPDX-License-Identifier: Apache-2.0
// The registry, and the loader of the CUDA plugin.
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

#include <mutex>

#include "qkv/backend.h"
#include "qkv/error.h"
#include "qkv/plugin.h"

namespace qkv {

extern const Backend cpu_backend, reference_backend;

namespace {

std::string plugin_folder;

struct Plugin {
  const PluginTable* table = nullptr;
  std::string reason;  // why there is none
};

std::string from_buffer(bool (*call)(char*, size_t), bool* ok) {
  char text[512] = "";
  *ok = call(text, sizeof(text));
  return text;
}

Plugin load_plugin() {
  Plugin plugin;
  const std::string path = plugin_folder + "/libqkv_cuda.so";
  if (access(path.c_str(), F_OK) != 0) {
    plugin.reason =
        "this installation has no CUDA plugin (libqkv_cuda.so beside the package): it was built without CUDA";
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
  bool ok = false;
  plugin.reason = from_buffer(table->available, &ok);
  if (ok) plugin.table = table;
  return plugin;
}

// Loaded at first need: importing touches no driver.
const Plugin& plugin() {
  static const Plugin loaded = load_plugin();
  return loaded;
}

const Backend cuda_backend{
    "cuda",
    [](std::string& reason) {
      if (!plugin().table) reason = plugin().reason;
      return plugin().table != nullptr;
    },
    [](const Problem& p, std::string& reason) {
      char text[512] = "";
      const bool ok = plugin().table->supports(p, text, sizeof(text));
      if (!ok) reason = text;
      return ok;
    },
    [](const Problem& p) {
      char text[512] = "";
      if (!plugin().table->run(p, text, sizeof(text))) throw BackendError(std::string(p.function) + ": cuda: " + text);
    },
    [](const Problem&) { return std::string("CUDA plugin"); },
};

}  // namespace

void set_plugin_folder(const std::string& folder) { plugin_folder = folder; }

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list{&cuda_backend, &cpu_backend, &reference_backend};
  return list;
}

namespace {

constexpr const char* kKnownNames = "'auto', 'cuda', 'cpu' or 'reference'";

// "auto" goes where the arrays are, and these are host arrays: the CPU first. The reference is a specification,
// thousands of times slower, and only taken when asked for.
const Backend* automatic[] = {&cpu_backend};

std::string refusal(const Backend& b, const Problem& p) {
  std::string reason;
  if (b.available(reason) && b.supports(p, reason)) return "";
  return std::string(b.name) + ": " + reason;
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
    for (const Backend* b : automatic) {
      const std::string text = refusal(*b, p);
      if (text.empty()) return *b;
      note(text);
    }
  }
  throw BackendError(std::string(p.function) + ": no backend can run this (" + all + ")");
}

}  // namespace qkv
