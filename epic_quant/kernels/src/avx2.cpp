// AVX2 with FMA and F16C. Compiled for them as a whole, so nothing here may be inlined elsewhere: all but the
// instruction set itself is in an anonymous namespace, and nothing of the standard library is used that makes code.
#ifdef _MSC_VER
#include <intrin.h>
#endif

#define EPIC_QUANT_AVX2
#include "gemm_avx2.h"
#include "quantize.h"
#include "survivors.h"
#include "viterbi.h"

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

Kernels kernels(const Format& format, const Layout& layout) {
  Kernels kernels = row_kernels(format);
  kernels.pack_activations = pack_activations;
  by_product_kind(format, [&](auto kind) {
    using Kind = decltype(kind);
    by_blocks(layout, [&](auto blocks) {
      kernels.gemv_int8 = gemv<Kind, 1, blocks.value>;
      kernels.gemv_fp32 = gemv<Kind, kMaxLimbs, blocks.value>;
      kernels.gemm_int8 = gemm_int8<Kind, blocks.value>;
    });
    kernels.gemm_fp32 = gemm_fp32<Kind, Bytes<32>, Tile>;
  });
  return kernels;
}

}  // namespace

const Isa avx2_isa = {"avx2", runs_here, kernels, rotate_rows, find_paths, compensated_nbytes,
                          find_compensated_paths};

}  // namespace epic_quant
