// The pool of `parallel.cpp` alone, in a program without OpenMP: exit status 0, or a line that says what is wrong.
#include "parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

using epic_quant::parallel_for;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

void every_index_is_visited_once(std::size_t count, std::size_t grain, int threads) {
  std::vector<std::atomic<int>> visits(count);
  parallel_for(count, grain, threads, [&](std::size_t begin, std::size_t end) {
    for (; begin < end; ++begin) ++visits[begin];
  });
  for (const auto& visit : visits) expect(visit == 1, "an index was visited other than once");
}

void what_is_thrown_arrives(int threads) {
  std::atomic<int> inside{0};
  bool caught = false;
  try {
    parallel_for(10000, 1, threads, [&](std::size_t, std::size_t end) {
      ++inside;
      std::this_thread::yield();
      --inside;
      if (end % 100 == 0) throw std::length_error("a piece");
    });
  } catch (const std::length_error& error) {
    caught = std::strcmp(error.what(), "a piece") == 0;
  }
  expect(caught, "what a piece threw did not arrive");
  expect(threads == 1 || inside == 0, "a thread was still at work");
}

void callers_do_not_disturb_each_other() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) every_index_is_visited_once(100, 3, 3);
    });
  for (auto& caller : callers) caller.join();
}

void a_forked_process_has_threads_of_its_own() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    every_index_is_visited_once(1000, 1, 3);
    std::_Exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked process did not get through");
}

}  // namespace

int main() {
  expect(std::strcmp(epic_quant::threads_of(), "own") == 0, "the threads are not its own");
  for (const std::size_t count : {0, 1, 2, 1000})
    for (const std::size_t grain : {0, 1, 7, 1000})
      for (const int threads : {1, 2, 5}) every_index_is_visited_once(count, grain, threads);
  for (int round = 0; round < 50; ++round)
    for (const int threads : {1, 2, 5}) what_is_thrown_arrives(threads);
  callers_do_not_disturb_each_other();
  a_forked_process_has_threads_of_its_own();
  every_index_is_visited_once(1000, 1, 5);
}
