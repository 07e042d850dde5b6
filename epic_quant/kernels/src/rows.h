// Rows of a matrix to what is stored of them, and back: what the kernels in quantize.h are given.
#pragma once

#include <cstddef>
#include <cstdint>

namespace epic_quant {

enum class Element : int { fp32, bf16, fp16 };

// How a ratio of weight and scale becomes a level: the nearest whole number between `low` and `high`; the sign, where
// the magnitude is above 0.33; the nearest entry of a table.
enum class Rounding : int { whole, thirds, entries };

// A scheme, as epic_quant/quant/ defines it.
struct Scheme {
  Rounding rounding;
  float low, high;
  bool least_squares;  // else the scale is the largest magnitude over `divisor`
  float divisor;
  bool either_sign;    // the scale is negative where the largest weight is positive
  double gaussian_step, peak_level;
  int packed_bits;     // of a code; 0 for five base-3 digits a byte
  int table_bits;      // 2^table_bits entries
  float levels[16];    // by code, of entries
  float thresholds[16];
};

// A turn by signs and a block Hadamard transform; block 0 for none.
struct Turn {
  std::size_t block;
  const float* signs;  // [cols], over the root of the block
};

static constexpr std::size_t row_nbytes(int packed_bits, std::size_t cols) {
  return packed_bits ? (cols * static_cast<std::size_t>(packed_bits) + 7) / 8 : (cols + 4) / 5;
}

struct Quantize {
  const Scheme* scheme;
  Turn turn;
  std::size_t rows, cols, group_size;
  Element element;
  const void* weight;   // [rows, cols]
  std::uint8_t* packed;  // [rows, row_nbytes]
  std::uint16_t* scale;  // [rows, cols / group_size], fp16
};

struct Dequantize {
  const Scheme* scheme;
  Turn turn;
  std::size_t rows, cols, group_size;
  Element element;
  void* weight;  // what it cannot hold saturates
  const std::uint8_t* packed;
  const std::uint16_t* scale;
};

struct TurnRows {
  Turn turn;
  bool back;
  std::size_t rows, cols;
  const float* from;
  float* to;
};

struct Table;

// Rows are shared among threads. `quantize` gives back the first row with a number that is not finite, or kAllFinite.
std::size_t quantize(const Table& table, const Quantize& job, int num_threads);
void dequantize(const Table& table, const Dequantize& job, int num_threads);
void turn(const Table& table, const TurnRows& job, int num_threads);

static constexpr std::size_t kAllFinite = ~static_cast<std::size_t>(0);

// Floats of scratch that a thread needs.
static constexpr std::size_t scratch_floats(std::size_t cols) { return 3 * (cols + 16); }

}  // namespace epic_quant
