// SPDX-License-Identifier: Apache-2.0
// Computing while other threads run Python.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace qkv::python {

class WithoutGil {  // while it lives
 public:
  WithoutGil() { give(); }
  ~WithoutGil() { take(); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  void give() { thread_ = PyEval_SaveThread(); }
  // A daemon thread that outlives the interpreter does not get it back. Python before 3.14 then unwinds the thread's
  // stack, through destructors that need the GIL or must not throw: it sleeps instead, as from 3.14 on.
  void take() noexcept {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* thread_;
};

}  // namespace qkv::python
