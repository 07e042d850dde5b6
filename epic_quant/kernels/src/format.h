// A matrix as stored: the one description that products, quantizing and decoding share. Everything that follows from
// it, such as which kernels serve it, is worked out once, when the matrix is made.
#pragma once

#include <cstddef>
#include <cstdint>

namespace epic_quant {

// How codes lie in a row's bytes: `num_bits` each, the lowest bit first, across byte borders; or five base-3 digits a
// byte, the first as the lowest ("trits", num_bits 0). Those of ggml's types lie in blocks that hold scales as well, as
// epic_quant/quant/ggml/types.py says where. Those of a trellis are bits of a path, as epic_quant/quant/trellis.py says.
enum class Coding : int {
  bits1, bits2, bits3, bits4, bits5, bits6, bits7, bits8, trits, q8_0, q6_k, q4_k,
  trellis1, trellis2, trellis3, trellis4,
};

// Products read a row a unit at a time: `unit_nbytes` that decode to `num_vectors` vectors of 32 codes. A coding
// without products has neither. Where units are blocks, they hold a scale for every `group_codes` codes; else it is 0.
// A new coding is a row here and a specialization of Codes in codes.h.
struct CodingRow {
  const char* name;
  int num_bits, num_vectors, unit_nbytes, group_codes;
  bool has_minima;  // a weight is scale * code - minimum
  bool is_trellis = false;

  constexpr std::size_t unit_codes() const { return 32 * static_cast<std::size_t>(num_vectors); }
};

constexpr CodingRow kCodings[] = {
    {"bits1", 1, 0, 0, 0, false},  {"bits2", 2, 4, 32, 0, false},    {"bits3", 3, 8, 96, 0, false},
    {"bits4", 4, 2, 32, 0, false}, {"bits5", 5, 0, 0, 0, false},     {"bits6", 6, 0, 0, 0, false},
    {"bits7", 7, 0, 0, 0, false},  {"bits8", 8, 1, 32, 0, false},    {"trits", 0, 5, 32, 0, false},
    {"q8_0", 8, 1, 34, 32, false}, {"q6_k", 6, 8, 210, 16, false},   {"q4_k", 4, 8, 144, 32, true},
    {"trellis1", 1, 8, 32, 0, false, true}, {"trellis2", 2, 8, 64, 0, false, true},
    {"trellis3", 3, 8, 96, 0, false, true}, {"trellis4", 4, 8, 128, 0, false, true},
};
constexpr int kNumCodings = sizeof kCodings / sizeof kCodings[0];

constexpr const CodingRow& row_of(Coding coding) { return kCodings[static_cast<int>(coding)]; }

constexpr std::size_t row_nbytes(Coding coding, std::size_t cols) {
  const CodingRow& row = row_of(coding);
  if (row.group_codes) return cols / row.unit_codes() * static_cast<std::size_t>(row.unit_nbytes);
  const auto num_bits = static_cast<std::size_t>(row.num_bits);
  if (row.is_trellis) return (cols * num_bits + 15) / 16 * 2;
  return num_bits ? (cols * num_bits + 7) / 8 : (cols + 4) / 5;
}

// How quantizing rounds a ratio of weight and scale: to the nearest whole number among the levels; to its sign, where
// the magnitude is above 0.33; or to the nearest entry of a table.
enum class Rounding : int { nearest, sign, table };

constexpr int kMaxTable = 16;

// A trellis: the value of a state of `state_bits` is high[p >> 12] + low[p >> 8 & 15] with p the lower 16 bits of its
// product with the multiplier. Magnitudes are at most 127.
struct States {
  int state_bits;
  unsigned multiplier;
  std::int8_t high[16], low[16];

  constexpr unsigned mask() const { return (1u << state_bits) - 1; }
};

// What codes mean, and how quantizing chooses them. A weight is scale * (code - zero), or scale * table[code].
struct Format {
  Coding coding;
  int zero;        // 0 where there is a table
  int table_bits;  // a table has 2^table_bits entries; 0 for none
  std::int8_t table[kMaxTable];
  float levels[kMaxTable], thresholds[kMaxTable];  // the table's, ascending, and what lies midway between them

  Rounding rounding;
  float low, high;  // the least and the greatest level
  float divisor;    // the scale is the largest magnitude over it; where it is 0, the one of least squared error
  double gaussian_step, peak_level;  // where the search for that begins and ends
  bool either_sign;                  // the scale is negative where the largest weight is positive
  States states;                     // of a trellis
};

// Rows are stored rotated: multiplied by signs [cols], which are over the root of `block`, and then by Sylvester's
// Hadamard matrix of every block. Block 0 is no rotation.
struct Rotation {
  std::size_t block;
  const float* signs;
};

enum class Element : int { fp32, bf16, fp16 };

// How a row falls into blocks for products; a block shares a scale of the weights and one of the activations. It is
// `block_units` units, or half a unit, or a segment, the part of a unit that is in one group. A segment has a whole
// unit of activations, zeros where it is not. Where units hold scales, blocks are vectors and halves of vectors instead.
enum class Blocks { units, halves, segments };

struct Layout {
  Blocks kind;
  std::size_t num_units, unit_codes, block_units, num_blocks, block_codes;
  std::size_t block_vectors;   // vectors that a block, or two halves, takes
  std::size_t num_limb_units;  // units of int8 activations that a token has

  std::size_t padded_cols() const { return num_units * unit_codes; }
  std::size_t padded_blocks() const { return (num_blocks + 7) / 8 * 8; }
};

struct StoredMatrix;
struct Product;

// The kernels that serve a matrix on an instruction set. All work on rows or tokens [begin, end), with scratch aligned
// to 64 bytes of as many bytes as matrix.cpp gives.
struct Kernels {
  // Products, null where a coding has none. `limbs` of int8 are packed for an activation, or, where 0, its fp32 value.
  void (*pack_activations)(const Product&, int limbs, std::size_t begin, std::size_t end, float* scratch);
  // One token, with one limb and with kMaxLimbs.
  void (*gemv_int8)(const Product&, std::size_t begin, std::size_t end, void* scratch);
  void (*gemv_fp32)(const Product&, std::size_t begin, std::size_t end, void* scratch);
  // Several tokens, with one limb and with none.
  void (*gemm_int8)(const Product&, std::size_t begin, std::size_t end, void* scratch);
  void (*gemm_fp32)(const Product&, std::size_t begin, std::size_t end, void* scratch);

  // Gives back the first row with a number that is not finite, where it stops, or kAllFinite.
  std::size_t (*quantize)(const StoredMatrix&, Element, const void* weight, std::size_t begin, std::size_t end,
                          float* scratch);
  // What the element cannot hold saturates. `rotated` leaves the rows as they are stored.
  void (*dequantize)(const StoredMatrix&, Element, void* weight, bool rotated, std::size_t begin, std::size_t end,
                     float* scratch);
};

constexpr std::size_t kAllFinite = ~static_cast<std::size_t>(0);

struct StoredMatrix {
  Format format;
  Rotation rotation;
  std::size_t rows, cols, row_nbytes, num_scales, group_size;
  std::uint8_t* packed;  // [rows, row_nbytes]
  std::uint16_t* scale;  // [rows, num_scales], fp16; null where units hold them
  Layout layout;
  Kernels kernels;

  bool has_products() const { return row_of(format.coding).num_vectors > 0; }
};

// Goes through the segments of a row in order.
struct Segment {
  std::size_t unit = 0, group = 0;

  void next(std::size_t unit_codes, std::size_t group_size) {
    const std::size_t group_end = (group + 1) * group_size, unit_end = (unit + 1) * unit_codes;
    if (group_end <= unit_end) ++group;
    if (unit_end <= group_end) ++unit;
  }
  void next(const StoredMatrix& matrix) { next(matrix.layout.unit_codes, matrix.group_size); }
};

// An activation in [-1, 1] times 127 is written in int8 limbs of base 255, each in [-127, 127], the highest first: one
// is int8 activations, three are 24 bits, as an fp32 mantissa has.
constexpr int kMaxLimbs = 3;
constexpr float kLimbScales[kMaxLimbs] = {1.0f, 1.0f / 255, 1.0f / 65025};

// out [tokens, rows] = x [tokens, cols] times the matrix transposed. `pack_activations` rotates x as the matrix is and
// fills the rest, a token after another (for several tokens, gemm_avx512.h has its own order): fp32 values
// [num_units, V, 32], or limbs [num_limb_units, V, limbs, 32] with the scale of each block and scale times the sum of
// its quotients.
struct Product {
  const StoredMatrix& matrix;
  std::size_t tokens;
  const float* x;
  float* out;
  float* x_values;
  std::int8_t* x_limbs;
  float* x_scale;  // [tokens, padded blocks]
  float* x_sum;    // [tokens, padded blocks]
};

// A search for the paths of a trellis that are nearest to rows x [rows, cols]; a state has at least 32 ends, and columns
// are at least 1. A path is made of states whose first symbol, the one that belongs to the weight, is the highest:
// `values` [2^state_bits], in the unit of x, are in that order. It goes on from the state before, where that is not
// negative, and its first `keep` states are written. With `ends` the row is complete.
struct PathSearch {
  const std::int16_t* x;
  std::size_t cols;
  const std::int16_t* values;
  int bits, state_bits;
  const std::int32_t* before;  // [rows]
  bool ends;
  std::size_t keep;
  std::uint16_t* states;  // [rows, keep]

  std::size_t scratch_nbytes() const { return (std::size_t{4} << state_bits) + (cols << (state_bits - bits)); }
};

// The same where later columns make up for errors: x [rows, cols], a scale for each, and what the error of a column, over
// the diagonal of `factor` [cols, cols], takes of each later one: the row of it. `own_factors` [cols, 32] are those of
// the columns before at their numbers modulo 32, and zeros.
struct CompensatedSearch {
  const float *x, *scales;
  std::size_t cols;
  const float *factor, *own_factors, *over_diagonal;
  const float* values;
  int bits, state_bits;
  const std::int32_t* before;  // [rows]
  bool ends;
  std::size_t most;  // paths that survive
  std::size_t keep;
  std::uint16_t* states;  // [rows, keep]
};

// An instruction set: another one is another file that fills this.
struct Isa {
  const char* name;
  bool (*runs_here)();
  Kernels (*kernels)(const Format& format, const Layout& layout);
  // Rows [begin, end) of [rows, cols] rotated, or rotated back.
  void (*rotate)(const Rotation&, bool inverse, std::size_t cols, const float* from, float* to, std::size_t begin,
                 std::size_t end, float* scratch);
  // Rows [begin, end) of a search.
  void (*find_paths)(const PathSearch&, std::size_t begin, std::size_t end, std::uint16_t* scratch);
  // The same, with scratch of so many bytes.
  std::size_t (*compensated_nbytes)(const CompensatedSearch&);
  void (*find_compensated_paths)(const CompensatedSearch&, std::size_t begin, std::size_t end, float* scratch);
};

// Rows that a kernel for several tokens decodes at a time, at most.
constexpr std::size_t kMaxTileRows = 16;
// Tokens whose activations may be laid out side by side: there is memory for a multiple of them.
constexpr std::size_t kTokenLanes = 16;
// Codes of a row that the fp32 kernel decodes at a time, and sums of rows by tokens that it keeps, at most.
constexpr std::size_t kTileCodes = 512;
constexpr std::size_t kMaxTileSums = 2048;

extern const Isa portable_isa;
#ifdef EPIC_QUANT_X86
extern const Isa avx512vnni_isa;
extern const Isa avx2_isa;
#endif

}  // namespace epic_quant
