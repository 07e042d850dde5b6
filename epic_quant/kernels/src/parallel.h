// Work shared among threads, on torch's own OpenMP threads where the process has them.
#pragma once

#include <cstddef>

namespace epic_quant {

// Calls work(context, begin, end) on disjoint ranges that together are [0, count), on at most num_threads threads and
// in pieces of at most `grain`; returns when all are done. `work` must not throw.
void parallel_for(std::size_t count, std::size_t grain, int num_threads,
                  void (*work)(void* context, std::size_t begin, std::size_t end), void* context);

// The same for a callable.
template <class Work>
void parallel_for(std::size_t count, std::size_t grain, int num_threads, Work&& work) {
  parallel_for(
      count, grain, num_threads,
      [](void* context, std::size_t begin, std::size_t end) { (*static_cast<decltype(&work)>(context))(begin, end); },
      &work);
}

// Whose threads they are: "openmp" for those that torch has, "own" for a pool of this module.
const char* threads_of();

}  // namespace epic_quant
