// Work in phases, each of some items, on threads that may come late or not at all: whoever is there
// takes items, and the next phase begins when all are done.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "../pool.h"

namespace sparseworks {

class Phases {
  struct alignas(64) Counter {
    std::atomic<int> next{0};
    alignas(64) std::atomic<int> done{0};
  };

 public:
  explicit Phases(int count) : counters_(new Counter[static_cast<size_t>(count)]) {}

  // One participant's place in the sequence; all go through the same phases.
  class Walker {
   public:
    Walker(Phases& phases, int thread) : counter_(phases.counters_.get()), thread_(thread) {}

    int thread() const { return thread_; }

    template <typename Work>
    void each(int items, Work&& work) {
      Counter& c = *counter_++;
      int mine = 0;
      for (int i = c.next.fetch_add(1); i < items; i = c.next.fetch_add(1)) {
        work(i);
        ++mine;
      }
      if (mine != 0) c.done.fetch_add(mine);
      for (int spin = 0; c.done.load() < items; ++spin) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spin > 4000) std::this_thread::yield();
      }
    }

   private:
    Counter* counter_;
    int thread_;
  };

  // Calls work(walker) on up to `threads` threads.
  template <typename Work>
  void run(int threads, Work&& work) {
    parallel_for(threads, threads, [&](int thread) {
      Walker walker(*this, thread);
      work(walker);
    });
  }

 private:
  std::unique_ptr<Counter[]> counters_;
};

}  // namespace sparseworks
