// SPDX-License-Identifier: Apache-2.0
#include "races.h"

#include <stdio.h>

#include "fibers.h"

namespace emulation {
namespace {

constexpr size_t kMostBytes = 227 * 1024;
constexpr int kMany = -1;  // more than one thread

struct Access {
  uint32_t epoch = 0;  // between which barriers: they are numbered through all blocks
  int thread = kMany;

  bool by_others(uint32_t now, int me) const { return epoch == now && thread != me; }
  void note(uint32_t now, int me) { *this = {now, epoch == now && thread != me ? kMany : me}; }
};

struct Byte {
  Access written, read, changed;  // changed: by atomics
  bool coming = false;            // a copy is under way
};

struct Watch {
  const char* shared = nullptr;
  size_t bytes = 0;
  uint32_t epoch = 1, first = 1;  // first: of this block
  Byte byte[kMostBytes];
} watch;

[[noreturn]] void report(const char* what, size_t at, const char* other, const Access& access) {
  char text[200];
  if (access.thread == kMany) snprintf(text, sizeof(text), "%s byte %zu of shared memory, %s", what, at, other);
  else snprintf(text, sizeof(text), "%s byte %zu of shared memory, %s %d", what, at, other, access.thread);
  fail(text);
}

// The bytes of an access that are shared memory, one by one.
template <class F>
void for_bytes(const void* data, size_t bytes, const F& f) {
  const auto at = static_cast<size_t>(static_cast<const char*>(data) - watch.shared);
  if (!watch.shared || at >= watch.bytes) return;
  const size_t end = at + bytes < watch.bytes ? at + bytes : watch.bytes;  // beyond it launch.cuh has its guard
  for (size_t i = at; i < end; ++i) f(watch.byte[i], i);
}

void check_coming(const Byte& b, size_t at, const char* what) {
  if (b.coming) report(what, at, "where an asynchronous copy is under way", {});
}

void read(const void* data, size_t bytes) {
  const int me = current_thread();
  for_bytes(data, bytes, [&](Byte& b, size_t at) {
    check_coming(b, at, "a read of");
    const uint32_t last = b.written.epoch > b.changed.epoch ? b.written.epoch : b.changed.epoch;
    if (last < watch.first) report("a read of", at, "which nobody wrote", {});
    if (b.written.by_others(watch.epoch, me)) report("a race: a read of", at, "and a write by thread", b.written);
    if (b.changed.by_others(watch.epoch, me)) report("a race: a read of", at, "and an atomic by thread", b.changed);
    b.read.note(watch.epoch, me);
  });
}

void write(const void* data, size_t bytes, int me = current_thread()) {
  for_bytes(data, bytes, [&](Byte& b, size_t at) {
    check_coming(b, at, "a write of");
    const Access* const all[] = {&b.read, &b.written, &b.changed};
    for (const Access* x : all) {
      if (x->by_others(watch.epoch, me)) report("a race: a write of", at, "and an access by thread", *x);
    }
    b.written.note(watch.epoch, me);
  });
}

void change(const void* data, size_t bytes) {
  const int me = current_thread();
  for_bytes(data, bytes, [&](Byte& b, size_t at) {
    check_coming(b, at, "an atomic of");
    if (b.written.by_others(watch.epoch, me)) report("a race: an atomic of", at, "and a write by thread", b.written);
    if (b.read.by_others(watch.epoch, me)) report("a race: an atomic of", at, "and a read by thread", b.read);
    b.changed.note(watch.epoch, me);
  });
}

}  // namespace

void watch_shared(const void* shared, size_t bytes) {
  if (bytes > kMostBytes) fail("more shared memory than races.cc knows of");
  watch.shared = static_cast<const char*>(shared);
  watch.bytes = bytes;
  watch.first = ++watch.epoch;
  for (size_t i = 0; i < bytes; ++i) watch.byte[i].coming = false;
}

void pass_barrier() { ++watch.epoch; }

void copy_begins(void* shared, size_t bytes) {
  write(shared, bytes);
  for_bytes(shared, bytes, [](Byte& b, size_t) { b.coming = true; });
}

void copy_lands(void* shared, size_t bytes, int thread) {
  for_bytes(shared, bytes, [](Byte& b, size_t) { b.coming = false; });
  write(shared, bytes, thread);
}

void min_at(int64_t* at, int64_t x) {
  change(at, sizeof(*at));
  *at = x < *at ? x : *at;
}
void max_at(int64_t* at, int64_t x) {
  change(at, sizeof(*at));
  *at = x > *at ? x : *at;
}
void or_at(uint32_t* at, uint32_t x) {
  change(at, sizeof(*at));
  *at |= x;
}

}  // namespace emulation

// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read1(void* at) { emulation::read(at, 1); }
void __tsan_read2(void* at) { emulation::read(at, 2); }
void __tsan_read4(void* at) { emulation::read(at, 4); }
void __tsan_read8(void* at) { emulation::read(at, 8); }
void __tsan_read16(void* at) { emulation::read(at, 16); }
void __tsan_write1(void* at) { emulation::write(at, 1); }
void __tsan_write2(void* at) { emulation::write(at, 2); }
void __tsan_write4(void* at) { emulation::write(at, 4); }
void __tsan_write8(void* at) { emulation::write(at, 8); }
void __tsan_write16(void* at) { emulation::write(at, 16); }
void __tsan_unaligned_read2(void* at) { emulation::read(at, 2); }
void __tsan_unaligned_read4(void* at) { emulation::read(at, 4); }
void __tsan_unaligned_read8(void* at) { emulation::read(at, 8); }
void __tsan_unaligned_read16(void* at) { emulation::read(at, 16); }
void __tsan_unaligned_write2(void* at) { emulation::write(at, 2); }
void __tsan_unaligned_write4(void* at) { emulation::write(at, 4); }
void __tsan_unaligned_write8(void* at) { emulation::write(at, 8); }
void __tsan_unaligned_write16(void* at) { emulation::write(at, 16); }
void __tsan_read_range(void* at, size_t bytes) { emulation::read(at, bytes); }
void __tsan_write_range(void* at, size_t bytes) { emulation::write(at, bytes); }
}
