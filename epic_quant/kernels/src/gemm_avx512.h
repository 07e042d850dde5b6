// Products of several tokens in AVX-512 with VNNI; included by avx512vnni.cpp alone.
//
// Sixteen rows go side by side, each in 32-bit lanes of its own: `dpbusd` adds to every lane the products of four
// codes of its row with the same four limbs of a token, so that no sum is ever taken across lanes, and scales come
// once a block for sixteen rows. The bytes of sixteen rows are brought into lanes before they are decoded.
#pragma once

#include "gemm_avx2.h"

namespace epic_quant {
namespace {

constexpr std::size_t kLanes = 16;
static_assert(kLanes <= kMaxTileRows && kTokenLanes == 16, "scratch is for no more");
// A unit is 8 steps, in each of which a lane takes 4 codes of every vector.
constexpr std::size_t kSteps = 8;

// The sixteen bytes at the same place of sixteen rows: four words, a vector each, row r in lane r.
EPIC_QUANT_INLINE void load_words(const std::uint8_t* const (&rows)[kLanes], std::size_t at, Bytes<64>* words) {
  __m512i quarter[4];
  const auto sixteen = [&](int row) EPIC_QUANT_INLINE_LAMBDA {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at));
  };
  EPIC_QUANT_UNROLL for (int i = 0; i < 4; ++i) {
    __m512i rows4 = _mm512_castsi128_si512(sixteen(i));
    rows4 = _mm512_inserti32x4(rows4, sixteen(i + 4), 1);
    rows4 = _mm512_inserti32x4(rows4, sixteen(i + 8), 2);
    quarter[i] = _mm512_inserti32x4(rows4, sixteen(i + 12), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quarter[0], quarter[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(quarter[0], quarter[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quarter[2], quarter[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(quarter[2], quarter[3]);
  words[0] = {_mm512_unpacklo_epi64(low01, low23)};
  words[1] = {_mm512_unpackhi_epi64(low01, low23)};
  words[2] = {_mm512_unpacklo_epi64(high01, high23)};
  words[3] = {_mm512_unpackhi_epi64(high01, high23)};
}

// Vectors of which a lane takes 4 codes a step: those of a unit, or one where a vector has scales of its own.
template <class Kind>
constexpr int step_vectors = Kind::has_scales ? 1 : Kind::V;

// A unit of sixteen rows decoded: [8, V] vectors; or [V, 8] where each of V has scales of its own.
template <class Kind>
EPIC_QUANT_INLINE void decode_lanes(const std::uint8_t* const (&rows)[kLanes], std::size_t at,
                                    const Levels<Bytes<64>, true>& levels, Bytes<64>* to) {
  constexpr int V = Kind::V, kInputs = Kind::inputs;
  Bytes<64> words[kSteps + Kind::is_trellis][kInputs];
  if constexpr (Kind::is_trellis) {
    Bytes<64> input[4];
    for (std::size_t half = 0; half < 2; ++half) {
      EPIC_QUANT_UNROLL for (int i = 0; i < kInputs; ++i) {
        load_words(rows, at + (half * kInputs + i) * 16, input);
        EPIC_QUANT_UNROLL for (std::size_t step = 0; step < 4; ++step) words[4 * half + step][i] = input[step];
      }
    }
    load_words(rows, at + Kind::unit_nbytes, input);
    words[kSteps][0] = input[0];
  } else if constexpr (Kind::has_scales) {
    EPIC_QUANT_UNROLL for (int i = 0; i < kInputs; ++i) {
      Bytes<64> input[kSteps];
      load_words(rows, at + Codes<Kind::coding>::input_at[i], input);
      load_words(rows, at + Codes<Kind::coding>::input_at[i] + 16, input + 4);
      EPIC_QUANT_UNROLL for (std::size_t step = 0; step < kSteps; ++step) words[step][i] = input[step];
    }
  } else {
    EPIC_QUANT_UNROLL for (int i = 0; i < Kind::unit_nbytes / 16; ++i)
      load_words(rows, at + 16 * i, &words[0][0] + 4 * i);
  }
  EPIC_QUANT_UNROLL for (std::size_t step = 0; step < kSteps; ++step) {
    Bytes<64> codes[V];
    if constexpr (Kind::is_trellis) {
      Bytes<64> in[kInputs + 1];
      EPIC_QUANT_UNROLL for (int i = 0; i < kInputs; ++i) in[i] = words[step][i];
      in[kInputs] = words[step + 1][0];
      Codes<Kind::coding>::template decode<4>(in, levels.states, codes);
    } else {
      Codes<Kind::coding>::template decode<4>(words[step], codes);
    }
    EPIC_QUANT_UNROLL for (int v = 0; v < V; ++v)
      (Kind::has_levels ? levels.template level<Kind>(codes[v]) : codes[v])
          .store(to + (Kind::has_scales ? v * kSteps + step : step * V + v));
  }
}

// Activations of several tokens, sixteen side by side: limbs [num_limb_units, 8, V, 16] of four bytes each, or
// [num_limb_units, V, 8, 16] as codes are, scales and sums [num_blocks, 16], for one sixteen of tokens after another.
inline void pack_lanes(const Product& product, int limbs, std::size_t begin, std::size_t end, float* scratch) {
  if (limbs != 1 || product.tokens == 1) return pack_activations(product, limbs, begin, end, scratch);
  const Layout& layout = product.matrix.layout;
  const bool has_scales = row_of(product.matrix.format.coding).group_codes > 0;
  const std::size_t blocks = layout.padded_blocks(), vectors = has_scales ? 1 : layout.unit_codes / kVector;
  const std::size_t num_limbs = layout.num_limb_units * layout.unit_codes;
  Product one = product;
  one.tokens = 1;
  one.x_scale = scratch + layout.padded_cols();
  one.x_sum = one.x_scale + blocks;
  one.x_limbs = reinterpret_cast<std::int8_t*>(one.x_sum + blocks);
  for (std::size_t token = begin; token < end; ++token) {
    one.x = product.x + token * product.matrix.cols;
    pack_activations(one, 1, 0, 1, scratch);
    const std::size_t tile = token / kTokenLanes * kTokenLanes, lane = token - tile;
    for (std::size_t b = 0; b < layout.num_blocks; ++b) {
      product.x_scale[tile * blocks + b * kTokenLanes + lane] = one.x_scale[b];
      product.x_sum[tile * blocks + b * kTokenLanes + lane] = one.x_sum[b];
    }
    std::int8_t* to = product.x_limbs + tile * num_limbs + 4 * lane;
    for (std::size_t unit = 0; unit < num_limbs; unit += vectors * kVector)
      for (std::size_t step = 0; step < kSteps; ++step)
        for (std::size_t v = 0; v < vectors; ++v, to += 4 * kTokenLanes)
          std::memcpy(to, one.x_limbs + unit + v * kVector + 4 * step, 4);
  }
}

// Sixteen rows, whose codes lie decoded with the scales of each block [num_blocks, 16], by T tokens from `token` on,
// all in one sixteen; of the rows, the first `rows` are written. Meanwhile `ahead` bytes from `next` on are fetched.
template <int V, bool HasMinima, int T>
void multiply_lanes(const Product& product, const Bytes<64>* codes, const float* scales, const float* minima,
                    float zero, std::size_t token, std::size_t row, std::size_t rows, const char* next,
                    std::size_t ahead) {
  const Layout& layout = product.matrix.layout;
  const std::size_t tile = token / kTokenLanes * kTokenLanes, lane = token - tile, blocks = layout.padded_blocks();
  const float* x_scale = product.x_scale + tile * blocks + lane;
  const float* x_sum = product.x_sum + tile * blocks + lane;
  const std::int8_t* x = product.x_limbs + tile * layout.num_limb_units * layout.unit_codes + 4 * lane;
  const std::size_t block_steps = layout.kind == Blocks::halves ? kSteps / 2 : layout.block_units * kSteps;
  const std::size_t share = ahead / layout.num_blocks + 64;
  const __m512 minus_zero = _mm512_set1_ps(-zero);
  const Bytes<64>* const row_codes = codes;
  __m512 sums[T];
  EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  Segment segment;
  for (std::size_t b = 0; b < layout.num_blocks; ++b, x_scale += kTokenLanes, x_sum += kTokenLanes) {
    if (layout.kind == Blocks::segments) {
      codes = row_codes + segment.unit * kSteps * V;
      segment.next(product.matrix);
    }
    for (const std::size_t left = ahead > share ? ahead - share : 0; ahead > left; next += 64)
      EPIC_QUANT_PREFETCH(next), ahead -= ahead < 64 ? ahead : 64;
    __m512i total[T];
    EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_si512();
    for (std::size_t step = 0; step < block_steps; ++step) {
      EPIC_QUANT_UNROLL for (int v = 0; v < V; ++v, x += 4 * kTokenLanes) {
        const __m512i code = (codes++)->v;
        EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) {
          std::int32_t four;
          std::memcpy(&four, x + 4 * t, sizeof four);
          total[t] = _mm512_dpbusd_epi32(total[t], code, _mm512_set1_epi32(four));
        }
      }
    }
    const __m512 scale = _mm512_load_ps(scales + b * kLanes);
    EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t) {
      if (HasMinima) {
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(total[t]), _mm512_set1_ps(x_scale[t]));
        sums[t] = _mm512_fnmadd_ps(_mm512_load_ps(minima + b * kLanes), _mm512_set1_ps(x_sum[t]), sums[t]);
        sums[t] = _mm512_fmadd_ps(value, scale, sums[t]);
        continue;
      }
      const __m512 zeros = _mm512_mul_ps(minus_zero, _mm512_set1_ps(x_sum[t]));
      const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[t]), _mm512_set1_ps(x_scale[t]), zeros);
      sums[t] = _mm512_fmadd_ps(value, scale, sums[t]);
    }
  }
  const __mmask16 written = static_cast<__mmask16>((1u << rows) - 1);
  EPIC_QUANT_UNROLL for (int t = 0; t < T; ++t)
    _mm512_mask_storeu_ps(product.out + (token + t) * product.matrix.rows + row, written, sums[t]);
}

template <class Kind>
void gemm_int8(const Product& product, std::size_t begin, std::size_t end, void* scratch) {
  constexpr int V = Kind::V, kUnit = Kind::unit_nbytes;
  const StoredMatrix& matrix = product.matrix;
  const Layout& layout = matrix.layout;
  const std::size_t whole = units_in_place<Kind>(matrix);
  const Levels<Bytes<64>, true> levels(matrix.format);
  const float zero = static_cast<float>(Kind::has_levels ? 128 : matrix.format.zero);
  Bytes<64>* codes = static_cast<Bytes<64>*>(scratch);
  float* scales = reinterpret_cast<float*>(codes + layout.num_units * kSteps * V);
  float* minima = scales + layout.padded_blocks() * kLanes;
  float* own = Kind::has_minima ? minima + layout.padded_blocks() * kLanes : minima;
  for (std::size_t first = begin; first < end; first += kLanes) {
    const Rows rows(first, end, kLanes);
    const std::uint8_t* at[kLanes];
    std::uint8_t tails[kLanes][kTailNbytes];
    for (std::size_t r = 0; r < kLanes; ++r) {
      at[r] = matrix.packed + rows[r] * matrix.row_nbytes;
      expand_scales<Kind>(matrix, rows[r], own, own + layout.padded_blocks());
      for (std::size_t b = 0; b < layout.num_blocks; ++b) {
        scales[b * kLanes + r] = own[b];
        if (Kind::has_minima) minima[b * kLanes + r] = own[layout.padded_blocks() + b];
      }
    }
    for (std::size_t unit = 0; unit < whole; ++unit)
      decode_lanes<Kind>(at, unit * kUnit, levels, codes + unit * kSteps * V);
    if (!Kind::has_scales && whole < layout.num_units) {
      for (std::size_t r = 0; r < kLanes; ++r) {
        copy_tail<Kind>(matrix, at[r], whole, tails[r]);
        at[r] = tails[r];
      }
      for (std::size_t unit = whole; unit < layout.num_units; ++unit)
        decode_lanes<Kind>(at, (unit - whole) * kUnit, levels, codes + unit * kSteps * V);
    }
    // The next rows' bytes come from memory while these are multiplied.
    const char* next = reinterpret_cast<const char*>(matrix.packed + (first + rows.count) * matrix.row_nbytes);
    std::size_t ahead = end - first - rows.count;
    ahead = (ahead < kLanes ? ahead : kLanes) * matrix.row_nbytes;
    for (std::size_t token = 0, left = product.tokens; left; ahead = 0) {
      const std::size_t taken = left >= 16 ? 16 : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      constexpr int kTogether = step_vectors<Kind>;
      constexpr bool kMinima = Kind::has_minima;
      const auto multiply = taken == 16  ? multiply_lanes<kTogether, kMinima, 16>
                            : taken == 8 ? multiply_lanes<kTogether, kMinima, 8>
                            : taken == 4 ? multiply_lanes<kTogether, kMinima, 4>
                            : taken == 2 ? multiply_lanes<kTogether, kMinima, 2>
                                         : multiply_lanes<kTogether, kMinima, 1>;
      multiply(product, codes, scales, minima, zero, token, first, rows.count, next, ahead);
      token += taken, left -= taken;
    }
  }
}

}  // namespace
}  // namespace epic_quant
