#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace epic_quant {
namespace {

// Pieces are taken by whoever is free: on a shared machine one thread may be held up.
struct Job {
  std::size_t count, grain;
  void (*work)(void*, std::size_t, std::size_t);
  void* context;
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the first piece that failed

  // Nothing may leave a thread of somebody else's by an exception.
  void run() noexcept {
    for (;;) {
      const std::size_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      try {
        work(context, begin, begin + grain < count ? begin + grain : count);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
  }
};

// Torch's threads spin for a while after each of its operations. A second pool beside them would wait for a core that
// they hold, so on Linux the work goes to the OpenMP runtime that torch has loaded, by the entry that compiled code
// calls for `#pragma omp parallel`.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
#if defined(__linux__)
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// Elsewhere: threads that sleep until there is work, and wait for it awake only shortly, since another pool may want
// the core.
class Pool {
 public:
  void run(Job& job, int num_threads) {
    std::unique_lock<std::mutex> one_at_a_time(calls_, std::try_to_lock);
    if (!one_at_a_time) return job.run();
    const std::size_t helpers = static_cast<std::size_t>(num_threads) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (threads_.size() < helpers) {
        const std::size_t index = threads_.size();
        threads_.emplace_back([this, index] { serve(index); });
      }
      job_ = &job;
      wanted_ = busy_ = helpers;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve(std::size_t index) {
    std::size_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 2000 && round_.load(std::memory_order_acquire) == seen; ++spin) {
      }
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        seen = round_.load(std::memory_order_acquire);
        if (index >= wanted_) continue;
        job = job_;
      }
      job->run();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  std::atomic<std::size_t> round_{0};
  Job* job_ = nullptr;
  std::size_t wanted_ = 0, busy_ = 0;
};

// Never destroyed: joining threads while the process or an interpreter ends can hang.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool ready = [] {
    the_pool = new Pool;
#if !defined(_WIN32)
    // A forked process has none of the threads, and locks as they were.
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
#endif
    return true;
  }();
  static_cast<void>(ready);
  return *the_pool;
}

}  // namespace

void parallel_for(std::size_t count, std::size_t grain, int num_threads,
                  void (*work)(void*, std::size_t, std::size_t), void* context) {
  if (count == 0) return;
  if (grain == 0) grain = 1;
  if (num_threads < 2 || count <= grain) return work(context, 0, count);
  Job job{count, grain, work, context};
  // Both end only when every thread has left the job.
  if (const GompParallel parallel = gomp_parallel())
    parallel([](void* job) { static_cast<Job*>(job)->run(); }, &job, static_cast<unsigned>(num_threads), 0);
  else
    pool().run(job, num_threads);
  if (job.error) std::rethrow_exception(job.error);
}

std::uint64_t sum_of_words(const std::uint64_t* words, std::size_t count, int num_threads) {
  std::atomic<std::uint64_t> total{0};
  parallel_for(count, 1 << 17, num_threads, [&](std::size_t begin, std::size_t end) {
    std::uint64_t sums[8] = {};
    std::size_t i = begin;
    for (; i + 8 <= end; i += 8)
      for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
    for (; i < end; ++i) sums[0] += words[i];
    for (const std::uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

const char* threads_of() { return gomp_parallel() ? "openmp" : "own"; }

}  // namespace epic_quant
