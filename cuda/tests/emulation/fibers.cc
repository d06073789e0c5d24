// SPDX-License-Identifier: Apache-2.0
#include "fibers.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <set>

#include "races.h"

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  jmp_buf state;
  ucontext_t first;  // to begin with; afterwards _longjmp, which makes no system call
  char* stack = nullptr;
  bool begun = false, done = true, waiting = false;
};

struct Meeting {  // of a warp or of the block
  int come = 0;
  const char* kind = nullptr;
  void* brought[kMaxThreads];
};

struct Machine {
  Fiber fiber[kMaxThreads];
  Meeting warp[kMaxThreads / 32], group[kMaxThreads / 128], some[16], block;
  jmp_buf scheduler;
  ucontext_t home;
  int threads = 0, current = 0, running = 0;
  uint32_t random = 1;
  std::set<uint64_t*> waited;  // barriers whose last phase somebody has waited for
  Program program = nullptr;
  void* context = nullptr;
} machine;

void yield() {
  if (_setjmp(machine.fiber[machine.current].state) == 0) _longjmp(machine.scheduler, 1);
}

void fiber_main() {
  for (;;) {  // one turn per block
    machine.program(machine.context);
    machine.fiber[machine.current].done = true;
    --machine.running;
    yield();
  }
}

void resume(int i) {
  machine.current = i;
  if (_setjmp(machine.scheduler) != 0) return;
  Fiber& f = machine.fiber[i];
  if (f.begun) _longjmp(f.state, 1);
  f.begun = true;
  if (!f.stack) f.stack = static_cast<char*>(malloc(kStack));
  getcontext(&f.first);
  f.first.uc_stack.ss_sp = f.stack;
  f.first.uc_stack.ss_size = kStack;
  f.first.uc_link = nullptr;
  makecontext(&f.first, fiber_main, 0);
  setcontext(&f.first);
}

uint32_t next_random() {
  machine.random = machine.random * 1664525u + 1013904223u;
  return machine.random >> 8;
}

void meet(Meeting& meeting, int first, int n, const char* kind, void* brought, Combine combine) {
  const int me = machine.current;
  if (meeting.come == 0) meeting.kind = kind;
  if (strcmp(meeting.kind, kind) != 0) fail("threads of one warp or block are in different instructions");
  meeting.brought[me - first] = brought;
  if (++meeting.come < n) {
    machine.fiber[me].waiting = true;
    do yield();
    while (machine.fiber[me].waiting);
    return;
  }
  combine(meeting.brought, n);
  if (&meeting == &machine.block) pass_barrier();
  meeting.come = 0;
  for (int i = first; i < first + n; ++i) machine.fiber[i].waiting = false;
}

}  // namespace

void pause() { yield(); }

int current_thread() { return machine.current; }

void meet_warp(const char* kind, void* brought, Combine combine) {
  const int warp = machine.current / 32;
  meet(machine.warp[warp], warp * 32, 32, kind, brought, combine);
}
void meet_group(const char* kind, void* brought, Combine combine) {
  const int group = machine.current / 128;
  meet(machine.group[group], group * 128, 128, kind, brought, combine);
}
namespace {
// Counts the current fiber; the last of n frees those that wait. Has it come?
bool joins_some(int id, int n, Fiber* waits) {
  Meeting& meeting = machine.some[id];
  meeting.brought[meeting.come++] = waits;
  if (meeting.come < n) return false;
  meeting.come = 0;
  for (int i = 0; i < n; ++i) {
    if (meeting.brought[i]) static_cast<Fiber*>(meeting.brought[i])->waiting = false;
  }
  return true;
}
}  // namespace

void meet_some(const char*, int id, int n) {
  Fiber& me = machine.fiber[machine.current];
  me.waiting = true;
  if (joins_some(id, n, &me)) return;
  do yield();
  while (me.waiting);
}
void waited_at(uint64_t* barrier) { machine.waited.insert(barrier); }
void arrive_at(uint64_t* barrier) {
  const uint64_t arrivals = *barrier & 0xffff;
  uint64_t missing = (*barrier >> 16 & 0xffff) - 1, phase = *barrier >> 32;
  if (missing == 0) {
    if (phase > 0 && !machine.waited.count(barrier)) fail("a phase passes, and nobody has waited for the one before");
    machine.waited.erase(barrier);
    ++phase, missing = arrivals;
    pass_barrier();  // races.h does not ask for whom: it sees less of kernels that have such barriers
  }
  *barrier = arrivals | missing << 16 | phase << 32;
}
void arrive_some(const char*, int id, int n) { joins_some(id, n, nullptr); }
void meet_block(const char* kind, void* brought, Combine combine) {
  if (machine.running != machine.threads) fail("a barrier after some threads of the block have ended");
  meet(machine.block, 0, machine.threads, kind, brought, combine);
}

void fail(const char* message) {
  fprintf(stderr, "emulated kernel, thread %d: %s\n", machine.current, message);
  abort();
}

void run_block(int threads, Program program, void* context) {
  machine.threads = machine.running = threads;
  machine.program = program;
  machine.context = context;
  machine.waited.clear();
  for (int i = 0; i < threads; ++i) machine.fiber[i].done = machine.fiber[i].waiting = false;
  while (machine.running > 0) {
    bool moved = false;
    const int warps = threads / 32, start = static_cast<int>(next_random() % static_cast<uint32_t>(warps));
    for (int w = 0; w < warps; ++w) {
      const int first = (start + w) % warps * 32, turn = static_cast<int>(next_random() % 32);
      for (int i = 0; i < 32; ++i) {
        const int thread = first + (turn + i) % 32;
        if (machine.fiber[thread].done || machine.fiber[thread].waiting) continue;
        moved = true;
        resume(thread);
      }
    }
    if (!moved) fail("all threads wait: a barrier or warp instruction that some never reach");
  }
  for (const Meeting& meeting : machine.some) {
    if (meeting.come > 0) fail("the block has ended, and a barrier counts threads that nobody waited for");
  }
}

}  // namespace emulation
