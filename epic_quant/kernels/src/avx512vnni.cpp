// AVX-512 with VNNI, and all that AVX2 has. Compiled for them as a whole, so nothing here may be inlined elsewhere: all
// but the table is in an anonymous namespace, and no template of the standard library is used.
#ifdef _MSC_VER
#include <intrin.h>
#endif

#define EPIC_QUANT_AVX2
#define EPIC_QUANT_VNNI
#include "linear_avx512.h"
#include "quantize.h"
#include "table.h"

namespace epic_quant {
namespace {

bool runs_here() {
  if (!avx2_table.runs_here()) return false;
#ifdef _MSC_VER
  int leaf7[4];
  __cpuidex(leaf7, 7, 0);
  const bool saved = (_xgetbv(0) & 0xE6) == 0xE6;  // the system keeps the zmm registers and masks
  return saved && (leaf7[1] >> 16 & 1) && (leaf7[1] >> 17 & 1) && (leaf7[1] >> 30 & 1) && (leaf7[1] >> 31 & 1) &&
         (leaf7[2] >> 11 & 1);
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#endif
}

void tokens_int8(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  by_coding(job.weights, [&](auto kernel) {
    tokens_int8_lanes<kernel.coding, kernel.has_levels>(job, begin, end, scratch);
  });
}

}  // namespace

const Table avx512vnni_table = {"avx512vnni", runs_here,     prepare_lanes,   token,    tokens_int8,
                                tokens_fp32,  quantize_rows, dequantize_rows, turn_rows};

}  // namespace epic_quant
