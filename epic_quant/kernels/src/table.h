// One table of kernels by instruction set: another instruction set is another file that fills a table.
#pragma once

#include <cstddef>

namespace epic_quant {

struct Linear;
struct Quantize;
struct Dequantize;
struct TurnRows;

struct Table {
  const char* name;
  // Whether this machine can run the table's kernels.
  bool (*runs_here)();

  // Lay out the activations of tokens [begin, end): as fp32 (digits 0), or in 1 or 3 digits. `scratch` has
  // prepare_nbytes(job).
  void (*prepare)(const Linear& job, int digits, std::size_t begin, std::size_t end, float* scratch);
  // Rows [begin, end) of the product. `scratch` is aligned to 64 bytes and has scratch_nbytes(job).
  // For one token, whose activations have 1 or 3 digits:
  void (*token)(const Linear& job, int digits, std::size_t begin, std::size_t end, void* scratch);
  // For several, with one digit:
  void (*tokens_int8)(const Linear& job, std::size_t begin, std::size_t end, void* scratch);
  // For any number, in fp32, and any group:
  void (*tokens_fp32)(const Linear& job, std::size_t begin, std::size_t end, void* scratch);

  // Rows [begin, end), as quantize.h says; `scratch` has scratch_floats(cols).
  std::size_t (*quantize_rows)(const Quantize& job, std::size_t begin, std::size_t end, float* scratch);
  void (*dequantize_rows)(const Dequantize& job, std::size_t begin, std::size_t end, float* scratch);
  void (*turn_rows)(const TurnRows& job, std::size_t begin, std::size_t end, float* scratch);
};

// Rows that a kernel for several tokens decodes at a time, at most.
constexpr std::size_t kMostTileRows = 16;
// Tokens whose activations a table may lay out side by side: there is memory for a multiple of them.
constexpr std::size_t kTokenLanes = 16;
// Codes of a row that the fp32 kernel decodes at a time, and the tokens that it multiplies by them.
constexpr std::size_t kTileCodes = 512;
constexpr std::size_t kTileTokens = 48;

std::size_t prepare_nbytes(const Linear& job);
std::size_t scratch_nbytes(const Linear& job);

extern const Table portable_table;
#ifdef EPIC_QUANT_X86
extern const Table avx512vnni_table;
extern const Table avx2_table;
#endif

}  // namespace epic_quant
