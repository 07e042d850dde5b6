// One table of kernels by instruction set: another instruction set is another file that fills a table.
#pragma once

#include <cstddef>

namespace epic_quant {

struct Quantize;
struct Dequantize;
struct TurnRows;

struct Table {
  const char* name;
  // Whether this machine can run the table's kernels.
  bool (*runs_here)();

  // Rows [begin, end), as quantize.h says; `scratch` has scratch_floats(cols).
  std::size_t (*quantize_rows)(const Quantize& job, std::size_t begin, std::size_t end, float* scratch);
  void (*dequantize_rows)(const Dequantize& job, std::size_t begin, std::size_t end, float* scratch);
  void (*turn_rows)(const TurnRows& job, std::size_t begin, std::size_t end, float* scratch);
};

extern const Table portable_table;
#ifdef EPIC_QUANT_X86
extern const Table avx2_table;
#endif

}  // namespace epic_quant
