// Products of several tokens in AVX-512 with VNNI; included by avx512vnni.cpp alone.
//
// Sixteen rows go side by side, each in 32-bit lanes of its own: `dpbusd` adds to every lane the products of four
// codes of its row with the same four digits of a token, so that no sum is ever taken across lanes, and scales come
// once a block for sixteen rows. The bytes of sixteen rows are brought into lanes before they are decoded.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "linear.h"
#include "linear_avx2.h"
#include "table.h"

namespace epic_quant {
namespace {

constexpr std::size_t kLanes = 16;
static_assert(kLanes <= kMostTileRows && kTokenLanes == 16, "scratch is for no more");
// A unit is 8 steps, in each of which a lane takes 4 codes of every vector.
constexpr std::size_t kSteps = 8;

EPIC_QUANT_INLINE __m512i set1(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }

// The sixteen bytes at the same place of sixteen rows: four words, a vector each, row r in lane r.
EPIC_QUANT_INLINE void lanes_of(const std::uint8_t* const (&rows)[kLanes], std::size_t at, __m512i (&words)[4]) {
  __m512i quarter[4];
  const auto sixteen = [&](int row) EPIC_QUANT_INLINE_LAMBDA {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at));
  };
  EPIC_QUANT_UNROLL
  for (int i = 0; i < 4; ++i) {
    __m512i rows4 = _mm512_castsi128_si512(sixteen(i));
    rows4 = _mm512_inserti32x4(rows4, sixteen(i + 4), 1);
    rows4 = _mm512_inserti32x4(rows4, sixteen(i + 8), 2);
    quarter[i] = _mm512_inserti32x4(rows4, sixteen(i + 12), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quarter[0], quarter[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(quarter[0], quarter[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quarter[2], quarter[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(quarter[2], quarter[3]);
  words[0] = _mm512_unpacklo_epi64(low01, low23);
  words[1] = _mm512_unpackhi_epi64(low01, low23);
  words[2] = _mm512_unpacklo_epi64(high01, high23);
  words[3] = _mm512_unpackhi_epi64(high01, high23);
}

// One step's codes of sixteen rows, from a word of each (three where a code may cross bytes).
template <Coding K>
struct Lanes;

template <>
struct Lanes<Coding::bits2> {
  static EPIC_QUANT_INLINE void decode(const __m512i* w, __m512i (&c)[4]) {
    c[0] = _mm512_and_si512(w[0], set1(3));
    c[1] = _mm512_and_si512(_mm512_srli_epi16(w[0], 2), set1(3));
    c[2] = _mm512_and_si512(_mm512_srli_epi16(w[0], 4), set1(3));
    c[3] = _mm512_and_si512(_mm512_srli_epi16(w[0], 6), set1(3));
  }
};

template <>
struct Lanes<Coding::bits4> {
  static EPIC_QUANT_INLINE void decode(const __m512i* w, __m512i (&c)[2]) {
    c[0] = _mm512_and_si512(w[0], set1(15));
    c[1] = _mm512_and_si512(_mm512_srli_epi16(w[0], 4), set1(15));
  }
};

template <>
struct Lanes<Coding::bits8> {
  static EPIC_QUANT_INLINE void decode(const __m512i* w, __m512i (&c)[1]) { c[0] = w[0]; }
};

// As in AVX2, but three bytes of every eight codes are brought together from twelve bytes of a lane, not forty-eight.
template <>
struct Lanes<Coding::bits3> {
  static EPIC_QUANT_INLINE __m512i in_order(__m512i bytes, char a, char b, char c, char d) {
    const auto word = [](int at, char a, char b, char c, char d) {
      return (at + a) | (at + b) << 8 | (at + c) << 16 | (at + d) << 24;
    };
    return _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(word(12, a, b, c, d), word(8, a, b, c, d), word(4, a, b, c, d),
                                                        word(0, a, b, c, d)));
  }
  static EPIC_QUANT_INLINE void decode(const __m512i* w, __m512i (&c)[8]) {
    constexpr __mmask64 second = 0x2222222222222222, third = 0x4444444444444444;
    const __m512i b0 = in_order(
        _mm512_mask_blend_epi8(second, _mm512_mask_blend_epi8(third, w[0], w[1]), w[2]), 0, 3, 2, 1);
    const __m512i b1 = in_order(
        _mm512_mask_blend_epi8(second, _mm512_mask_blend_epi8(third, w[1], w[2]), w[0]), 1, 0, 3, 2);
    const __m512i b2 = in_order(
        _mm512_mask_blend_epi8(second, _mm512_mask_blend_epi8(third, w[2], w[0]), w[1]), 2, 1, 0, 3);
    const __m512i mask = set1(7), low2 = set1(3), low1 = set1(1);
    c[0] = _mm512_and_si512(b0, mask);
    c[1] = _mm512_and_si512(_mm512_srli_epi16(b0, 3), mask);
    c[2] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(b0, 6), low2),
                           _mm512_andnot_si512(low2, _mm512_and_si512(_mm512_slli_epi16(b1, 2), mask)));
    c[3] = _mm512_and_si512(_mm512_srli_epi16(b1, 1), mask);
    c[4] = _mm512_and_si512(_mm512_srli_epi16(b1, 4), mask);
    c[5] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(b1, 7), low1),
                           _mm512_andnot_si512(low1, _mm512_and_si512(_mm512_add_epi8(b2, b2), mask)));
    c[6] = _mm512_and_si512(_mm512_srli_epi16(b2, 2), mask);
    c[7] = _mm512_and_si512(_mm512_srli_epi16(b2, 5), mask);
  }
};

template <>
struct Lanes<Coding::trits> {
  static EPIC_QUANT_INLINE void decode(const __m512i* w, __m512i (&c)[5]) {
    const __m512i b = w[0], high = _mm512_set1_epi16(static_cast<short>(0xFF00));
    const __m512i even = _mm512_maddubs_epi16(b, _mm512_set1_epi16(57));
    const __m512i odd = _mm512_mulhi_epu16(b, _mm512_set1_epi16(7282));
    const __m512i ninth = _mm512_or_si512(_mm512_srli_epi16(even, 9), _mm512_and_si512(odd, high));
    const __m512i below9 = _mm512_sub_epi8(_mm512_sub_epi8(b, ninth), _mm512_slli_epi16(ninth, 3));
    const __m512i even3 = _mm512_maddubs_epi16(ninth, _mm512_set1_epi16(86));
    const __m512i odd3 = _mm512_maddubs_epi16(ninth, _mm512_set1_epi16(86 << 8));
    const __m512i top = _mm512_or_si512(_mm512_srli_epi16(even3, 8), _mm512_and_si512(odd3, high));
    const __m512i rest = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0));
    const __m512i third = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2));
    c[0] = _mm512_shuffle_epi8(rest, below9);
    c[1] = _mm512_shuffle_epi8(third, below9);
    c[2] = _mm512_sub_epi8(_mm512_sub_epi8(ninth, top), _mm512_add_epi8(top, top));
    c[3] = _mm512_shuffle_epi8(rest, top);
    c[4] = _mm512_shuffle_epi8(third, top);
  }
};

// A unit of sixteen rows decoded: [8, V] vectors.
template <Coding K, bool Signed>
EPIC_QUANT_INLINE void decode_lanes(const std::uint8_t* const (&rows)[kLanes], std::size_t at, __m512i table,
                                    __m512i* to) {
  constexpr int V = vectors_of(K), kUnit = unit_nbytes_of(K), kWords = kUnit / 4 / kSteps;
  __m512i words[kUnit / 4];
  EPIC_QUANT_UNROLL
  for (int i = 0; i < kUnit / 16; ++i)
    lanes_of(rows, at + 16 * i, reinterpret_cast<__m512i(&)[4]>(words[4 * i]));
  EPIC_QUANT_UNROLL
  for (int step = 0; step < static_cast<int>(kSteps); ++step) {
    __m512i c[V];
    Lanes<K>::decode(words + step * kWords, c);
    EPIC_QUANT_UNROLL
    for (int v = 0; v < V; ++v)
      _mm512_store_si512(to++, Signed && K != Coding::bits8 ? _mm512_shuffle_epi8(table, c[v]) : c[v]);
  }
}

// Activations of several tokens, sixteen side by side: digits [num_digit_units, 8, V, 16] of four bytes each, scales
// and sums [num_blocks, 16], for one sixteen of tokens after another.
inline void prepare_lanes(const Linear& job, int digits, std::size_t begin, std::size_t end, float* scratch) {
  if (digits != 1 || job.tokens == 1) return prepare(job, digits, begin, end, scratch);
  const Plan& plan = job.plan;
  const std::size_t blocks = padded_blocks(plan), padded = plan.num_units * plan.unit_codes;
  const std::size_t num_digits = plan.num_digit_units * plan.unit_codes, vectors = plan.unit_codes / kVector;
  Linear one = job;
  one.tokens = 1;
  one.x_scale = scratch + padded;
  one.x_sum = one.x_scale + blocks;
  one.x_digits = reinterpret_cast<std::int8_t*>(one.x_sum + blocks);
  for (std::size_t token = begin; token < end; ++token) {
    one.x = job.x + token * job.weights.cols;
    prepare(one, 1, 0, 1, scratch);
    const std::size_t tile = token / kTokenLanes * kTokenLanes, lane = token - tile;
    for (std::size_t b = 0; b < plan.num_blocks; ++b) {
      job.x_scale[tile * blocks + b * kTokenLanes + lane] = one.x_scale[b];
      job.x_sum[tile * blocks + b * kTokenLanes + lane] = one.x_sum[b];
    }
    std::int8_t* to = job.x_digits + tile * num_digits + 4 * lane;
    for (std::size_t unit = 0; unit < num_digits; unit += plan.unit_codes)
      for (std::size_t step = 0; step < kSteps; ++step)
        for (std::size_t v = 0; v < vectors; ++v, to += 4 * kTokenLanes)
          std::memcpy(to, one.x_digits + unit + v * kVector + 4 * step, 4);
  }
}

// Sixteen rows, whose codes lie decoded with the scales of each block [num_blocks, 16], by T tokens from `token` on,
// all in one sixteen; of the rows, the first `rows` are written. Meanwhile `ahead` bytes from `next` on are fetched.
template <int V, int T>
void multiply_lanes(const Linear& job, const __m512i* codes, const float* scales, float zero, std::size_t token,
                    std::size_t row, std::size_t rows, const char* next, std::size_t ahead) {
  const Plan& plan = job.plan;
  const std::size_t tile = token / kTokenLanes * kTokenLanes, lane = token - tile, blocks = padded_blocks(plan);
  const float* x_scale = job.x_scale + tile * blocks + lane;
  const float* x_sum = job.x_sum + tile * blocks + lane;
  const std::int8_t* x = job.x_digits + tile * plan.num_digit_units * plan.unit_codes + 4 * lane;
  const std::size_t block_steps = plan.kind == Blocks::halves ? kSteps / 2 : plan.block_units * kSteps;
  const std::size_t share = ahead / plan.num_blocks + 64;
  const __m512 minus_zero = _mm512_set1_ps(-zero);
  const __m512i* const row_codes = codes;
  __m512 sums[T];
  EPIC_QUANT_UNROLL
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  Segment segment;
  for (std::size_t b = 0; b < plan.num_blocks; ++b, x_scale += kTokenLanes, x_sum += kTokenLanes) {
    if (plan.kind == Blocks::segments) {
      codes = row_codes + segment.unit * kSteps * V;
      segment.next(plan);
    }
    for (const std::size_t left = ahead > share ? ahead - share : 0; ahead > left; next += 64)
      _mm_prefetch(next, _MM_HINT_T1), ahead -= ahead < 64 ? ahead : 64;
    __m512i total[T];
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_si512();
    for (std::size_t step = 0; step < block_steps; ++step) {
      EPIC_QUANT_UNROLL
      for (int v = 0; v < V; ++v, x += 4 * kTokenLanes) {
        const __m512i code = _mm512_load_si512(codes++);
        EPIC_QUANT_UNROLL
        for (int t = 0; t < T; ++t) {
          std::int32_t four;
          std::memcpy(&four, x + 4 * t, sizeof four);
          total[t] = _mm512_dpbusd_epi32(total[t], code, _mm512_set1_epi32(four));
        }
      }
    }
    const __m512 scale = _mm512_load_ps(scales + b * kLanes);
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) {
      const __m512 zeros = _mm512_mul_ps(minus_zero, _mm512_set1_ps(x_sum[t]));
      const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[t]), _mm512_set1_ps(x_scale[t]), zeros);
      sums[t] = _mm512_fmadd_ps(value, scale, sums[t]);
    }
  }
  const __mmask16 written = static_cast<__mmask16>((1u << rows) - 1);
  EPIC_QUANT_UNROLL
  for (int t = 0; t < T; ++t)
    _mm512_mask_storeu_ps(job.out + (token + t) * job.weights.rows + row, written, sums[t]);
}

template <Coding K, bool Signed>
void tokens_int8_lanes(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  constexpr int V = vectors_of(K), kUnit = unit_nbytes_of(K);
  const Weights& weights = job.weights;
  const Plan& plan = job.plan;
  const std::size_t blocks = padded_blocks(plan), whole = weights.row_nbytes / kUnit;
  const __m512i table = _mm512_xor_si512(
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights.levels))), set1(128));
  const float zero = static_cast<float>(Signed ? 128 : weights.zero);
  __m512i* codes = static_cast<__m512i*>(scratch);
  float* scales = reinterpret_cast<float*>(codes + plan.num_units * kSteps * V);
  float* own = scales + blocks * kLanes;
  for (std::size_t first = begin; first < end; first += kLanes) {
    const std::size_t rows = end - first < kLanes ? end - first : kLanes;
    const std::uint8_t* at[kLanes];
    std::uint8_t tails[kLanes][kTailNbytes];
    for (std::size_t r = 0; r < kLanes; ++r) {
      // Rows that there are not repeat the last one; their products are dropped.
      const std::size_t row = first + (r < rows ? r : rows - 1);
      at[r] = weights.packed + row * weights.row_nbytes;
      expand_scales(weights, plan, row, own);
      for (std::size_t b = 0; b < plan.num_blocks; ++b) scales[b * kLanes + r] = own[b];
    }
    for (std::size_t unit = 0; unit < whole; ++unit)
      decode_lanes<K, Signed>(at, unit * kUnit, table, codes + unit * kSteps * V);
    if (whole < plan.num_units) {
      for (std::size_t r = 0; r < kLanes; ++r) {
        std::memset(tails[r], 0, kTailNbytes);
        std::memcpy(tails[r], at[r] + whole * kUnit, weights.row_nbytes - whole * kUnit);
        at[r] = tails[r];
      }
      for (std::size_t unit = whole; unit < plan.num_units; ++unit)
        decode_lanes<K, Signed>(at, (unit - whole) * kUnit, table, codes + unit * kSteps * V);
    }
    // The next rows' bytes come from memory while these are multiplied.
    const char* next = reinterpret_cast<const char*>(weights.packed + (first + rows) * weights.row_nbytes);
    std::size_t ahead = end - first - rows;
    ahead = (ahead < kLanes ? ahead : kLanes) * weights.row_nbytes;
    for (std::size_t token = 0, left = job.tokens; left; ahead = 0) {
      const std::size_t taken = left >= 16 ? 16 : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const auto multiply = taken == 16  ? multiply_lanes<V, 16>
                            : taken == 8 ? multiply_lanes<V, 8>
                            : taken == 4 ? multiply_lanes<V, 4>
                            : taken == 2 ? multiply_lanes<V, 2>
                                         : multiply_lanes<V, 1>;
      multiply(job, codes, scales, zero, token, first, rows, next, ahead);
      token += taken, left -= taken;
    }
  }
}

}  // namespace
}  // namespace epic_quant
