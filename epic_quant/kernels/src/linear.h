// Products with packed weights: what the kernels are given, and the order in which codes and activations are laid out.
//
// A row is read a unit at a time, one step of 256-bit vectors. A unit has two halves, one a 128-bit lane, each of
// consecutive bytes of the row, and decodes to V vectors of 32 codes: byte 16 * half + j of vector v is code
// half * 16 V + j * V + v of the unit, the order in which shifts and masks find them. Activations are laid out in the
// same order, so that nothing is ever put back. What a row lacks to whole units are zero activations.
#pragma once

#include <cstddef>
#include <cstdint>

namespace epic_quant {

enum class Coding : int { bits2 = 2, bits3 = 3, bits4 = 4, bits8 = 8, trits = 5 };

constexpr int vectors_of(Coding coding) {
  return coding == Coding::bits2 ? 4 : coding == Coding::bits3 ? 8 : coding == Coding::bits4 ? 2 : coding == Coding::bits8 ? 1 : 5;
}

constexpr int unit_nbytes_of(Coding coding) { return coding == Coding::bits3 ? 96 : 32; }

constexpr std::size_t kVector = 32;

// A matrix as stored. A weight is scale * (code - zero), or scale * levels[code].
struct Weights {
  const std::uint8_t* packed;   // [rows, row_nbytes]
  const std::uint16_t* scale;   // [rows, num_scales], fp16
  std::size_t rows, cols, row_nbytes, num_scales;
  Coding coding;
  int zero;
  bool has_levels;
  std::int8_t levels[16];
};

// How a row falls into blocks, which share a scale of the weights and one of the activations: `block_units` units, or
// half a unit, or a segment, the part of a unit that is in one group. A segment has a whole unit of digits of
// activations, zeros where it is not.
enum class Blocks { units, halves, segments };

struct Plan {
  Blocks kind;
  std::size_t group_size, num_units, unit_codes, block_units, num_blocks, block_codes;
  std::size_t num_digit_units;  // of a token
};

// Goes through the segments of a row in order.
struct Segment {
  std::size_t unit = 0, group = 0;

  void next(const Plan& plan) {
    const std::size_t group_end = (group + 1) * plan.group_size, unit_end = (unit + 1) * plan.unit_codes;
    if (group_end <= unit_end) ++group;
    if (unit_end <= group_end) ++unit;
  }
};

struct Linear {
  Weights weights;
  Plan plan;
  std::size_t tokens;
  const float* x;  // [tokens, cols]
  float* out;      // [tokens, rows]
  // Laid out by the table's `prepare`; but for AVX-512's several tokens (linear_avx512.h) a token after another: fp32
  // values [num_units, V, 32], or digits [num_digit_units, V, D, 32] with the scale of each block, and scale times the
  // sum of its quotients.
  float* x_values;
  std::int8_t* x_digits;
  float* x_scale;  // [tokens, num_blocks]
  float* x_sum;    // [tokens, num_blocks]
};

// A number in [-1, 1] times 127 is written with D digits of base 255 in [-127, 127], the highest first: one is int8
// activations, three are 24 bits, as an fp32 mantissa has.
constexpr int kMostDigits = 3;

Plan plan_of(const Weights& weights);

enum class Activations { fp32, int8 };

// out = x times the weights transposed. Memory beyond `out` is its own; the numbers in x may be any.
void linear(const struct Table& table, const Weights& weights, const float* x, std::size_t tokens, float* out,
            Activations activations, int num_threads);

}  // namespace epic_quant
