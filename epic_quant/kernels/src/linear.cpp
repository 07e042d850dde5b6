#include "linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "parallel.h"
#include "table.h"

namespace epic_quant {
namespace {

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that a thread keeps between calls, since fresh pages cost more than a small product.
class Scratch {
 public:
  ~Scratch() { release(); }
  char* get(std::size_t nbytes) {
    if (nbytes > nbytes_) {
      release();
      data_ = static_cast<char*>(::operator new(nbytes, std::align_val_t{64}));
      nbytes_ = nbytes;
    }
    return data_;
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;  // the next allocation may fail
    nbytes_ = 0;
  }
  char* data_ = nullptr;
  std::size_t nbytes_ = 0;
};

// Bytes of weights below which waking another thread takes longer than it saves.
constexpr std::size_t kThreadNbytes = 32 * 1024;

}  // namespace

Plan plan_of(const Weights& weights) {
  Plan plan{};
  const std::size_t unit = kVector * vectors_of(weights.coding), half = unit / 2;
  plan.unit_codes = unit;
  plan.group_size = weights.cols / weights.num_scales;
  const std::size_t group = weights.num_scales == 1 ? round_up(weights.cols, 8 * unit) : plan.group_size;
  plan.kind = group % half ? Blocks::segments : half >= 128 || group % unit ? Blocks::halves : Blocks::units;
  plan.block_units = 1;
  const std::size_t most = weights.coding == Coding::trits ? 2 * unit : 128;
  while (plan.kind == Blocks::units && 2 * plan.block_units * unit <= most && group % (2 * plan.block_units * unit) == 0)
    plan.block_units *= 2;
  plan.block_codes = plan.kind == Blocks::halves ? half : plan.block_units * unit;
  const std::size_t block_of_units = plan.block_units * unit;
  plan.num_units = round_up(weights.cols, block_of_units) / unit;
  plan.num_blocks = plan.num_units * unit / plan.block_codes;
  plan.num_digit_units = plan.num_units;
  if (plan.kind == Blocks::segments) {
    plan.num_blocks = 0;
    for (Segment segment; segment.group < weights.num_scales; segment.next(plan)) ++plan.num_blocks;
    plan.num_digit_units = plan.num_blocks;
  }
  return plan;
}

std::size_t scratch_nbytes(const Linear& job) {
  // Those of the rows, and of one more before they are laid out.
  const std::size_t scales = (kMostTileRows + 1) * round_up(std::max(job.plan.num_blocks, job.weights.num_scales), 16) * sizeof(float);
  const std::size_t codes = kMostTileRows * job.plan.num_units * job.plan.unit_codes;
  const std::size_t tile_codes = std::max(kTileCodes, job.plan.unit_codes);
  const std::size_t tile = kMostTileRows * (tile_codes + kTileTokens * 8) * sizeof(float);
  const std::size_t row = job.plan.num_units * job.plan.unit_codes * sizeof(float);
  return 1024 + scales + std::max({codes, tile, 2 * row});
}

std::size_t prepare_nbytes(const Linear& job) {
  const Plan& plan = job.plan;
  const std::size_t values = plan.num_units * plan.unit_codes, blocks = round_up(plan.num_blocks, 8);
  return (values + 2 * blocks + 64) * sizeof(float) + plan.num_digit_units * plan.unit_codes;
}

void linear(const Table& table, const Weights& weights, const float* x, std::size_t tokens, float* out,
            Activations activations, int num_threads) {
  Linear job{};
  job.weights = weights;
  job.plan = plan_of(weights);
  job.tokens = tokens;
  job.x = x;
  job.out = out;
  const bool in_fp32 = activations == Activations::fp32 && tokens > 1;
  const int digits = in_fp32 ? 0 : activations == Activations::int8 ? 1 : kMostDigits;

  static thread_local Scratch of_x;
  const std::size_t padded = job.plan.num_units * job.plan.unit_codes;
  const std::size_t padded_tokens = tokens > 1 ? round_up(tokens, kTokenLanes) : 1;
  const std::size_t values_nbytes =
      padded_tokens * (in_fp32 ? padded * sizeof(float) : job.plan.num_digit_units * job.plan.unit_codes * digits);
  const std::size_t blocks = round_up(job.plan.num_blocks, 8);
  char* memory = of_x.get(values_nbytes + 2 * padded_tokens * blocks * sizeof(float));
  job.x_values = reinterpret_cast<float*>(memory);
  job.x_digits = reinterpret_cast<std::int8_t*>(memory);
  job.x_scale = reinterpret_cast<float*>(memory + values_nbytes);
  job.x_sum = job.x_scale + padded_tokens * blocks;

  const std::size_t nbytes = weights.rows * weights.row_nbytes;
  if (nbytes * tokens < kThreadNbytes) num_threads = 1;
  parallel_for(tokens, tokens > 4 ? (tokens + 7) / 8 : tokens, num_threads, [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    table.prepare(job, digits, begin, end, reinterpret_cast<float*>(scratch.get(prepare_nbytes(job))));
  });
  // Some pieces more than threads, so that one that is held up does not hold up all.
  std::size_t grain = std::max<std::size_t>(1, weights.rows / (8 * static_cast<std::size_t>(num_threads)));
  if (tokens > 1 || in_fp32) grain = round_up(grain, kMostTileRows);
  parallel_for(weights.rows, grain, num_threads, [&](std::size_t begin, std::size_t end) {
    static thread_local Scratch scratch;
    void* own = scratch.get(scratch_nbytes(job));
    if (in_fp32)
      table.tokens_fp32(job, begin, end, own);
    else if (tokens == 1)
      table.token(job, digits, begin, end, own);
    else
      table.tokens_int8(job, begin, end, own);
  });
}

}  // namespace epic_quant
