// SPDX-License-Identifier: Apache-2.0
// The backend "cpu": picks the level, sizes scratch, hands tasks to threads.
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <new>
#include <string>
#include <vector>

#include "cpu/detect.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "qkv/qkv.h"

#define QKV_LEVEL_ROW(level) extern const KernelTable level##_table;
namespace qkv {
QKV_LEVEL_ROWS
}
#undef QKV_LEVEL_ROW

namespace qkv {
namespace {

#define QKV_LEVEL_ROW(level) &level##_table,
const KernelTable* const kTables[] = {QKV_LEVEL_ROWS};  // worst to best
#undef QKV_LEVEL_ROW

// The best that this processor runs, or nullptr. Asked once: cpuid costs tens of microseconds in a virtual machine.
const KernelTable* best_table() {
  static const KernelTable* const best = [] {
    const KernelTable* found = nullptr;
    for (const KernelTable* t : kTables) {
      if (cpu_runs(t->level)) found = t;
    }
    return found;
  }();
  return best;
}

const KernelTable* find_table(const std::string& level) {
  std::string known;
  for (const KernelTable* t : kTables) {
    if (level == t->level && cpu_runs(t->level)) return t;
    if (cpu_runs(t->level)) known += (known.empty() ? "" : ", ") + std::string(t->level);
  }
  throw ValueError("set_cpu_level: level is '" + level + "'; expected one of those that this processor runs: " + known);
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table = [] {
    const char* forced = getenv("QKV_CPU_LEVEL");
    return forced && *forced ? find_table(forced) : best_table();
  }();
  return table;
}

const KernelTable& table() { return *active().load(std::memory_order_relaxed); }

// Below this many FLOP waking a second thread costs more than it saves.
constexpr double kFlopPerThread = 2.5e6;

double flop(const Problem& p) {
  const double heads = static_cast<double>(result_heads(p)) * static_cast<double>(p.cu_q ? 1 : p.B);
  const double pairs = heads * static_cast<double>(result_rows(p)) * static_cast<double>(p.Sk);
  const int64_t term = p.score == Score::additive ? 4 : 1;  // costs of a multiply-add
  return 2 * pairs * static_cast<double>(term * p.D + p.Dv + 16);
}

// A byte of K or V costs as much as some FLOP where each is used once (decoding).
constexpr double kFlopPerByte = 8;

double bytes_read(const Problem& p) {
  const double rows = static_cast<double>(p.cu_q ? 1 : p.B) * static_cast<double>(p.Hkv) * static_cast<double>(p.Sk);
  return rows * static_cast<double>((p.D + p.Dv) * itemsize(p.dtype));
}

// How many threads the work is worth, if it can be cut into so many tasks.
int threads_for(const Problem& p) {
  const double useful = (flop(p) + kFlopPerByte * bytes_read(p)) / kFlopPerThread;
  if (useful < 2) return 1;
  const int limit = thread_limit();
  return useful < static_cast<double>(limit) ? static_cast<int>(useful) : limit;
}

constexpr size_t kHugePage = size_t{2} << 20;

struct Memory {  // aligned to a cache line, or as asked
  void* data;
  explicit Memory(size_t bytes, size_t alignment = 64)
      : data(aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)) {
    if (!data) throw std::bad_alloc();
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// Small calls come often: each calling thread keeps a little memory for them. It may be in use: a poll runs what the
// caller wants, a signal's handler for one, and that may call attention.
constexpr int64_t kKept = int64_t{1} << 20;
struct Kept {
  Memory memory{kKept};
  bool in_use = false;
};
Kept& kept() {
  static thread_local Kept mine;
  return mine;
}

struct Call {
  const Problem* problem;
  const KernelTable* table;
  Plan plan;
  char* scratch;
  char* partials;
};

void run_one(void* context, int64_t task, int worker) {
  const Call& c = *static_cast<const Call*>(context);
  c.table->run_task(*c.problem, c.plan, task, c.scratch + worker * c.plan.scratch_bytes, c.partials, worker);
}
void merge_one(void* context, int64_t task, int worker) {
  const Call& c = *static_cast<const Call*>(context);
  c.table->run_merge(*c.problem, c.plan, task, c.scratch + worker * c.plan.scratch_bytes, c.partials);
}

// So many bytes of partial results one thread merges sooner than it wakes another.
constexpr int64_t kMergeAlone = int64_t{1} << 18;

int width_of(const Plan& plan, int threads) { return plan.tasks < threads ? static_cast<int>(plan.tasks) : threads; }

void run_cpu(const Problem& p) {
  const KernelTable& t = table();
  const int threads = threads_for(p);
  Call call{&p, &t, t.plan(p, threads, t.dots), nullptr, nullptr};
  const Plan& plan = call.plan;
  if (plan.tasks == 0) return;
  const int width = width_of(plan, threads);
  const int64_t bytes = plan.partials_bytes + plan.scratch_bytes * width;
  const auto go = [&](void* memory) {
    call.partials = static_cast<char*>(memory);
    call.scratch = call.partials + plan.partials_bytes;
    parallel_for(plan.tasks, width, run_one, &call, p.control);
    if (plan.merges > 0 && !stopped(p)) {
      const bool share = plan.partials_bytes > kMergeAlone;
      parallel_for(plan.merges, share ? width : 1, merge_one, &call, p.control);
    }
  };
  Kept* const mine = bytes <= kKept ? &kept() : nullptr;
  if (mine && !mine->in_use) {
    mine->in_use = true;
    go(mine->memory.data);
    mine->in_use = false;
  } else {
    const Memory memory(static_cast<size_t>(bytes));
    go(memory.data);
  }
}

std::string describe_cpu(const Problem& p) {
  const KernelTable& t = table();
  const int threads = threads_for(p);
  const Plan plan = t.plan(p, threads, t.dots);
  const int width = plan.tasks == 0 ? 1 : width_of(plan, threads);
  const Choice choice = t.choose(p, t.dots);
  const auto count = [](int64_t n, const char* what) { return std::to_string(n) + what + (n == 1 ? "" : "s"); };
  return std::string(choice.kernel) + ", level " + (choice.level ? choice.level : t.level) + " (" +
         std::to_string(t.vector_bytes * 8) + "-bit vectors), tiles of " + count(choice.lanes, " lane") + " x " +
         std::to_string(t.keys) + " keys, " + count(plan.tasks, " task") + " of " +
         (plan.chunks > 0 ? count(plan.task_rows, " row") : count(plan.parts, " part") + " of the keys") + " on " +
         count(width, " thread");
}

}  // namespace

extern const Backend cpu_backend;
const Backend cpu_backend{
    "cpu",
    [](std::string& reason) {
      if (best_table()) return true;
      reason = "this processor runs none of the levels that were compiled";
      return false;
    },
    [](const Problem&, std::string&) { return true; },
    run_cpu,
    describe_cpu,
};

std::vector<std::string> cpu_levels() {
  std::vector<std::string> levels;
  for (const KernelTable* t : kTables) {
    if (cpu_runs(t->level)) levels.push_back(t->level);
  }
  return levels;
}

std::string cpu_level() { return best_table() ? table().level : "none"; }
void set_cpu_level(const std::string& level) { active().store(find_table(level), std::memory_order_relaxed); }
int get_num_threads() { return thread_limit(); }
void set_num_threads(int n) {
  if (n < 1 || n > 1024) {
    throw ValueError("set_num_threads: n is " + std::to_string(n) + "; expected 1 to 1024");
  }
  set_thread_limit(n);
}

// --- monotonic alignments ------------------------------------------------------------------------------------

namespace {

struct AlignCall {
  const Alignment* alignment;
  const KernelTable* table;
  int64_t scratch_bytes;
  char* scratch;
};

}  // namespace

void align_on_cpu(const Alignment& x) {
  if (x.heads == 0 || x.rows == 0 || x.keys == 0) return;
  AlignCall call{&x, &table(), 0, nullptr};
  call.scratch_bytes = (call.table->align_bytes(x) + 63) / 64 * 64;
  const double flop = 50.0 * static_cast<double>(x.heads) * static_cast<double>(x.rows) * static_cast<double>(x.keys);
  const int limit = flop < 2 * kFlopPerThread ? 1 : thread_limit();
  const int width = x.heads < limit ? static_cast<int>(x.heads) : limit;
  const Memory memory(static_cast<size_t>(call.scratch_bytes * width));
  call.scratch = static_cast<char*>(memory.data);
  parallel_for(
      x.heads, width,
      [](void* context, int64_t head, int worker) {
        const auto& c = *static_cast<const AlignCall*>(context);
        c.table->align(*c.alignment, head, c.scratch + worker * c.scratch_bytes);
      },
      &call, nullptr);
}

// --- rotary embedding ----------------------------------------------------------------------------------------

namespace {

constexpr int64_t kTurnedAtOnce = int64_t{1} << 14;  // elements of a task
constexpr int64_t kTurnedAlone = int64_t{1} << 16;   // so many one thread turns sooner than it wakes another

struct RotateCall {
  const Rotation* rotation;
  const KernelTable* table;
  int64_t task_rows, scratch_bytes;
  char* scratch;
};

}  // namespace

void rotate(const Rotation& r) {
  const int64_t rows = r.outer * r.rows;
  if (rows == 0 || r.D == 0) return;
  RotateCall call{&r, &table(), r.D < kTurnedAtOnce ? kTurnedAtOnce / r.D : 1, (2 * r.D * 8 + 63) / 64 * 64, nullptr};
  const int64_t tasks = (rows + call.task_rows - 1) / call.task_rows;
  const int limit = rows * r.D < kTurnedAlone ? 1 : thread_limit();
  const int width = tasks < limit ? static_cast<int>(tasks) : limit;
  const Memory memory(static_cast<size_t>(call.scratch_bytes * width));
  call.scratch = static_cast<char*>(memory.data);
  parallel_for(
      tasks, width,
      [](void* context, int64_t task, int worker) {
        const auto& c = *static_cast<const RotateCall*>(context);
        const int64_t all = c.rotation->outer * c.rotation->rows, first = task * c.task_rows;
        const int64_t end = first + c.task_rows < all ? first + c.task_rows : all;
        c.table->rotate(*c.rotation, first, end, c.scratch + worker * c.scratch_bytes);
      },
      &call, nullptr);
}

// --- the machine's limits ------------------------------------------------------------------------------------

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct PeakRun {
  const KernelTable* table;
  DType dtype;
  const char* data;
  int64_t amount;
  std::atomic<double> done{0};
};

}  // namespace

double fma_peak(DType dtype, int threads) {
  PeakRun run{&table(), dtype, nullptr, 400000};
  const double start = seconds();
  parallel_for(
      threads * 8, threads,
      [](void* context, int64_t, int) {
        auto& r = *static_cast<PeakRun*>(context);
        r.done.fetch_add(r.table->fma_loop(r.dtype, r.amount, r.table->dots));
      },
      &run, nullptr);
  return run.done.load() / (seconds() - start);
}

double read_bandwidth(int64_t bytes, int threads) {
  constexpr int64_t kPart = int64_t{1} << 20;
  const int64_t parts = bytes / kPart;
  const auto size = static_cast<size_t>(parts * kPart);
  const Memory memory(size, kHugePage);
  madvise(memory.data, size, MADV_HUGEPAGE);  // as NumPy asks for its arrays: else reading seems half as fast
  char* data = static_cast<char*>(memory.data);
  for (int64_t i = 0; i < parts * kPart; i += 64) data[i] = static_cast<char>(i >> 6);
  PeakRun run{&table(), DType::f32, data, kPart};
  const auto read = [&] {
    parallel_for(
        parts, threads,
        [](void* context, int64_t part, int) {
          auto& r = *static_cast<PeakRun*>(context);
          r.done.fetch_add(r.table->read_loop(r.data + part * r.amount, r.amount));
        },
        &run, nullptr);
  };
  read();  // what has just been written is still on its way to memory
  const double start = seconds();
  read();
  return static_cast<double>(parts * kPart) / (seconds() - start);
}

}  // namespace qkv
