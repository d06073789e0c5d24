// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace qkv {
namespace {

constexpr int kMaxWorkers = 1024;
constexpr int kSpin = 2000;  // pauses (about 20 us) a worker or caller waits before it sleeps

struct Job {
  TaskFunction run;
  void* context;
  Control* control;
  int64_t count;
  std::atomic<int64_t> next{0};
};

struct alignas(64) Worker {
  std::atomic<Job*> slot{nullptr};  // nullptr: idle; taken(): reserved or at work; else a job on offer
  int id = 0;                       // worker number in the job on offer
  std::atomic<int> signal{0};       // rises with each offer; the worker sleeps on it
  std::atomic<int> finished{0};     // rises with each job it leaves; a caller may sleep on it
  std::atomic<int> thread{0};       // of the kernel's numbers
  std::atomic<bool> asleep{false};
  std::atomic<bool> moving{false};  // its affinity is a caller's for a moment
};

Job* taken() { return reinterpret_cast<Job*>(1); }

struct Team {
  std::mutex growing;
  int requested = 0;         // workers asked of OpenMP, under the mutex
  std::atomic<int> size{0};  // workers that serve
  Worker worker[kMaxWorkers];
};

// Never destroyed: workers sleep in it until the process ends. A forked child starts with an empty one, since the
// parent's workers do not exist there and its mutex may be held.
std::atomic<Team*> the_team{nullptr};
std::atomic<int> chosen_limit{0};  // 0: not chosen
#ifdef _OPENMP
const int runtime_default = omp_get_max_threads();
#endif

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

// The next task. Who works alone needs no atomic addition, which takes as long as a piece of a small task.
int64_t take(Job& job, bool alone) {
  if (!alone) return job.next.fetch_add(1, std::memory_order_relaxed);
  const int64_t task = job.next.load(std::memory_order_relaxed);
  job.next.store(task + 1, std::memory_order_relaxed);
  return task;
}

void work_on(Job& job, int worker) {
  for (;;) {
    if (job.control && __atomic_load_n(&job.control->stop, __ATOMIC_RELAXED)) return;
    const int64_t task = take(job, false);
    if (task >= job.count) return;
    job.run(job.context, task, worker);
  }
}

// While this lives, a worker that sleeps may not wake on the caller's core. A kernel may put it there although others
// are idle (in a virtual machine their halted cores look busy), and it would wait until the caller has done all the
// work. Once woken it stays where it was put.
class Elsewhere {
 public:
  explicit Elsewhere(Worker& w) : worker_(w), thread_(w.thread.load(std::memory_order_acquire)) {
    if (thread_ == 0 || !w.asleep.load(std::memory_order_acquire)) return;
    claimed_ = !w.moving.exchange(true, std::memory_order_acquire);
    const int here = sched_getcpu();
    if (!claimed_ || here < 0 || here >= CPU_SETSIZE || sched_getaffinity(thread_, sizeof(home_), &home_) != 0) return;
    cpu_set_t others = home_;
    CPU_CLR(here, &others);
    moved_ = CPU_COUNT(&others) > 0 && sched_setaffinity(thread_, sizeof(others), &others) == 0;
  }
  ~Elsewhere() {
    if (moved_) sched_setaffinity(thread_, sizeof(home_), &home_);
    if (claimed_) worker_.moving.store(false, std::memory_order_release);
  }
  Elsewhere(const Elsewhere&) = delete;
  Elsewhere& operator=(const Elsewhere&) = delete;

 private:
  Worker& worker_;
  const int thread_;
  cpu_set_t home_;
  bool claimed_ = false, moved_ = false;
};

void serve(Worker& self) {
  self.thread.store(static_cast<int>(syscall(SYS_gettid)), std::memory_order_release);
  for (;;) {
    const int seen = self.signal.load(std::memory_order_acquire);
    Job* job = self.slot.load(std::memory_order_acquire);
    for (int i = 0; i < kSpin && (job == nullptr || job == taken()); ++i) {
      pause();
      job = self.slot.load(std::memory_order_acquire);
    }
    if (job == nullptr || job == taken()) {
      self.asleep.store(true, std::memory_order_release);
      self.signal.wait(seen, std::memory_order_acquire);
      self.asleep.store(false, std::memory_order_release);
      continue;
    }
    const int id = self.id;
    if (!self.slot.compare_exchange_strong(job, taken(), std::memory_order_acq_rel)) continue;  // withdrawn
    work_on(*job, id);
    // From here on the caller may be gone, and the job with it.
    self.finished.fetch_add(1, std::memory_order_release);
    self.finished.notify_all();
    self.slot.store(nullptr, std::memory_order_release);
  }
}

struct Recruits {
  Team* team;
  int first, count;
};

void* lead(void* argument) {
  const Recruits recruits = *static_cast<Recruits*>(argument);
  delete static_cast<Recruits*>(argument);
#ifdef _OPENMP
#pragma omp parallel num_threads(recruits.count)
  {
    if (omp_get_thread_num() == 0) recruits.team->size.store(recruits.first + omp_get_num_threads());
    serve(recruits.team->worker[recruits.first + omp_get_thread_num()]);
  }
#else
  recruits.team->size.store(recruits.first + 1);
  serve(recruits.team->worker[recruits.first]);
#endif
  return nullptr;
}

// Asks OpenMP for more workers. They join when they run; until then, and if there are none to be had, the caller
// works alone.
void grow(Team& team, int workers) {
  const std::lock_guard<std::mutex> lock(team.growing);
  if (workers > kMaxWorkers) workers = kMaxWorkers;
  if (team.requested >= workers) return;
  auto* recruits = new (std::nothrow) Recruits{&team, team.requested, workers - team.requested};
  if (!recruits) return;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  sigset_t all, before;  // signals are the callers' affair
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t leader;
  if (pthread_create(&leader, &attributes, lead, recruits) == 0) team.requested = workers;
  else delete recruits;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
}

Team& team() {
  Team* t = the_team.load(std::memory_order_acquire);
  if (t) return *t;
  static std::once_flag once;
  std::call_once(once, [] {
    the_team.store(new Team);
    pthread_atfork(nullptr, nullptr, [] { the_team.store(new Team); });
  });
  return *the_team.load(std::memory_order_acquire);
}

int read_quota(const char* path) {  // cgroup v2: "quota period" in microseconds, or "max ..."
  FILE* f = fopen(path, "r");
  if (!f) return 0;
  long long quota = 0, period = 0;
  const int fields = fscanf(f, "%lld %lld", &quota, &period);
  fclose(f);
  return fields == 2 && quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

[[maybe_unused]] int usable_cores() {
  cpu_set_t set;
  int cores =
      sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  static const int quota = read_quota("/sys/fs/cgroup/cpu.max");
  if (quota > 0 && quota < cores) cores = quota;
  return cores < 1 ? 1 : cores;
}

}  // namespace

int thread_limit() {
#ifdef _OPENMP
  const int chosen = chosen_limit.load(std::memory_order_relaxed), runtime = omp_get_max_threads();
  // set_num_threads may ask for more than the cores; without it they are the limit. A lower limit of the calling
  // thread (threadpoolctl, omp_set_num_threads) holds either way.
  int limit = chosen ? chosen : usable_cores();
  if (runtime < limit && (!chosen || runtime < runtime_default)) limit = runtime;
  return omp_in_parallel() || limit < 1 ? 1 : limit;
#else
  return 1;
#endif
}

void set_thread_limit(int n) { chosen_limit.store(n, std::memory_order_relaxed); }

namespace {

struct Offer {
  Worker* worker;
  int finished;  // its count before this job
};

int offer_work(Team& t, Job& job, int wanted, Offer* offers) {
  int made = 0;
  const int size = t.size.load(std::memory_order_acquire);
  for (int i = 0; i < size && made < wanted; ++i) {
    Worker& w = t.worker[i];
    Job* idle = nullptr;
    if (w.slot.load(std::memory_order_relaxed) != nullptr) continue;
    if (!w.slot.compare_exchange_strong(idle, taken(), std::memory_order_acq_rel)) continue;
    offers[made++] = {&w, w.finished.load(std::memory_order_acquire)};
    w.id = made;
    const Elsewhere woken(w);
    w.slot.store(&job, std::memory_order_release);
    w.signal.fetch_add(1, std::memory_order_release);
    w.signal.notify_one();
  }
  return made;
}

void wait_for(const Offer& offer, Control* control) {
  int finished = offer.finished;
  for (int i = 0; i < kSpin && finished == offer.finished; ++i) {
    pause();
    finished = offer.worker->finished.load(std::memory_order_acquire);
  }
  while (finished == offer.finished) {
    if (control && control->poll) {  // a worker may be long at its task: Ctrl-C must still be seen
      usleep(50);
      control->poll(*control);
    } else {
      offer.worker->finished.wait(finished, std::memory_order_acquire);
    }
    finished = offer.worker->finished.load(std::memory_order_acquire);
  }
}

}  // namespace

void parallel_for(int64_t count, int width, TaskFunction run, void* context, Control* control) {
  Job job{run, context, control, count};
  if (width > count) width = static_cast<int>(count);
  if (width > kMaxWorkers) width = kMaxWorkers;
  Offer offers[kMaxWorkers];
  int made = 0;
  if (width > 1) {
    Team& t = team();
    if (t.size.load(std::memory_order_acquire) < width - 1) grow(t, width - 1);
    made = offer_work(t, job, width - 1, offers);
  }
  for (;;) {  // as work_on, with the caller's poll between tasks
    if (control && __atomic_load_n(&control->stop, __ATOMIC_RELAXED)) break;
    const int64_t task = take(job, made == 0);
    if (task >= count) break;
    run(context, task, 0);
    if (control && control->poll) control->poll(*control);
  }
  for (int i = 0; i < made; ++i) {
    Job* on_offer = &job;  // a worker that has not woken is not waited for
    if (offers[i].worker->slot.compare_exchange_strong(on_offer, nullptr, std::memory_order_acq_rel)) continue;
    wait_for(offers[i], control);
  }
}

}  // namespace qkv
