// Work shared among threads, on torch's own OpenMP threads where the process has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace epic_quant {

// Calls work(context, begin, end) on disjoint ranges that together are [0, count), on at most num_threads threads and
// in pieces of at most `grain`; returns when all are done. Where one throws, that is thrown here once all threads have
// stopped, and pieces that nobody had begun are left.
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

// The sum of `count` words, which must be read for it: as fast as memory gives them to these threads.
std::uint64_t sum_of_words(const std::uint64_t* words, std::size_t count, int num_threads);

// Whose threads they are: "openmp" for those that torch has, "own" for a pool of this module.
const char* threads_of();

}  // namespace epic_quant
