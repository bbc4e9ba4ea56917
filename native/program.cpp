#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include <sys/mman.h>

#include "dispatch.h"
#include "pages.h"
#include "pool.h"

namespace sparseworks {
namespace {

// Bytes for so many floats: of few different sizes, so that what is given back fits again.
size_t rounded(int64_t floats) {
  const size_t size = static_cast<size_t>(floats) * sizeof(float);
  size_t unit = size > kLargePage / 4 ? kLargePage : 4096;
  while (size / unit > 7) unit *= 2;
  return (size + unit - 1) / unit * unit;
}

float* allocate(size_t bytes) {
  const bool huge = bytes >= kLargePage;
  void* p = std::aligned_alloc(huge ? kLargePage : 4096, bytes);
  if (p == nullptr) throw std::bad_alloc();
  if (huge) madvise(p, bytes, MADV_HUGEPAGE);
#if defined(SPARSEWORKS_POISON)  // every bit set is not a number
  std::memset(p, 0xff, bytes);
#endif
  return static_cast<float*>(p);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct Arena::Blocks {
  struct Block {
    float* data;
    size_t bytes;
  };
  std::mutex mutex;
  std::vector<Block> idle;
  size_t total = 0;

  ~Blocks() {
    for (const Block& b : idle) std::free(b.data);
  }
  // The smallest that is large enough; else a new one in place of the largest.
  Block take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    auto best = idle.end(), largest = idle.end();
    for (auto b = idle.begin(); b != idle.end(); ++b) {
      if (b->bytes >= bytes && (best == idle.end() || b->bytes < best->bytes)) best = b;
      if (largest == idle.end() || b->bytes > largest->bytes) largest = b;
    }
    const bool found = best != idle.end();
    if (!found) best = largest;
    Block taken{nullptr, 0};
    if (best != idle.end()) {
      taken = *best;
      idle.erase(best);
    }
    if (found) return taken;
    std::free(taken.data);
    total -= taken.bytes;
    taken = {allocate(bytes), bytes};
    total += bytes;
    return taken;
  }
  void give(Block block) {
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(block);
  }
};

// Gives itself back.
class Arena::Memory {
 public:
  Memory(Blocks& from, size_t bytes) : from_(from), block_(from.take(bytes)) {
#if defined(SPARSEWORKS_POISON)
    std::memset(block_.data, 0xff, block_.bytes);
#endif
  }
  ~Memory() { from_.give(block_); }
  Memory(const Memory&) = delete;
  float* get() const { return block_.data; }

 private:
  Blocks& from_;
  Blocks::Block block_;
};

Arena::Arena() : blocks_(new Blocks) {}

Arena::~Arena() = default;

Arena::Memory Arena::take(int64_t floats) { return Memory(*blocks_, rounded(floats)); }

int64_t Arena::bytes() const {
  std::lock_guard<std::mutex> lock(blocks_->mutex);
  return static_cast<int64_t>(blocks_->total);
}

Program::Program(std::vector<int64_t> where, int64_t size, int lanes, Arena* arena)
    : where_(std::move(where)), size_(size), lanes_(lanes), arena_(arena) {}

int64_t Program::bytes() const {
  size_t found = sizeof *this + where_.size() * sizeof where_[0];
  for (const Op& op : ops_)
    found += sizeof op + op.live.size() * sizeof op.live[0] + op.offset.size() * sizeof op.offset[0];
  return static_cast<int64_t>(found);
}

void Program::add(Op op) { ops_.push_back(std::move(op)); }

void Program::run(const std::vector<Tensor>& tensors, int64_t entries, int threads) const {
  const RunOp run = run_op();
  const Call call{tensors.data(), entries, lanes_};
  const int64_t items = (entries + lanes_ - 1) / lanes_;
  const int64_t alone = threads <= 1 ? items : items / threads * threads;
  // whole items side by side, no waiting in between ...
  if (alone > 0)
    parallel_for(static_cast<int>(alone), threads, [&](int item) {
      const Arena::Memory memory = arena_->take(size_);
      for (const Op& op : ops_) run(op, where_.data(), memory.get(), call, item, 0, 1);
    });
  // ... and what is left over by all threads together
  for (int64_t item = alone; item < items; ++item) {
    const Arena::Memory memory = arena_->take(size_);
    together(call, item, memory.get(), run, threads);
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
  const Arena::Memory memory = arena_->take(size_);
  std::vector<double> best(ops_.size(), 1e30);
  for (int r = 0; r < repeats; ++r)
    for (size_t i = 0; i < ops_.size(); ++i) {
      const auto begin = Clock::now();
      run(ops_[i], where_.data(), memory.get(), call, 0, 0, 1);
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      best[i] = std::min(best[i], seconds);
    }
  return best;
}

}  // namespace sparseworks
