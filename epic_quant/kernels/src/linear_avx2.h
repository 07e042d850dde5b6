// Products with packed weights in AVX2, and with VNNI where a file that includes this defines EPIC_QUANT_VNNI.
//
// Codes are multiplied as the bytes that they are: `maddubs` takes 32 unsigned codes and 32 signed digits of
// activations to 16 sums of pairs, `dpbusd` to 8 sums of four. That codes stand for code - zero is made good once a
// row, by the sums of activations. Codes that look up signed levels go by magnitude, their sign given to the digits; or
// with VNNI, whose sums are wide enough for it, by their level + 128, as codes whose zero is 128.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "eight.h"
#include "linear.h"
#include "prepare.h"
#include "table.h"

#if defined(__GNUC__)
#define EPIC_QUANT_UNROLL _Pragma("GCC unroll 16")
#define EPIC_QUANT_INLINE inline __attribute__((always_inline))
#define EPIC_QUANT_INLINE_LAMBDA __attribute__((always_inline))
#else
#define EPIC_QUANT_UNROLL
#define EPIC_QUANT_INLINE __forceinline
#define EPIC_QUANT_INLINE_LAMBDA
#endif

namespace epic_quant {
namespace {

EPIC_QUANT_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
EPIC_QUANT_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// The codes of a unit, in the order that linear.h tells.
template <Coding K>
struct Unit;

template <>
struct Unit<Coding::bits2> {
  static EPIC_QUANT_INLINE void decode(const std::uint8_t* p, __m256i (&c)[4]) {
    const __m256i v = load(p), mask = _mm256_set1_epi8(3);
    c[0] = _mm256_and_si256(v, mask);
    c[1] = _mm256_and_si256(_mm256_srli_epi16(v, 2), mask);
    c[2] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
    c[3] = _mm256_and_si256(_mm256_srli_epi16(v, 6), mask);
  }
};

template <>
struct Unit<Coding::bits4> {
  static EPIC_QUANT_INLINE void decode(const std::uint8_t* p, __m256i (&c)[2]) {
    const __m256i v = load(p), mask = _mm256_set1_epi8(15);
    c[0] = _mm256_and_si256(v, mask);
    c[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
  }
};

template <>
struct Unit<Coding::bits8> {
  static EPIC_QUANT_INLINE void decode(const std::uint8_t* p, __m256i (&c)[1]) { c[0] = load(p); }
};

// Eight codes in three bytes. The 48 bytes of each half come apart into the first, second and third byte of every
// three; two blends bring those of one kind together, and a shuffle in order.
template <>
struct Unit<Coding::bits3> {
  static EPIC_QUANT_INLINE __m256i halves(const std::uint8_t* p) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 48));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  static EPIC_QUANT_INLINE __m256i both(char a0, char a1, char a2, char a3, char a4, char a5, char a6, char a7, char a8,
                                        char a9, char a10, char a11, char a12, char a13, char a14, char a15) {
    return _mm256_setr_epi8(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,  //
                            a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15);
  }
  static EPIC_QUANT_INLINE void decode(const std::uint8_t* p, __m256i (&c)[8]) {
    const __m256i v0 = halves(p), v1 = halves(p + 16), v2 = halves(p + 32);
    // Places in 16 bytes whose index is 1 or 2 modulo 3.
    const __m256i one = both(0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0);
    const __m256i two = both(0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0);
    // Byte i of v1 is byte 16 + i of the 48, so 1 more modulo 3; of v2, 2 more.
    const __m256i b0 = _mm256_shuffle_epi8(_mm256_blendv_epi8(_mm256_blendv_epi8(v0, v2, one), v1, two),
                                           both(0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14, 1, 4, 7, 10, 13));
    const __m256i b1 = _mm256_shuffle_epi8(_mm256_blendv_epi8(_mm256_blendv_epi8(v1, v0, one), v2, two),
                                           both(1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14));
    const __m256i b2 = _mm256_shuffle_epi8(_mm256_blendv_epi8(_mm256_blendv_epi8(v2, v1, one), v0, two),
                                           both(2, 5, 8, 11, 14, 1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15));
    const __m256i mask = _mm256_set1_epi8(7), low2 = _mm256_set1_epi8(3), low1 = _mm256_set1_epi8(1);
    c[0] = _mm256_and_si256(b0, mask);
    c[1] = _mm256_and_si256(_mm256_srli_epi16(b0, 3), mask);
    c[2] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(b0, 6), low2),
                           _mm256_andnot_si256(low2, _mm256_and_si256(_mm256_slli_epi16(b1, 2), mask)));
    c[3] = _mm256_and_si256(_mm256_srli_epi16(b1, 1), mask);
    c[4] = _mm256_and_si256(_mm256_srli_epi16(b1, 4), mask);
    c[5] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(b1, 7), low1),
                           _mm256_andnot_si256(low1, _mm256_and_si256(_mm256_add_epi8(b2, b2), mask)));
    c[6] = _mm256_and_si256(_mm256_srli_epi16(b2, 2), mask);
    c[7] = _mm256_and_si256(_mm256_srli_epi16(b2, 5), mask);
  }
};

// Five base-3 digits a byte. It is divided by 9, and the quotient by 3, by multiplying with 57/512 (7282/65536
// for odd bytes, the even one below being their fraction) and 86/256, all exact for bytes up to 242; tables split what is below 9.
template <>
struct Unit<Coding::trits> {
  static EPIC_QUANT_INLINE void decode(const std::uint8_t* p, __m256i (&c)[5]) {
    const __m256i b = load(p), high = _mm256_set1_epi16(static_cast<short>(0xFF00));
    const __m256i even = _mm256_maddubs_epi16(b, _mm256_set1_epi16(57));
    const __m256i odd = _mm256_mulhi_epu16(b, _mm256_set1_epi16(7282));
    const __m256i ninth = _mm256_or_si256(_mm256_srli_epi16(even, 9), _mm256_and_si256(odd, high));
    const __m256i below9 = _mm256_sub_epi8(_mm256_sub_epi8(b, ninth), _mm256_slli_epi16(ninth, 3));
    const __m256i even3 = _mm256_maddubs_epi16(ninth, _mm256_set1_epi16(86));
    const __m256i odd3 = _mm256_maddubs_epi16(ninth, _mm256_set1_epi16(86 << 8));
    const __m256i top = _mm256_or_si256(_mm256_srli_epi16(even3, 8), _mm256_and_si256(odd3, high));
    const __m256i rest = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0));
    const __m256i third = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2));
    c[0] = _mm256_shuffle_epi8(rest, below9);
    c[1] = _mm256_shuffle_epi8(third, below9);
    c[2] = _mm256_sub_epi8(_mm256_sub_epi8(ninth, top), _mm256_add_epi8(top, top));
    c[3] = _mm256_shuffle_epi8(rest, top);
    c[4] = _mm256_shuffle_epi8(third, top);
  }
};

// Bytes that hold what a row lacks to whole blocks.
constexpr std::size_t kTailNbytes = 160;

// Where a row's units are read: in place, but for those that reach past its end, which are in a copy with zeros after.
struct Row {
  Row(const Weights& weights, std::size_t row, std::size_t num_units, std::size_t unit_nbytes)
      : in_place_(weights.packed + row * weights.row_nbytes), whole_(weights.row_nbytes / unit_nbytes) {
    // A block of several units may begin inside the row and end far behind it.
    if (whole_ < num_units) {
      std::memset(tail_, 0, sizeof tail_);
      std::memcpy(tail_, in_place_ + whole_ * unit_nbytes, weights.row_nbytes - whole_ * unit_nbytes);
    }
  }
  EPIC_QUANT_INLINE const std::uint8_t* unit(std::size_t index, std::size_t unit_nbytes) const {
    return index < whole_ ? in_place_ + index * unit_nbytes : tail_ + (index - whole_) * unit_nbytes;
  }

 private:
  const std::uint8_t* in_place_;
  std::size_t whole_;
  std::uint8_t tail_[kTailNbytes];
};

// The row's scales [num_scales] from fp16, each for the blocks that it serves, and zeros for blocks behind the row.
inline void expand_scales(const Weights& weights, const Plan& plan, std::size_t row, float* to) {
  const std::uint16_t* from = weights.scale + row * weights.num_scales;
  const std::size_t blocks = padded_blocks(plan);
  if (weights.num_scales == 1) {
    const __m256 all = _mm256_set1_ps(from_fp16(*from));
    for (std::size_t b = 0; b < blocks; b += 8) _mm256_storeu_ps(to + b, all);
    return;
  }
  std::size_t b = 0;
  if (plan.kind == Blocks::segments) {
    for (Segment segment; segment.group < weights.num_scales; segment.next(plan)) to[b++] = from_fp16(from[segment.group]);
    for (; b < blocks; ++b) to[b] = 0;
    return;
  }
  const std::size_t each = plan.group_size / plan.block_codes, used = weights.num_scales * each;
  if (each == 1) {
    for (; b + 8 <= used; b += 8)
      _mm256_storeu_ps(to + b, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + b))));
    for (; b < used; ++b) to[b] = from_fp16(from[b]);
  } else {
    for (std::size_t scale = 0; scale < weights.num_scales; ++scale)
      for (std::size_t i = 0; i < each; ++i) to[b++] = from_fp16(from[scale]);
  }
  for (; b < blocks; ++b) to[b] = 0;
}

EPIC_QUANT_INLINE float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Scales of a block for all eight sums; where blocks are halves of a unit, of this one and the next, a lane each.
template <Blocks B>
EPIC_QUANT_INLINE __m256 scale_of(const float* scales, std::size_t unit_block) {
  if (B != Blocks::halves) return _mm256_broadcast_ss(scales + unit_block);
  const __m256 pairs = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(scales + 2 * unit_block)));
  return _mm256_permutevar_ps(pairs, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

// What codes stand for, as signed bytes, where it is not code - zero; or 128 more, as unsigned bytes.
struct Levels {
  explicit Levels(const Weights& weights, bool from_128 = false)
      : flip(_mm256_set1_epi8(from_128 ? 0 : -128)),
        table(_mm256_xor_si256(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights.levels))),
            _mm256_set1_epi8(from_128 ? -128 : 0))) {}
  template <Coding K>
  EPIC_QUANT_INLINE __m256i of(__m256i codes) const {
    return K == Coding::bits8 ? _mm256_xor_si256(codes, flip) : _mm256_shuffle_epi8(table, codes);
  }
  __m256i flip, table;
};

EPIC_QUANT_INLINE __m256i pairs_of(__m256i products) { return _mm256_madd_epi16(products, _mm256_set1_epi16(1)); }

// Products of codes and digits, summed up in parts until `sums_of` makes them eight.
#ifdef EPIC_QUANT_VNNI
constexpr bool kLevelsFrom128 = true;
EPIC_QUANT_INLINE __m256i add_products(__m256i total, __m256i codes, __m256i digits) {
  return _mm256_dpbusd_epi32(total, codes, digits);
}
EPIC_QUANT_INLINE __m256i sums_of(__m256i total) { return total; }
#else
constexpr bool kLevelsFrom128 = false;
EPIC_QUANT_INLINE __m256i add_products(__m256i total, __m256i codes, __m256i digits) {
  return _mm256_add_epi16(total, _mm256_maddubs_epi16(codes, digits));
}
EPIC_QUANT_INLINE __m256i sums_of(__m256i total) { return pairs_of(total); }
#endif

// One token. Signed: codes stand for levels of their own, not code - zero.
template <Coding K, bool Signed, int D, Blocks B>
void token(const Linear& job, std::size_t begin, std::size_t end, float* combined) {
  constexpr int V = vectors_of(K), kUnit = unit_nbytes_of(K);
  const Weights& weights = job.weights;
  const Plan& plan = job.plan;
  constexpr bool kFolded = Signed && !kLevelsFrom128;
  const Levels levels(weights, kLevelsFrom128);
  const std::size_t blocks = padded_blocks(plan), block_units = plan.block_units, num_units = plan.num_units;
  const std::size_t whole_units = weights.row_nbytes / kUnit / block_units * block_units;
  const float minus_zero = kFolded ? 0.0f : static_cast<float>(Signed ? -128 : -weights.zero);
  for (std::size_t row = begin; row < end; ++row) {
    expand_scales(weights, plan, row, combined);
    __m256 sum = _mm256_setzero_ps();
    for (std::size_t b = 0; b < blocks; b += 8) {
      const __m256 scale = _mm256_loadu_ps(combined + b);
      _mm256_storeu_ps(combined + b, _mm256_mul_ps(scale, _mm256_loadu_ps(job.x_scale + b)));
      if (!kFolded) sum = _mm256_fmadd_ps(scale, _mm256_loadu_ps(job.x_sum + b), sum);
    }
    sum = _mm256_mul_ps(sum, _mm256_set1_ps(minus_zero));

    const std::int8_t* x = job.x_digits;
    Segment segment;
    std::size_t index = 0;
    __m256i total[D];
    const auto clear = [&]() EPIC_QUANT_INLINE_LAMBDA {
      EPIC_QUANT_UNROLL
      for (int d = 0; d < D; ++d) total[d] = _mm256_setzero_si256();
    };
    const auto multiply = [&](const __m256i(&codes)[V]) EPIC_QUANT_INLINE_LAMBDA {
      EPIC_QUANT_UNROLL
      for (int v = 0; v < V; ++v) {
        if (kFolded) {
          const __m256i level = levels.template of<K>(codes[v]), magnitude = _mm256_abs_epi8(level);
          EPIC_QUANT_UNROLL
          for (int d = 0; d < D; ++d, x += kVector)
            total[d] = _mm256_add_epi32(
                total[d], pairs_of(_mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(load(x), level))));
        } else {
          const __m256i code = Signed ? levels.template of<K>(codes[v]) : codes[v];
          EPIC_QUANT_UNROLL
          for (int d = 0; d < D; ++d, x += kVector) total[d] = add_products(total[d], code, load(x));
        }
      }
    };
    const auto scale = [&]() EPIC_QUANT_INLINE_LAMBDA {
      if (!kFolded) {
        EPIC_QUANT_UNROLL
        for (int d = 0; d < D; ++d) total[d] = sums_of(total[d]);
      }
      __m256 value = _mm256_cvtepi32_ps(total[0]);
      if (D > 1) value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[D > 1 ? 1 : 0]), _mm256_set1_ps(1.0f / 255), value);
      if (D > 2) value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[D > 2 ? 2 : 0]), _mm256_set1_ps(1.0f / 65025), value);
      sum = _mm256_fmadd_ps(value, scale_of<B>(combined, index++), sum);
    };
    const auto block = [&](const std::uint8_t* p) EPIC_QUANT_INLINE_LAMBDA {
      __m256i codes[V];
      if (B == Blocks::segments) {
        Unit<K>::decode(p, codes);
        for (const std::size_t unit = segment.unit; segment.unit == unit && segment.group < weights.num_scales;
             segment.next(plan)) {
          clear();
          multiply(codes);
          scale();
        }
        return;
      }
      clear();
      for (std::size_t u = 0; u < block_units; ++u, p += kUnit) {
        Unit<K>::decode(p, codes);
        multiply(codes);
      }
      scale();
    };

    const std::uint8_t* packed = weights.packed + row * weights.row_nbytes;
    std::size_t unit = 0;
    for (; unit < whole_units; unit += block_units) block(packed + unit * kUnit);
    if (unit < num_units) {
      // What is left of the row, with zeros after it: less than a block.
      std::uint8_t tail[kTailNbytes] = {};
      std::memcpy(tail, packed + unit * kUnit, weights.row_nbytes - unit * kUnit);
      block(tail);
    }
    job.out[row] = sum_of(sum);
  }
}

// Rows that the kernels for several tokens decode at a time.
constexpr std::size_t kRows = 8;
static_assert(kRows <= kMostTileRows, "scratch is for no more");

// R rows by T tokens of int8 activations, over all blocks of a row whose codes (levels, where signed) lie decoded.
template <bool Signed, Blocks B, int R, int T>
EPIC_QUANT_INLINE void multiply_int8(const Linear& job, const std::uint8_t* codes, std::size_t codes_stride,
                                     const float* scales, std::size_t token, std::size_t row, std::size_t rows_left,
                                     int block_vectors) {
  const Plan& plan = job.plan;
  const std::size_t blocks = padded_blocks(plan), x_stride = plan.num_digit_units * plan.unit_codes;
  const std::size_t num_blocks = x_stride / kVector / block_vectors;
  __m256 sums[R][T];
  EPIC_QUANT_UNROLL
  for (int r = 0; r < R; ++r)
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) sums[r][t] = _mm256_setzero_ps();
  if (!Signed) {
    for (std::size_t b = 0; b < blocks; b += 8)
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
          sums[r][t] = _mm256_fmadd_ps(_mm256_loadu_ps(scales + r * blocks + b),
                                       _mm256_loadu_ps(job.x_sum + (token + t) * blocks + b), sums[r][t]);
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        sums[r][t] = _mm256_mul_ps(sums[r][t], _mm256_set1_ps(static_cast<float>(-job.weights.zero)));
  }
  const std::int8_t* x = job.x_digits + token * x_stride;
  const std::uint8_t* const row_codes = codes;
  Segment segment;
  for (std::size_t b = 0; b < num_blocks; ++b) {
    if (B == Blocks::segments) {
      codes = row_codes + segment.unit * plan.unit_codes;
      segment.next(plan);
    }
    __m256i total[R][T];
    EPIC_QUANT_UNROLL
    for (int r = 0; r < R; ++r)
      EPIC_QUANT_UNROLL
      for (int t = 0; t < T; ++t) total[r][t] = _mm256_setzero_si256();
    for (int v = 0; v < block_vectors; ++v, codes += kVector, x += kVector) {
      __m256i own[T];
      EPIC_QUANT_UNROLL
      for (int t = 0; t < T; ++t) own[t] = load(x + t * x_stride);
      EPIC_QUANT_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256i code = load(codes + r * codes_stride);
        EPIC_QUANT_UNROLL
        for (int t = 0; t < T; ++t)
          total[r][t] =
              Signed ? _mm256_add_epi32(total[r][t], pairs_of(_mm256_maddubs_epi16(_mm256_abs_epi8(code),
                                                                                    _mm256_sign_epi8(own[t], code))))
                     : _mm256_add_epi16(total[r][t], _mm256_maddubs_epi16(code, own[t]));
      }
    }
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) {
      const __m256 x_scale = scale_of<B>(job.x_scale + (token + t) * blocks, b);
      EPIC_QUANT_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256 scale = _mm256_mul_ps(x_scale, scale_of<B>(scales + r * blocks, b));
        const __m256i pairs = Signed ? total[r][t] : pairs_of(total[r][t]);
        sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(pairs), scale, sums[r][t]);
      }
    }
  }
  for (int r = 0; r < R && static_cast<std::size_t>(r) < rows_left; ++r)
    for (int t = 0; t < T; ++t) job.out[(token + t) * job.weights.rows + row + r] = sum_of(sums[r][t]);
}

template <Coding K, bool Signed, Blocks B>
void tokens_int8(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  constexpr int V = vectors_of(K), kUnit = unit_nbytes_of(K);
  const Weights& weights = job.weights;
  const Plan& plan = job.plan;
  const Levels levels(weights);
  const std::size_t blocks = padded_blocks(plan), padded = plan.num_units * plan.unit_codes;
  const int block_vectors = static_cast<int>(plan.block_units) * V;
  float* scales = static_cast<float*>(scratch);
  std::uint8_t* codes = reinterpret_cast<std::uint8_t*>(scales + kRows * blocks);
  for (std::size_t first = begin; first < end; first += kRows) {
    const std::size_t rows = end - first < kRows ? end - first : kRows;
    for (std::size_t r = 0; r < kRows; ++r) {
      // Rows that there are not repeat the last one; their products are dropped.
      const std::size_t row = first + (r < rows ? r : rows - 1);
      expand_scales(weights, plan, row, scales + r * blocks);
      const Row packed(weights, row, plan.num_units, kUnit);
      std::uint8_t* to = codes + r * padded;
      for (std::size_t u = 0; u < plan.num_units; ++u) {
        __m256i c[V];
        Unit<K>::decode(packed.unit(u, kUnit), c);
        EPIC_QUANT_UNROLL
        for (int v = 0; v < V; ++v, to += kVector) store(to, Signed ? levels.template of<K>(c[v]) : c[v]);
      }
    }
    // The next rows' bytes come from memory while these are multiplied.
    const char* next = reinterpret_cast<const char*>(weights.packed + (first + rows) * weights.row_nbytes);
    std::size_t ahead = end - first - rows;
    ahead = (ahead < kRows ? ahead : kRows) * weights.row_nbytes;
    const std::size_t share = ahead * 2 / (job.tokens + 1) + 64;
    std::size_t token = 0;
    for (; token + 2 <= job.tokens; token += 2) {
      for (const std::size_t left = ahead > share ? ahead - share : 0; ahead > left; next += 64)
        _mm_prefetch(next, _MM_HINT_T1), ahead -= ahead < 64 ? ahead : 64;
      for (std::size_t r = 0; r < rows; r += 4)
        multiply_int8<Signed, B, 4, 2>(job, codes + r * padded, padded, scales + r * blocks, token, first + r,
                                           rows - r, block_vectors);
    }
    if (token < job.tokens)
      for (std::size_t r = 0; r < rows; r += 4)
        multiply_int8<Signed, B, 4, 1>(job, codes + r * padded, padded, scales + r * blocks, token, first + r,
                                           rows - r, block_vectors);
  }
}

// R rows by T tokens over one tile of decoded weights, added to sums [kRows][kTileTokens][8].
template <int R, int T>
EPIC_QUANT_INLINE void multiply_fp32(const float* tile, std::size_t tile_codes, const float* x, std::size_t x_stride,
                                     float* sums) {
  __m256 total[R][T];
  EPIC_QUANT_UNROLL
  for (int r = 0; r < R; ++r)
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) total[r][t] = _mm256_loadu_ps(sums + (r * kTileTokens + t) * 8);
  for (std::size_t k = 0; k < tile_codes; k += 8) {
    __m256 own[T];
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) own[t] = _mm256_loadu_ps(x + t * x_stride + k);
    EPIC_QUANT_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256 weight = _mm256_loadu_ps(tile + r * tile_codes + k);
      EPIC_QUANT_UNROLL
      for (int t = 0; t < T; ++t) total[r][t] = _mm256_fmadd_ps(weight, own[t], total[r][t]);
    }
  }
  EPIC_QUANT_UNROLL
  for (int r = 0; r < R; ++r)
    EPIC_QUANT_UNROLL
    for (int t = 0; t < T; ++t) _mm256_storeu_ps(sums + (r * kTileTokens + t) * 8, total[r][t]);
}

// The weights of one unit in fp32, exactly as (code - zero) * scale or level * scale.
template <Coding K, bool Signed>
EPIC_QUANT_INLINE void decode_fp32(const Weights& weights, const Plan& plan, const Levels& levels,
                                   const std::uint8_t* packed, std::size_t unit, const float* scales,
                                   const std::int32_t* groups, float* to) {
  constexpr int V = vectors_of(K);
  __m256i c[V];
  Unit<K>::decode(packed, c);
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(weights.zero));
  alignas(32) std::int8_t values[V * kVector];
  EPIC_QUANT_UNROLL
  for (int v = 0; v < V; ++v)
    store(values + v * kVector, Signed ? levels.template of<K>(c[v]) : _mm256_sub_epi8(c[v], zero));
  const bool halves = plan.kind == Blocks::halves, segments = plan.kind == Blocks::segments;
  const __m256 low = segments ? _mm256_setzero_ps() : _mm256_broadcast_ss(scales + (halves ? 2 * unit : unit / plan.block_units));
  const __m256 high = halves ? _mm256_broadcast_ss(scales + 2 * unit + 1) : low;
  for (int at = 0; at < V * static_cast<int>(kVector); at += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + at));
    const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    const __m256 scale = segments ? _mm256_i32gather_ps(scales, load(groups + at), 4) : at & 16 ? high : low;
    _mm256_storeu_ps(to + at, _mm256_mul_ps(value, scale));
  }
}

template <Coding K, bool Signed>
void tokens_fp32(const Linear& job, std::size_t begin, std::size_t end, float* scratch) {
  constexpr int V = vectors_of(K), kUnit = unit_nbytes_of(K);
  constexpr std::size_t kTileUnits = kTileCodes / (V * kVector) ? kTileCodes / (V * kVector) : 1;
  const Weights& weights = job.weights;
  const Plan& plan = job.plan;
  const Levels levels(weights);
  const std::size_t blocks = padded_blocks(plan), padded = plan.num_units * plan.unit_codes;
  const bool segments = plan.kind == Blocks::segments;
  const std::size_t scale_stride = segments ? weights.num_scales : blocks;
  // The group of every code of a tile, where those of a unit differ; the last one's behind the row.
  std::int32_t groups[kTileUnits * V * kVector];
  float* scales = scratch;
  float* tile = scales + kRows * ((scale_stride + 15) / 16 * 16);
  float* sums = tile + kRows * kTileUnits * V * kVector;
  for (std::size_t first = begin; first < end; first += kRows) {
    const std::size_t rows = end - first < kRows ? end - first : kRows;
    for (std::size_t r = 0; r < kRows; ++r) {
      const std::size_t row = first + (r < rows ? r : rows - 1);
      if (segments)
        for (std::size_t s = 0; s < weights.num_scales; ++s)
          scales[r * scale_stride + s] = from_fp16(weights.scale[row * weights.num_scales + s]);
      else
        expand_scales(weights, plan, row, scales + r * scale_stride);
    }
    for (std::size_t token = 0; token < job.tokens; token += kTileTokens) {
      const std::size_t tokens = job.tokens - token < kTileTokens ? job.tokens - token : kTileTokens;
      for (std::size_t r = 0; r < kRows; ++r)
        std::memset(sums + r * kTileTokens * 8, 0, tokens * 8 * sizeof(float));
      for (std::size_t unit = 0; unit < plan.num_units; unit += kTileUnits) {
        const std::size_t units = plan.num_units - unit < kTileUnits ? plan.num_units - unit : kTileUnits;
        const std::size_t codes = units * V * kVector;
        for (std::size_t at = 0; segments && at < codes; ++at) {
          const std::size_t within = at % (V * kVector);
          const std::size_t in_order = unit * V * kVector + at - within + within % kVector * V + within / kVector;
          const std::size_t last = weights.num_scales - 1, group = in_order / plan.group_size;
          groups[at] = static_cast<std::int32_t>(group < last ? group : last);
        }
        for (std::size_t r = 0; r < kRows; ++r) {
          const Row packed(weights, first + (r < rows ? r : rows - 1), plan.num_units, kUnit);
          for (std::size_t u = 0; u < units; ++u)
            decode_fp32<K, Signed>(weights, plan, levels, packed.unit(unit + u, kUnit), unit + u,
                                   scales + r * scale_stride, groups + u * V * kVector,
                                   tile + r * codes + u * V * kVector);
        }
        const float* x = job.x_values + token * padded + unit * V * kVector;
        std::size_t t = 0;
        for (; t + 3 <= tokens; t += 3)
          for (std::size_t r = 0; r < rows; r += 4)
            multiply_fp32<4, 3>(tile + r * codes, codes, x + t * padded, padded, sums + (r * kTileTokens + t) * 8);
        for (; t < tokens; ++t)
          for (std::size_t r = 0; r < rows; r += 4)
            multiply_fp32<4, 1>(tile + r * codes, codes, x + t * padded, padded, sums + (r * kTileTokens + t) * 8);
      }
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t t = 0; t < tokens; ++t)
          job.out[(token + t) * weights.rows + first + r] = sum_of(_mm256_loadu_ps(sums + (r * kTileTokens + t) * 8));
    }
  }
}

// The kernel for a coding and kind of blocks, chosen once a call.
template <Blocks B>
struct Kind {
  static constexpr Blocks value = B;
};

template <class Visit>
void by_kind(const Plan& plan, Visit&& visit) {
  switch (plan.kind) {
    case Blocks::units: return visit(Kind<Blocks::units>{});
    case Blocks::halves: return visit(Kind<Blocks::halves>{});
    case Blocks::segments: return visit(Kind<Blocks::segments>{});
  }
}

template <Coding K, bool Signed>
struct For {
  static constexpr Coding coding = K;
  static constexpr bool has_levels = Signed;

  static void token_kernel(const Linear& job, int digits, std::size_t begin, std::size_t end, void* scratch) {
    float* own = static_cast<float*>(scratch);
    by_kind(job.plan, [&](auto kind) {
      digits == 1 ? token<K, Signed, 1, kind.value>(job, begin, end, own)
                  : token<K, Signed, 3, kind.value>(job, begin, end, own);
    });
  }
  static void tokens_int8_kernel(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
    by_kind(job.plan, [&](auto kind) { tokens_int8<K, Signed, kind.value>(job, begin, end, scratch); });
  }
  static void tokens_fp32_kernel(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
    tokens_fp32<K, Signed>(job, begin, end, static_cast<float*>(scratch));
  }
};

template <class Visit>
void by_coding(const Weights& weights, Visit&& visit) {
  const bool levels = weights.has_levels;
  switch (weights.coding) {
    case Coding::bits2: return levels ? visit(For<Coding::bits2, true>{}) : visit(For<Coding::bits2, false>{});
    case Coding::bits3: return levels ? visit(For<Coding::bits3, true>{}) : visit(For<Coding::bits3, false>{});
    case Coding::bits4: return levels ? visit(For<Coding::bits4, true>{}) : visit(For<Coding::bits4, false>{});
    case Coding::bits8: return visit(For<Coding::bits8, true>{});
    case Coding::trits: return visit(For<Coding::trits, false>{});
  }
}

inline void token(const Linear& job, int digits, std::size_t begin, std::size_t end, void* scratch) {
  by_coding(job.weights, [&](auto kernel) { kernel.token_kernel(job, digits, begin, end, scratch); });
}
inline void tokens_fp32(const Linear& job, std::size_t begin, std::size_t end, void* scratch) {
  by_coding(job.weights, [&](auto kernel) { kernel.tokens_fp32_kernel(job, begin, end, scratch); });
}

}  // namespace
}  // namespace epic_quant
