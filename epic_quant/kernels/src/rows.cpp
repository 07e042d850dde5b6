#include "rows.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "parallel.h"
#include "table.h"

namespace epic_quant {
namespace {

// Weights below which another thread costs more than it saves, and those that a thread takes at a time.
constexpr std::size_t kGrainWeights = 1 << 15;

std::size_t grain_rows(std::size_t cols) { return std::max<std::size_t>(1, kGrainWeights / cols); }

std::unique_ptr<float[]> scratch_for(std::size_t cols) { return std::unique_ptr<float[]>(new float[scratch_floats(cols)]); }

}  // namespace

std::size_t quantize(const Table& table, const Quantize& job, int num_threads) {
  std::atomic<std::size_t> first_bad{kAllFinite};
  parallel_for(job.rows, grain_rows(job.cols), num_threads, [&](std::size_t begin, std::size_t end) {
    const std::size_t bad = table.quantize_rows(job, begin, end, scratch_for(job.cols).get());
    std::size_t known = first_bad.load();
    while (bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  return first_bad;
}

void dequantize(const Table& table, const Dequantize& job, int num_threads) {
  parallel_for(job.rows, grain_rows(job.cols), num_threads, [&](std::size_t begin, std::size_t end) {
    table.dequantize_rows(job, begin, end, scratch_for(job.cols).get());
  });
}

void turn(const Table& table, const TurnRows& job, int num_threads) {
  parallel_for(job.rows, grain_rows(job.cols), num_threads, [&](std::size_t begin, std::size_t end) {
    table.turn_rows(job, begin, end, scratch_for(job.cols).get());
  });
}

}  // namespace epic_quant
