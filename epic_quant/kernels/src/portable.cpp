// Plain C++17, which the compiler may vectorize for the CPU that it builds for.
#include <cstring>

#include "eight.h"
#include "linear.h"
#include "prepare.h"
#include "quantize.h"
#include "table.h"

namespace epic_quant {
namespace {

// The value of every code of a unit, code - zero or its level, in the order that linear.h tells: [V, 32].
template <Coding K>
void decode(const Weights& weights, const std::uint8_t* p, std::int8_t* to) {
  constexpr int V = vectors_of(K), kHalf = unit_nbytes_of(K) / 2;
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 16; ++j) {
      const std::uint8_t* from = p + half * kHalf + (K == Coding::bits3 ? 3 * j : j);
      std::uint32_t bits = K == Coding::bits3 ? from[0] | from[1] << 8 | from[2] << 16 : from[0];
      for (int v = 0; v < V; ++v) {
        constexpr unsigned kBits = K == Coding::trits ? 0 : 8 * unit_nbytes_of(K) / (kVector * V);
        unsigned code;
        if (K == Coding::trits) {
          code = bits % 3, bits /= 3;
        } else {
          code = bits & ((1u << kBits) - 1), bits >>= kBits;
        }
        to[v * kVector + half * 16 + j] =
            K != Coding::bits8 && weights.has_levels ? weights.levels[code]
                                                     : static_cast<std::int8_t>(static_cast<int>(code) - weights.zero);
      }
    }
}

// A row decoded: [num_units, V, 32] values.
template <Coding K>
void decode_row(const Weights& weights, std::size_t num_units, std::size_t row, std::int8_t* to) {
  constexpr std::size_t kUnit = unit_nbytes_of(K), kCodes = kVector * vectors_of(K);
  const std::uint8_t* packed = weights.packed + row * weights.row_nbytes;
  std::size_t left = weights.row_nbytes;
  for (std::size_t unit = 0; unit < num_units; ++unit, to += kCodes) {
    if (left >= kUnit) {
      decode<K>(weights, packed, to);
      packed += kUnit, left -= kUnit;
    } else {
      std::uint8_t tail[kUnit] = {};
      std::memcpy(tail, packed, left);
      decode<K>(weights, tail, to);
      left = 0;
    }
  }
}

void decode_row(const Weights& weights, std::size_t num_units, std::size_t row, std::int8_t* to) {
  switch (weights.coding) {
    case Coding::bits2: return decode_row<Coding::bits2>(weights, num_units, row, to);
    case Coding::bits3: return decode_row<Coding::bits3>(weights, num_units, row, to);
    case Coding::bits4: return decode_row<Coding::bits4>(weights, num_units, row, to);
    case Coding::bits8: return decode_row<Coding::bits8>(weights, num_units, row, to);
    case Coding::trits: return decode_row<Coding::trits>(weights, num_units, row, to);
  }
}

// Rows by tokens in `digits` digits, over integer sums of 16 products each.
void multiply_digits(const Linear& job, int digits, std::size_t begin, std::size_t end, void* scratch) {
  const Plan& plan = job.plan;
  const std::size_t x_stride = plan.num_digit_units * plan.unit_codes, blocks = padded_blocks(plan);
  const bool halves = plan.kind == Blocks::halves;
  const std::size_t vectors = plan.block_units * plan.unit_codes / kVector;
  const std::size_t group_blocks = job.weights.num_scales == 1 ? plan.num_blocks : (plan.group_size + plan.block_codes - 1) / plan.block_codes;
  static const float kDigit[kMostDigits] = {1.0f, 1.0f / 255, 1.0f / 65025};
  auto* values = static_cast<std::int8_t*>(scratch);
  for (std::size_t row = begin; row < end; ++row) {
    decode_row(job.weights, plan.num_units, row, values);
    const std::uint16_t* scales = job.weights.scale + row * job.weights.num_scales;
    for (std::size_t token = 0; token < job.tokens; ++token) {
      const std::int8_t* x = job.x_digits + token * x_stride * digits;
      const std::int8_t* w = values;
      float sum = 0;
      Segment segment;
      for (std::size_t first = 0; first < plan.num_blocks; first += halves ? 2 : 1) {
        std::size_t group = first / group_blocks;
        if (plan.kind == Blocks::segments) {
          w = values + segment.unit * plan.unit_codes;
          group = segment.group;
          segment.next(plan);
        }
        std::int32_t totals[kMostDigits][2] = {};
        for (std::size_t v = 0; v < vectors; ++v, w += kVector)
          for (int d = 0; d < digits; ++d, x += kVector)
            for (int half = 0; half < 2; ++half) {
              std::int32_t total = 0;
              for (int j = 0; j < 16; ++j) total += w[half * 16 + j] * x[half * 16 + j];
              totals[d][half] += total;
            }
        for (int half = 0; half < 2; ++half) {
          const std::size_t block = first + (halves ? half : 0);
          if (halves) group = block / group_blocks;
          if (group >= job.weights.num_scales) continue;  // behind the row
          float value = 0;
          for (int d = 0; d < digits; ++d) value += kDigit[d] * static_cast<float>(totals[d][half]);
          sum += value * (from_fp16(scales[group]) * job.x_scale[token * blocks + block]);
        }
      }
      job.out[token * job.weights.rows + row] = sum;
    }
  }
}

void tokens_int8(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  multiply_digits(job, 1, begin, end, scratch);
}

void tokens_fp32(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  const Plan& plan = job.plan;
  const std::size_t padded = plan.num_units * plan.unit_codes, cols = job.weights.cols;
  const std::size_t vectors = plan.unit_codes / kVector;
  auto* values = static_cast<std::int8_t*>(scratch);
  auto* row_values = reinterpret_cast<float*>(values + (padded + 63) / 64 * 64);
  for (std::size_t row = begin; row < end; ++row) {
    decode_row(job.weights, plan.num_units, row, values);
    for (std::size_t at = 0; at < padded; ++at) {
      const std::size_t unit = at / plan.unit_codes, within = at % plan.unit_codes;
      const std::size_t in_order = unit * plan.unit_codes + within % kVector * vectors + within / kVector;
      const std::size_t group = in_order / plan.group_size;
      row_values[at] = in_order < cols ? static_cast<float>(values[at]) *
                                             from_fp16(job.weights.scale[row * job.weights.num_scales + group])
                                       : 0.0f;
    }
    for (std::size_t token = 0; token < job.tokens; ++token) {
      const float* x = job.x_values + token * padded;
      float sums[16] = {};
      for (std::size_t at = 0; at < padded; at += 16)
        for (int i = 0; i < 16; ++i) sums[i] += row_values[at + i] * x[at + i];
      float sum = 0;
      for (float part : sums) sum += part;
      job.out[token * job.weights.rows + row] = sum;
    }
  }
}

}  // namespace

const Table portable_table = {"portable",  [] { return true; }, prepare,         multiply_digits, tokens_int8,
                              tokens_fp32, quantize_rows,       dequantize_rows, turn_rows};

}  // namespace epic_quant
