#include "program.h"

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>

#include <sys/mman.h>

#include "dispatch.h"
#include "pool.h"

namespace sparseworks {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float, Free>;

Memory allocate(int64_t floats) {
  constexpr size_t kHuge = 2 << 20;  // bytes of a huge page: fewer misses of the address cache
  const size_t size = static_cast<size_t>(floats) * sizeof(float);
  const size_t unit = size > kHuge / 4 ? kHuge : 4096, bytes = (size + unit - 1) / unit * unit;
  void* p = std::aligned_alloc(unit, bytes);
  if (p == nullptr) throw std::bad_alloc();
  if (unit == kHuge) madvise(p, bytes, MADV_HUGEPAGE);
  std::fill_n(static_cast<float*>(p), bytes / sizeof(float), 0.0f);
  return Memory(static_cast<float*>(p));
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

// Working memory of calls in flight; given back memory is used again.
struct Program::Arenas {
  std::mutex mutex;
  std::vector<Memory> idle;

  Memory take(int64_t floats) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        Memory memory = std::move(idle.back());
        idle.pop_back();
        return memory;
      }
    }
    return allocate(floats);
  }
  void give(Memory memory) {
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(memory));
  }
};

Program::Program(std::vector<int64_t> where, int64_t arena, int lanes)
    : where_(std::move(where)), size_(arena), lanes_(lanes), arenas_(new Arenas) {}

Program::~Program() = default;

void Program::add(Op op) { ops_.push_back(std::move(op)); }

void Program::run(const std::vector<Tensor>& tensors, int64_t entries, int threads) const {
  const RunOp run = run_op();
  const Call call{tensors.data(), entries, lanes_};
  const int64_t items = (entries + lanes_ - 1) / lanes_;
  const int64_t alone = threads <= 1 ? items : items / threads * threads;
  // whole items side by side, no waiting in between ...
  if (alone > 0)
    parallel_for(static_cast<int>(alone), threads, [&](int item) {
      Memory memory = arenas_->take(size_);
      for (const Op& op : ops_) run(op, where_.data(), memory.get(), call, item, 0, 1);
      arenas_->give(std::move(memory));
    });
  // ... and what is left over by all threads together
  for (int64_t item = alone; item < items; ++item) {
    Memory memory = arenas_->take(size_);
    together(call, item, memory.get(), run, threads);
    arenas_->give(std::move(memory));
  }
}

// Thread t makes piece t of every operation, so that what it reads is mostly what it wrote. Thread 0
// makes the pieces of threads that have not come yet; they join between two operations.
void Program::together(const Call& call, int64_t item, float* arena, RunOp run,
                       int threads) const {
  struct alignas(128) Seat {
    std::atomic<int> done{0};    // operations whose piece is complete
    std::atomic<int> wants{0};   // to join
    std::atomic<int> from{INT_MAX};  // the first operation with a piece of this thread
  };
  const int count = static_cast<int>(ops_.size());
  std::unique_ptr<Seat[]> seats(new Seat[threads]);
  const auto wait = [](const std::atomic<int>& value, int least) {
    while (value.load(std::memory_order_acquire) < least) relax();
  };
  const auto lead = [&] {
    std::vector<char> joined(threads, 0);
    for (int i = 0; i < count; ++i) {
      const Op& op = ops_[i];
      for (int t = 1; t < threads; ++t)
        if (!joined[t] && seats[t].wants.load(std::memory_order_relaxed)) {
          joined[t] = 1;
          seats[t].from.store(i, std::memory_order_release);
        }
      for (int part = 0; part < op.parts; ++part)
        if (part == 0 || part >= threads || !joined[part])
          run(op, where_.data(), arena, call, item, part, op.parts);
      seats[0].done.store(i + 1, std::memory_order_release);
      for (int t = 1; t < std::min(threads, op.parts); ++t)
        if (joined[t]) wait(seats[t].done, i + 1);
    }
    for (int t = 1; t < threads; ++t)
      if (!joined[t]) seats[t].from.store(count, std::memory_order_release);
  };
  const auto follow = [&](int me) {
    Seat& seat = seats[me];
    seat.wants.store(1, std::memory_order_relaxed);
    while (seat.from.load(std::memory_order_acquire) == INT_MAX) relax();
    for (int i = seat.from.load(); i < count; ++i) {
      const Op& op = ops_[i];
      if (me < op.parts) run(op, where_.data(), arena, call, item, me, op.parts);
      seat.done.store(i + 1, std::memory_order_release);
      wait(seats[0].done, i + 1);
      for (int t = 1; t < std::min(threads, op.parts); ++t)
        if (t != me && seats[t].from.load(std::memory_order_acquire) <= i)
          wait(seats[t].done, i + 1);
    }
  };
  parallel_for(threads, threads, [&](int me) {
    if (me == 0) lead();
    else follow(me);
  });
}

std::vector<double> Program::profile(const std::vector<Tensor>& tensors, int64_t entries,
                                     int repeats) const {
  using Clock = std::chrono::steady_clock;
  const RunOp run = run_op();
  const Call call{tensors.data(), entries, lanes_};
  Memory memory = arenas_->take(size_);
  std::vector<double> best(ops_.size(), 1e30);
  for (int r = 0; r < repeats; ++r)
    for (size_t i = 0; i < ops_.size(); ++i) {
      const auto begin = Clock::now();
      run(ops_[i], where_.data(), memory.get(), call, 0, 0, 1);
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      best[i] = std::min(best[i], seconds);
    }
  arenas_->give(std::move(memory));
  return best;
}

}  // namespace sparseworks
