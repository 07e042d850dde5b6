// Products in AVX2, and with VNNI where a file that includes this defines EPIC_QUANT_AVX512.
//
// Codes are multiplied as the bytes that they are: `maddubs` takes 32 unsigned codes and 32 int8 limbs of activations
// to 16 sums of pairs, `dpbusd` to 8 sums of four. That codes stand for code - zero, or scale * code - minimum, is made
// good once a row, by the sums of activations. Codes that look up signed levels go by magnitude, their sign given to the
// limbs; or with VNNI, whose sums are wide enough for it, by their level + 128, as codes whose zero is 128.
#pragma once

#include "gemm.h"

namespace epic_quant {
namespace {

// Scales of a block for all eight sums; where blocks are halves of a unit, of this one and the next, a lane each.
template <Blocks B>
EPIC_QUANT_INLINE __m256 scale_of(const float* scales, std::size_t unit_block) {
  if (B != Blocks::halves) return _mm256_broadcast_ss(scales + unit_block);
  const __m256 pairs = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(scales + 2 * unit_block)));
  return _mm256_permutevar_ps(pairs, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

EPIC_QUANT_INLINE __m256i load(const void* from) { return Bytes<32>::load(from).v; }
EPIC_QUANT_INLINE __m256i pairs_of(__m256i products) { return _mm256_madd_epi16(products, _mm256_set1_epi16(1)); }

// Products of signed levels and limbs, to eight sums.
EPIC_QUANT_INLINE __m256i add_signed_products(__m256i total, __m256i levels, __m256i limbs) {
  const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(limbs, levels));
  return _mm256_add_epi32(total, pairs_of(products));
}

// Products of codes and limbs, summed up in parts until `sums_of` makes them eight.
#ifdef EPIC_QUANT_AVX512
constexpr bool kLevelsFrom128 = true;
EPIC_QUANT_INLINE __m256i add_products(__m256i total, __m256i codes, __m256i limbs) {
  return _mm256_dpbusd_epi32(total, codes, limbs);
}
EPIC_QUANT_INLINE __m256i sums_of(__m256i total) { return total; }
#else
constexpr bool kLevelsFrom128 = false;
EPIC_QUANT_INLINE __m256i add_products(__m256i total, __m256i codes, __m256i limbs) {
  return _mm256_add_epi16(total, _mm256_maddubs_epi16(codes, limbs));
}
EPIC_QUANT_INLINE __m256i sums_of(__m256i total) { return pairs_of(total); }
#endif

// One token.
template <class Kind, int Limbs, Blocks B>
void gemv(const Product& product, std::size_t begin, std::size_t end, void* scratch) {
  constexpr int V = Kind::V, kUnit = Kind::unit_nbytes;
  const StoredMatrix& matrix = product.matrix;
  const Layout& layout = matrix.layout;
  constexpr bool kBySign = Kind::has_levels && !kLevelsFrom128;
  const Levels<Bytes<32>, kLevelsFrom128> levels(matrix.format);
  const std::size_t blocks = layout.padded_blocks(), block_units = layout.block_units, num_units = layout.num_units;
  const std::size_t whole_units = units_in_place<Kind>(matrix) / block_units * block_units;
  const float minus_zero = kBySign ? 0.0f : static_cast<float>(Kind::has_levels ? -128 : -matrix.format.zero);
  float* const combined = static_cast<float*>(scratch);
  float* const minima = combined + blocks;
  for (std::size_t row = begin; row < end; ++row) {
    expand_scales<Kind>(matrix, row, combined, minima);
    // Several where vectors have scales of their own, since one would wait for itself.
    constexpr int kSums = Kind::has_scales && V > 1 ? 4 : 1;
    __m256 sums[kSums];
    EPIC_QUANT_UNROLL for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_ps();
    __m256& sum = sums[0];
    for (std::size_t b = 0; b < blocks; b += 8) {
      const __m256 scale = _mm256_loadu_ps(combined + b);
      _mm256_storeu_ps(combined + b, _mm256_mul_ps(scale, _mm256_loadu_ps(product.x_scale + b)));
      const __m256 subtracted = Kind::has_minima ? _mm256_loadu_ps(minima + b) : scale;
      if (!kBySign) sum = _mm256_fmadd_ps(subtracted, _mm256_loadu_ps(product.x_sum + b), sum);
    }
    sum = _mm256_mul_ps(sum, _mm256_set1_ps(Kind::has_minima ? -1.0f : minus_zero));

    const std::int8_t* x = product.x_limbs;
    Segment segment;
    std::size_t index = 0;
    __m256i total[Limbs];
    const auto clear = [&]() EPIC_QUANT_INLINE_LAMBDA {
      EPIC_QUANT_UNROLL for (int limb = 0; limb < Limbs; ++limb) total[limb] = _mm256_setzero_si256();
    };
    const auto multiply_vector = [&](Bytes<32> codes) EPIC_QUANT_INLINE_LAMBDA {
      const __m256i code = (Kind::has_levels ? levels.template level<Kind>(codes) : codes).v;
      EPIC_QUANT_UNROLL for (int limb = 0; limb < Limbs; ++limb, x += kVector)
        total[limb] = (kBySign ? add_signed_products : add_products)(total[limb], code, load(x));
    };
    const auto multiply = [&](const Bytes<32>(&codes)[V]) EPIC_QUANT_INLINE_LAMBDA {
      EPIC_QUANT_UNROLL for (int v = 0; v < V; ++v) multiply_vector(codes[v]);
    };
    const auto scale = [&](__m256& sum) EPIC_QUANT_INLINE_LAMBDA {
      if (!kBySign) {
        EPIC_QUANT_UNROLL for (int limb = 0; limb < Limbs; ++limb) total[limb] = sums_of(total[limb]);
      }
      __m256 value = _mm256_cvtepi32_ps(total[0]);
      EPIC_QUANT_UNROLL for (int limb = 1; limb < Limbs; ++limb)
        value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[limb]), _mm256_set1_ps(kLimbScales[limb]), value);
      sum = _mm256_fmadd_ps(value, scale_of<B>(combined, index++), sum);
    };
    const auto block = [&](const std::uint8_t* packed) EPIC_QUANT_INLINE_LAMBDA {
      Bytes<32> codes[V];
      if (Kind::has_scales) {
        decode<Kind>(packed, 0, levels, codes);
        EPIC_QUANT_UNROLL for (int v = 0; v < V; ++v) {
          clear();
          multiply_vector(codes[v]);
          scale(sums[v % kSums]);
        }
        return;
      }
      if (B == Blocks::segments) {
        decode<Kind>(packed, 0, levels, codes);
        for (const std::size_t unit = segment.unit; segment.unit == unit && segment.group < matrix.num_scales;
             segment.next(matrix)) {
          clear();
          multiply(codes);
          scale(sum);
        }
        return;
      }
      clear();
      for (std::size_t u = 0; u < block_units; ++u, packed += kUnit) {
        decode<Kind>(packed, 0, levels, codes);
        multiply(codes);
      }
      scale(sum);
    };

    const std::uint8_t* packed = matrix.packed + row * matrix.row_nbytes;
    std::size_t unit = 0;
    for (; unit < whole_units; unit += block_units) block(packed + unit * kUnit);
    if (!Kind::has_scales && unit < num_units) {
      // What is left of the row, with zeros after it: less than a block, but for a trellis.
      std::uint8_t tail[kTailNbytes];
      copy_tail<Kind>(matrix, packed, unit, tail);
      block(tail);
      if (Kind::is_trellis && unit + 1 < num_units) block(tail + kUnit);
    }
    EPIC_QUANT_UNROLL for (int i = 1; i < kSums; ++i) sum = _mm256_add_ps(sum, sums[i]);
    product.out[row] = Eight{sum}.sum();
  }
}

#ifndef EPIC_QUANT_AVX512

// R rows by T tokens of int8 activations, over all blocks of a row whose codes (levels, where signed) lie decoded.
template <bool Signed, bool HasMinima, Blocks B, int R, int T>
EPIC_QUANT_INLINE void multiply_int8(const Product& product, const std::uint8_t* codes, std::size_t codes_stride,
                                     const float* scales, const float* minima, std::size_t token, std::size_t row,
                                     std::size_t rows_left, int block_vectors) {
  const Layout& layout = product.matrix.layout;
  const std::size_t blocks = layout.padded_blocks(), x_stride = layout.num_limb_units * layout.unit_codes;
  const std::size_t num_blocks = x_stride / kVector / block_vectors;
  __m256 sums[R][T];
  EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r)
    EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) sums[r][t] = _mm256_setzero_ps();
  if (!Signed) {
    const float* const subtracted = HasMinima ? minima : scales;
    for (std::size_t b = 0; b < blocks; b += 8)
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
          sums[r][t] = _mm256_fmadd_ps(_mm256_loadu_ps(subtracted + r * blocks + b),
                                       _mm256_loadu_ps(product.x_sum + (token + t) * blocks + b), sums[r][t]);
    const __m256 minus_zero = _mm256_set1_ps(HasMinima ? -1.0f : static_cast<float>(-product.matrix.format.zero));
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) sums[r][t] = _mm256_mul_ps(sums[r][t], minus_zero);
  }
  const std::int8_t* x = product.x_limbs + token * x_stride;
  const std::uint8_t* const row_codes = codes;
  Segment segment;
  for (std::size_t b = 0; b < num_blocks; ++b) {
    if (B == Blocks::segments) {
      codes = row_codes + segment.unit * layout.unit_codes;
      segment.next(product.matrix);
    }
    __m256i total[R][T];
    EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r)
      EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) total[r][t] = _mm256_setzero_si256();
    for (int v = 0; v < block_vectors; ++v, codes += kVector, x += kVector) {
      __m256i own[T];
      EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) own[t] = load(x + t * x_stride);
      EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r) {
        const __m256i code = load(codes + r * codes_stride);
        EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t)
          total[r][t] = (Signed ? add_signed_products : add_products)(total[r][t], code, own[t]);
      }
    }
    EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) {
      const __m256 x_scale = scale_of<B>(product.x_scale + (token + t) * blocks, b);
      EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r) {
        const __m256 scale = _mm256_mul_ps(x_scale, scale_of<B>(scales + r * blocks, b));
        const __m256i pairs = Signed ? total[r][t] : sums_of(total[r][t]);
        sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(pairs), scale, sums[r][t]);
      }
    }
  }
  for (int r = 0; r < R && static_cast<std::size_t>(r) < rows_left; ++r)
    for (int t = 0; t < T; ++t) product.out[(token + t) * product.matrix.rows + row + r] = Eight{sums[r][t]}.sum();
}

template <class Kind, Blocks B>
void gemm_int8(const Product& product, std::size_t begin, std::size_t end, void* scratch) {
  constexpr int V = Kind::V;
  constexpr bool Signed = Kind::has_levels;
  constexpr std::size_t kRows = 8;
  static_assert(kRows <= kMaxTileRows, "scratch is for no more");
  const StoredMatrix& matrix = product.matrix;
  const Layout& layout = matrix.layout;
  const Levels<Bytes<32>> levels(matrix.format);
  const std::size_t blocks = layout.padded_blocks(), padded = layout.padded_cols(), num_units = layout.num_units;
  const int block_vectors = static_cast<int>(layout.block_vectors);
  float* scales = static_cast<float*>(scratch);
  float* minima = scales + kRows * blocks;
  std::uint8_t* codes = reinterpret_cast<std::uint8_t*>(Kind::has_minima ? minima + kRows * blocks : minima);
  for (std::size_t first = begin; first < end; first += kRows) {
    const Rows rows(first, end, kRows);
    for (std::size_t r = 0; r < kRows; ++r) {
      expand_scales<Kind>(matrix, rows[r], scales + r * blocks, minima + r * blocks);
      const Row<Kind> packed(matrix, rows[r]);
      std::uint8_t* to = codes + r * padded;
      for (std::size_t u = 0; u < num_units; ++u, to += V * kVector)
        decode_unit<Kind>(packed.unit(u), levels, to, [&](Bytes<32> c) EPIC_QUANT_INLINE_LAMBDA {
          return Signed ? levels.template level<Kind>(c) : c;
        });
    }
    // The next rows' bytes come from memory while these are multiplied.
    const char* next = reinterpret_cast<const char*>(matrix.packed + (first + rows.count) * matrix.row_nbytes);
    std::size_t ahead = end - first - rows.count;
    ahead = (ahead < kRows ? ahead : kRows) * matrix.row_nbytes;
    const std::size_t share = ahead * 2 / (product.tokens + 1) + 64;
    std::size_t token = 0;
    for (; token + 2 <= product.tokens; token += 2) {
      for (const std::size_t left = ahead > share ? ahead - share : 0; ahead > left; next += 64)
        EPIC_QUANT_PREFETCH(next), ahead -= ahead < 64 ? ahead : 64;
      for (std::size_t r = 0; r < rows.count; r += 4)
        multiply_int8<Signed, Kind::has_minima, B, 4, 2>(product, codes + r * padded, padded, scales + r * blocks,
                                                         minima + r * blocks, token, first + r, rows.count - r,
                                                         block_vectors);
    }
    if (token < product.tokens)
      for (std::size_t r = 0; r < rows.count; r += 4)
        multiply_int8<Signed, Kind::has_minima, B, 4, 1>(product, codes + r * padded, padded, scales + r * blocks,
                                                         minima + r * blocks, token, first + r, rows.count - r,
                                                         block_vectors);
  }
}

#endif

// Four rows by three tokens fill the registers.
struct Tile {
  static constexpr std::size_t rows = 8, tokens = 48;
  static constexpr int R = 4, T = 3;

  template <int N>
  static EPIC_QUANT_OWN_FUNCTION void multiply(const float* tile, std::size_t codes, const float* x,
                                               std::size_t x_stride, float* sums) {
    Eight total[R][N];
    EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r)
      EPIC_QUANT_UNROLL for (int t = 0; t < N; ++t) total[r][t] = Eight::load(sums + (r * tokens + t) * 8);
    for (std::size_t k = 0; k < codes; k += 8) {
      Eight own[N];
      EPIC_QUANT_UNROLL for (int t = 0; t < N; ++t) own[t] = Eight::load(x + t * x_stride + k);
      EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r) {
        const Eight weight = Eight::load(tile + r * codes + k);
        EPIC_QUANT_UNROLL for (int t = 0; t < N; ++t) total[r][t] = multiply_add(weight, own[t], total[r][t]);
      }
    }
    EPIC_QUANT_UNROLL for (int r = 0; r < R; ++r)
      EPIC_QUANT_UNROLL for (int t = 0; t < N; ++t) total[r][t].store(sums + (r * tokens + t) * 8);
  }
};

template <Blocks B>
struct BlocksAre {
  static constexpr Blocks value = B;
};

template <class Visit>
void by_blocks(const Layout& layout, Visit&& visit) {
  switch (layout.kind) {
    case Blocks::units: return visit(BlocksAre<Blocks::units>{});
    case Blocks::halves: return visit(BlocksAre<Blocks::halves>{});
    case Blocks::segments: return visit(BlocksAre<Blocks::segments>{});
  }
}

}  // namespace
}  // namespace epic_quant
