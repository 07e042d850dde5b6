// AVX-512 with VNNI, and all that AVX2 has. Compiled for them as a whole, so nothing here may be inlined elsewhere: all
// but the instruction set itself is in an anonymous namespace, and nothing of the standard library is used that makes
// code.
#ifdef _MSC_VER
#include <intrin.h>
#endif

#define EPIC_QUANT_AVX2
#define EPIC_QUANT_AVX512
#include "gemm_avx512.h"
#include "quantize.h"
#include "survivors.h"
#include "viterbi.h"

namespace epic_quant {
namespace {

bool runs_here() {
  if (!avx2_isa.runs_here()) return false;
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

Kernels kernels(const Format& format, const Layout& layout) {
  Kernels kernels = row_kernels(format);
  kernels.pack_activations = pack_lanes;
  by_product_kind(format, [&](auto kind) {
    using Kind = decltype(kind);
    by_blocks(layout, [&](auto blocks) {
      kernels.gemv_int8 = gemv<Kind, 1, blocks.value>;
      kernels.gemv_fp32 = gemv<Kind, kMaxLimbs, blocks.value>;
    });
    kernels.gemm_int8 = gemm_int8<Kind>;
    kernels.gemm_fp32 = gemm_fp32<Kind, Bytes<32>, Tile>;
  });
  return kernels;
}

}  // namespace

const Isa avx512vnni_isa = {"avx512vnni", runs_here, kernels, rotate_rows, find_paths, compensated_nbytes,
                          find_compensated_paths};

}  // namespace epic_quant
