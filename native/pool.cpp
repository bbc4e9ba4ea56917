#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "placement.h"

namespace sparseworks {
namespace {

// One parallel loop: items are taken by counting up; the last helper to leave tells the caller.
struct Loop {
  const std::function<void(int)>* work;
  int items;
  std::atomic<int> next{0};
  std::atomic<int> helpers{0};
  std::mutex mutex;
  std::exception_ptr error;

  void run() {
    for (int i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
      try {
        (*work)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next.store(items);
      }
    }
  }
};

class Pool {
 public:
  // Offers the loop to `count` helpers, starting workers as they are first needed.
  void offer(const std::shared_ptr<Loop>& loop, int count) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < count) {
        auto worker = std::make_unique<Worker>();
        std::thread([this, self = worker.get()] { serve(*self); }).detach();
        workers_.push_back(std::move(worker));
      }
      if (busy_.load() == 0) keep_off_caller();
      for (int i = 0; i < count; ++i) queue_.push_back(loop);
      pending_.store(static_cast<int>(queue_.size()));
    }
    wake_.notify_all();
  }

 private:
  struct Worker {
    std::atomic<int> thread{0};
    int avoids = -1;  // a processor
  };

  // Only while no worker runs, so that callers on several processors do not chase each other's.
  void keep_off_caller() {
    const int here = processor();
    for (const auto& worker : workers_) {
      const int thread = worker->thread.load();
      if (thread != 0 && here >= 0 && worker->avoids != here && keep_off(thread, here))
        worker->avoids = here;
    }
  }

  void serve(Worker& self) {
    self.thread.store(thread_number());
    for (;;) {
      for (int spin = 0; spin < 2000 && pending_.load() == 0; ++spin) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      std::shared_ptr<Loop> loop;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return !queue_.empty(); });
        loop = std::move(queue_.front());
        queue_.pop_front();
        pending_.store(static_cast<int>(queue_.size()));
        loop->helpers.fetch_add(1);
        busy_.fetch_add(1);
      }
      loop->run();
      busy_.fetch_sub(1);
      loop->helpers.fetch_sub(1);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Loop>> queue_;
  std::atomic<int> pending_{0};
  std::atomic<int> busy_{0};
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Never destroyed, so that workers may outlive static destruction; made anew after a fork, which
// copies no threads.
Pool& pool() {
  static std::mutex mutex;
  static Pool* made = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (made == nullptr || owner != getpid()) {
    made = new Pool;
    owner = getpid();
  }
  return *made;
}

}  // namespace

void parallel_for(int items, int threads, const std::function<void(int)>& work) {
  const int helpers = std::min(items, threads) - 1;
  if (helpers <= 0) {
    for (int i = 0; i < items; ++i) work(i);
    return;
  }
  // A helper that comes late finds no item left and touches nothing but the counter; `work` is
  // only called while items remain, which the wait below covers.
  auto loop = std::make_shared<Loop>();
  loop->work = &work;
  loop->items = items;
  pool().offer(loop, helpers);
  loop->run();
  while (loop->helpers.load() != 0) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (loop->error) std::rethrow_exception(loop->error);
}

}  // namespace sparseworks
