// Plain C++17, which the compiler may vectorize for the CPU that it builds for.
#include "gemm.h"
#include "quantize.h"
#include "survivors.h"
#include "viterbi.h"

namespace epic_quant {
namespace {

// The sum of products of 16 codes in each of some vectors, which are 32 codes apart, and activations `stride` apart.
EPIC_QUANT_OWN_FUNCTION std::int32_t dot(const std::int8_t* values, const std::int8_t* x, std::size_t vectors,
                                         std::size_t stride) {
  std::int32_t total = 0;
  for (std::size_t v = 0; v < vectors; ++v, values += kVector, x += stride) {
    std::int32_t part = 0;
    EPIC_QUANT_VECTORIZE
    for (int j = 0; j < 16; ++j) part += values[j] * x[j];
    total += part;
  }
  return total;
}

// A decoded row [num_units, V, 32] by tokens whose activations have `Limbs` limbs.
template <int Limbs, bool HasMinima>
void multiply_limbs(const Product& product, const std::int8_t* values, const float* scales, const float* minima,
                    std::size_t row) {
  const Layout& layout = product.matrix.layout;
  const std::size_t x_stride = layout.num_limb_units * layout.unit_codes * Limbs, blocks = layout.padded_blocks();
  const std::size_t vectors = layout.block_vectors;
  const int halves = layout.kind == Blocks::halves ? 2 : 1;
  for (std::size_t token = 0; token < product.tokens; ++token) {
    const std::int8_t* x = product.x_limbs + token * x_stride;
    const float* x_scale = product.x_scale + token * blocks;
    const std::int8_t* w = values;
    float sum = 0;
    for (std::size_t block = 0; HasMinima && block < layout.num_blocks; ++block)
      sum -= minima[block] * product.x_sum[token * blocks + block];
    Segment segment;
    for (std::size_t block = 0; block < layout.num_blocks; block += halves) {
      if (layout.kind == Blocks::segments) {
        w = values + segment.unit * layout.unit_codes;
        segment.next(product.matrix);
      }
      for (int half = 0; half < 2; ++half) {
        float value = 0;
        for (int limb = 0; limb < Limbs; ++limb)
          value += kLimbScales[limb] * static_cast<float>(dot(w + 16 * half, x + limb * kVector + 16 * half, vectors,
                                                        kVector * Limbs));
        const std::size_t own = block + (halves == 2 ? half : 0);
        sum += value * (scales[own] * x_scale[own]);
      }
      w += vectors * kVector, x += vectors * kVector * Limbs;
    }
    product.out[token * product.matrix.rows + row] = sum;
  }
}

template <class Kind, int Limbs>
void gemm_limbs(const Product& product, std::size_t begin, std::size_t end, void* scratch) {
  const StoredMatrix& matrix = product.matrix;
  const Layout& layout = matrix.layout;
  const Levels<Bytes<16>> levels(matrix.format);
  float* scales = static_cast<float*>(scratch);
  float* minima = scales + layout.padded_blocks();
  auto* values = reinterpret_cast<std::int8_t*>(Kind::has_minima ? minima + layout.padded_blocks() : minima);
  for (std::size_t row = begin; row < end; ++row) {
    expand_scales<Kind>(matrix, row, scales, minima);
    const Row<Kind> packed(matrix, row);
    for (std::size_t unit = 0; unit < layout.num_units; ++unit)
      decode_unit<Kind>(packed.unit(unit), levels, values + unit * layout.unit_codes,
                        [&](Bytes<16> codes) { return levels.template value<Kind>(codes); });
    multiply_limbs<Limbs, Kind::has_minima>(product, values, scales, minima, row);
  }
}

// In the form in which compilers keep the sums in registers.
struct Tile {
  static constexpr std::size_t rows = 4, tokens = 512;
  static constexpr int R = 4, T = 1;

  template <int>
  static EPIC_QUANT_OWN_FUNCTION void multiply(const float* tile, std::size_t codes, const float* x, std::size_t,
                                               float* sums) {
    float total[R][8] = {};
    for (std::size_t k = 0; k < codes; k += 8)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 8; ++i) total[r][i] += tile[r * codes + k + i] * x[k + i];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 8; ++i) sums[r * tokens * 8 + i] += total[r][i];
  }
};

Kernels kernels(const Format& format, const Layout&) {
  Kernels kernels = row_kernels(format);
  kernels.pack_activations = pack_activations;
  by_product_kind(format, [&](auto kind) {
    using Kind = decltype(kind);
    kernels.gemv_int8 = kernels.gemm_int8 = gemm_limbs<Kind, 1>;
    kernels.gemv_fp32 = gemm_limbs<Kind, kMaxLimbs>;
    kernels.gemm_fp32 = gemm_fp32<Kind, Bytes<16>, Tile>;
  });
  return kernels;
}

}  // namespace

const Isa portable_isa = {"portable", [] { return true; }, kernels, rotate_rows, find_paths, compensated_nbytes,
                          find_compensated_paths};

}  // namespace epic_quant
