// AVX2 with FMA and F16C. Compiled for them as a whole, so nothing here may be inlined elsewhere: all but the table is
// in an anonymous namespace, and no template of the standard library is used.
#ifdef _MSC_VER
#include <intrin.h>
#endif

#define EPIC_QUANT_AVX2
#include "linear_avx2.h"
#include "quantize.h"
#include "table.h"

namespace epic_quant {
namespace {

bool runs_here() {
#ifdef _MSC_VER
  int leaf1[4], leaf7[4];
  __cpuid(leaf1, 1);
  __cpuidex(leaf7, 7, 0);
  const bool saved = (leaf1[2] >> 27 & 1) && (_xgetbv(0) & 6) == 6;  // the system keeps the ymm registers
  return saved && (leaf1[2] >> 12 & 1) && (leaf1[2] >> 29 & 1) && (leaf7[1] >> 5 & 1);
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
}

void tokens_int8(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  by_coding(job.weights, [&](auto kernel) { kernel.tokens_int8_kernel(job, begin, end, scratch); });
}

}  // namespace

const Table avx2_table = {"avx2", runs_here, prepare, token, tokens_int8, tokens_fp32,
                          quantize_rows, dequantize_rows, turn_rows};

}  // namespace epic_quant
