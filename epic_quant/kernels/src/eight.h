// Eight floats at a time. What quantizing takes rounds once, as IEEE 754 has it, and its sums are exact, so that every
// form gives the same bits. A file that includes this is compiled for one instruction set, and says with
// EPIC_QUANT_AVX2 that it is AVX2 with FMA and F16C.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "inlining.h"

#ifdef EPIC_QUANT_AVX2
#include <immintrin.h>
#endif

namespace epic_quant {
namespace {

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

#ifdef EPIC_QUANT_AVX2

struct Eight {
  __m256 v;

  static EPIC_QUANT_INLINE Eight of(float x) { return {_mm256_set1_ps(x)}; }
  static EPIC_QUANT_INLINE Eight load(const void* from) { return {_mm256_loadu_ps(static_cast<const float*>(from))}; }
  static EPIC_QUANT_INLINE Eight load_bf16(const void* from) {
    const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
  }
  static EPIC_QUANT_INLINE Eight load_fp16(const void* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)))};
  }
  static EPIC_QUANT_INLINE Eight load_int8(const void* from) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))))};
  }
  static EPIC_QUANT_INLINE Eight gather(const float* from, const std::int32_t* indices) {
    return {_mm256_i32gather_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)), 4)};
  }
  EPIC_QUANT_INLINE void store(void* to) const { _mm256_storeu_ps(static_cast<float*>(to), v); }
  // What is NaN stays so.
  EPIC_QUANT_INLINE void store_bf16(void* to) const {
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i bits = _mm256_andnot_si256(_mm256_srli_epi32(is_nan, 16), _mm256_castps_si256(v));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i upper = _mm256_srli_epi32(up, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  EPIC_QUANT_INLINE void store_fp16(void* to) const {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Whole numbers from 0 to 255, as bytes.
  EPIC_QUANT_INLINE void store_bytes(std::uint8_t* to) const {
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }

  friend EPIC_QUANT_INLINE Eight operator+(Eight a, Eight b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Eight operator-(Eight a, Eight b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Eight operator*(Eight a, Eight b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Eight operator/(Eight a, Eight b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Eight smaller(Eight a, Eight b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Eight larger(Eight a, Eight b) { return {_mm256_max_ps(a.v, b.v)}; }
  // a * b + c, rounded once.
  friend EPIC_QUANT_INLINE Eight multiply_add(Eight a, Eight b, Eight c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  EPIC_QUANT_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // The sum of each of eight, neighbours first, then pairs, then fours.
  friend EPIC_QUANT_INLINE Eight pairwise_sums(const Eight (&x)[8]) {
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20), _mm256_permute2f128_ps(first, last, 0x31))};
  }
  EPIC_QUANT_INLINE Eight magnitude() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  // To the nearest whole number, ties to even.
  EPIC_QUANT_INLINE Eight rounded() const {
    return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // 1 where a is above b, else 0.
  friend EPIC_QUANT_INLINE Eight above(Eight a, Eight b) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), _mm256_set1_ps(1.0f))};
  }

  // Sums and differences of the numbers 1, 2 and 4 places apart.
  EPIC_QUANT_INLINE Eight butterfly1() const { return paired(_mm256_permute_ps(v, 0xB1), 0xAA); }
  EPIC_QUANT_INLINE Eight butterfly2() const { return paired(_mm256_permute_ps(v, 0x4E), 0xCC); }
  EPIC_QUANT_INLINE Eight butterfly4() const { return paired(_mm256_permute2f128_ps(v, v, 1), 0xF0); }

 private:
  EPIC_QUANT_INLINE Eight paired(__m256 other, int negated) const {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i is_second = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(negated), bit), bit);
    return {_mm256_add_ps(other, _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(is_second, 31))))};
  }
};

// The largest magnitude's bits: those of NaN are above those of infinity.
struct MaxAbsBits {
  __m256i v = _mm256_setzero_si256();
  EPIC_QUANT_INLINE void add(Eight x) { v = _mm256_max_epu32(v, _mm256_castps_si256(x.magnitude().v)); }
  EPIC_QUANT_INLINE std::uint32_t total() const {
    alignas(32) std::uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    std::uint32_t top = 0;
    for (std::uint32_t lane : lanes) top = lane > top ? lane : top;
    return top;
  }
};

// Sums in double precision.
EPIC_QUANT_INLINE double total_of(__m256d v) {
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, v);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

struct SquareSum {
  __m256d sums = _mm256_setzero_pd();
  EPIC_QUANT_INLINE void add(Eight x) {
    const __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
    const __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
    sums = _mm256_fmadd_pd(first, first, _mm256_fmadd_pd(second, second, sums));
  }
  EPIC_QUANT_INLINE double total() const { return total_of(sums); }
};

struct ProductSums {
  __m256d products = _mm256_setzero_pd(), norms = _mm256_setzero_pd();
  EPIC_QUANT_INLINE void add(Eight w, Eight q) {
    add(_mm256_castps256_ps128(w.v), _mm256_castps256_ps128(q.v));
    add(_mm256_extractf128_ps(w.v, 1), _mm256_extractf128_ps(q.v, 1));
  }
  EPIC_QUANT_INLINE double product() const { return total_of(products); }
  EPIC_QUANT_INLINE double norm() const { return total_of(norms); }

 private:
  EPIC_QUANT_INLINE void add(__m128 w, __m128 q) {
    const __m256d wide = _mm256_cvtps_pd(q);
    products = _mm256_fmadd_pd(_mm256_cvtps_pd(w), wide, products);
    norms = _mm256_fmadd_pd(wide, wide, norms);
  }
};

// Thresholds among up to 15 ascending thresholds, and an entry for each place.
template <int Bits>
struct Thresholds {
  __m256i thresholds[Bits];
  __m256 low, high;

  Thresholds(const float* ascending, const float* entries) {
    for (int step = 0; step < Bits; ++step) {
      alignas(32) float row[8] = {};
      for (int index = 0; index < 1 << step; ++index)
        row[index] = ascending[((2 * index + 1) << (Bits - 1 - step)) - 1];
      thresholds[step] = _mm256_castps_si256(_mm256_load_ps(row));
    }
    alignas(32) float row[16] = {};
    for (int place = 0; place < 1 << Bits; ++place) row[place] = entries[place];
    low = _mm256_load_ps(row);
    high = _mm256_load_ps(row + 8);
  }
  // A bit at each step, the highest first.
  EPIC_QUANT_INLINE __m256i indices(Eight x) const {
    __m256i place = _mm256_setzero_si256();
    for (int step = 0; step < Bits; ++step) {
      const __m256 threshold = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(thresholds[step], place));
      const __m256i reached = _mm256_castps_si256(_mm256_cmp_ps(x.v, threshold, _CMP_GE_OQ));
      place = _mm256_sub_epi32(_mm256_add_epi32(place, place), reached);
    }
    return place;
  }
  EPIC_QUANT_INLINE Eight index(Eight x) const { return {_mm256_cvtepi32_ps(indices(x))}; }
  EPIC_QUANT_INLINE Eight entry(Eight x) const {
    const __m256i place = indices(x);
    const __m256 from_low = _mm256_permutevar8x32_ps(low, place);
    if (Bits < 4) return {from_low};
    const __m256 from_high = _mm256_permutevar8x32_ps(high, place);
    return {_mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(place, 28)))};
  }
};

// (code + low) * scale of every code; up to seven more may be written.
EPIC_QUANT_INLINE void scale_codes(const std::uint8_t* codes, std::size_t size, float low, float scale, float* to) {
  for (std::size_t i = 0; i < size; i += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    const Eight x = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight))};
    ((x + Eight::of(low)) * Eight::of(scale)).store(to + i);
  }
}

EPIC_QUANT_INLINE std::uint16_t to_fp16(float x) {
  return static_cast<std::uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}
EPIC_QUANT_INLINE float from_fp16(std::uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

#else

inline void scale_codes(const std::uint8_t* codes, std::size_t size, float low, float scale, float* to) {
  for (std::size_t i = 0; i < size; ++i) to[i] = (static_cast<float>(codes[i]) + low) * scale;
}

// Ties to even. Subnormals are rounded by adding a number whose last place is 2^-24.
EPIC_QUANT_INLINE std::uint16_t to_fp16(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);
  if (rest < 0x38800000) return static_cast<std::uint16_t>(sign | (bits_of(of_bits(rest) + 0.5f) - bits_of(0.5f)));
  return static_cast<std::uint16_t>(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
}
EPIC_QUANT_INLINE float from_fp16(std::uint16_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16, rest = x & 0x7FFF;
  if (rest < 0x0400) return of_bits(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f));
  return of_bits(sign | ((rest << 13) + (rest < 0x7C00 ? 0x38000000 : 0x70000000)));
}

struct Eight {
  float v[8];

  template <class Of>
  static EPIC_QUANT_INLINE Eight each(Of of) {
    Eight x;
    for (int i = 0; i < 8; ++i) x.v[i] = of(i);
    return x;
  }
  static EPIC_QUANT_INLINE Eight of(float x) { return each([&](int) { return x; }); }
  static EPIC_QUANT_INLINE Eight load(const void* from) {
    Eight x;
    std::memcpy(x.v, from, sizeof x.v);
    return x;
  }
  static EPIC_QUANT_INLINE Eight load_bf16(const void* from) {
    std::uint16_t halves[8];
    std::memcpy(halves, from, sizeof halves);
    return each([&](int i) { return of_bits(static_cast<std::uint32_t>(halves[i]) << 16); });
  }
  static EPIC_QUANT_INLINE Eight load_fp16(const void* from) {
    std::uint16_t halves[8];
    std::memcpy(halves, from, sizeof halves);
    return each([&](int i) { return from_fp16(halves[i]); });
  }
  static EPIC_QUANT_INLINE Eight load_int8(const void* from) {
    std::int8_t whole[8];
    std::memcpy(whole, from, sizeof whole);
    return each([&](int i) { return static_cast<float>(whole[i]); });
  }
  static EPIC_QUANT_INLINE Eight gather(const float* from, const std::int32_t* indices) {
    return each([&](int i) { return from[indices[i]]; });
  }
  EPIC_QUANT_INLINE void store(void* to) const { std::memcpy(to, v, sizeof v); }
  // What is NaN stays so.
  EPIC_QUANT_INLINE void store_bf16(void* to) const {
    std::uint16_t halves[8];
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = bits_of(v[i]) & (v[i] == v[i] ? 0xFFFFFFFF : 0xFFFF0000);
      halves[i] = static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
    std::memcpy(to, halves, sizeof halves);
  }
  EPIC_QUANT_INLINE void store_fp16(void* to) const {
    std::uint16_t halves[8];
    for (int i = 0; i < 8; ++i) halves[i] = to_fp16(v[i]);
    std::memcpy(to, halves, sizeof halves);
  }
  // Whole numbers from 0 to 255, as bytes.
  EPIC_QUANT_INLINE void store_bytes(std::uint8_t* to) const {
    for (int i = 0; i < 8; ++i) to[i] = static_cast<std::uint8_t>(static_cast<int>(v[i]));
  }

  friend EPIC_QUANT_INLINE Eight operator+(Eight a, Eight b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  friend EPIC_QUANT_INLINE Eight operator-(Eight a, Eight b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  friend EPIC_QUANT_INLINE Eight operator*(Eight a, Eight b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  friend EPIC_QUANT_INLINE Eight operator/(Eight a, Eight b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  friend EPIC_QUANT_INLINE Eight smaller(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend EPIC_QUANT_INLINE Eight larger(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  EPIC_QUANT_INLINE float sum() const {
    float total = 0;
    for (float x : v) total += x;
    return total;
  }
  // The sum of each of eight, neighbours first, then pairs, then fours.
  friend EPIC_QUANT_INLINE Eight pairwise_sums(const Eight (&x)[8]) {
    return each([&](int i) {
      const float* const v = x[i].v;
      return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    });
  }
  EPIC_QUANT_INLINE Eight magnitude() const { return each([&](int i) { return of_bits(bits_of(v[i]) & 0x7FFFFFFF); }); }
  // To the nearest whole number, ties to even: beside 2^23 there is no room for a fraction.
  EPIC_QUANT_INLINE Eight rounded() const {
    return each([&](int i) {
      const std::uint32_t bits = bits_of(v[i]), sign = bits & 0x80000000;
      const float magnitude = of_bits(bits & 0x7FFFFFFF), room = magnitude < 8388608.0f ? 8388608.0f : 0.0f;
      return of_bits(sign | bits_of((magnitude + room) - room));
    });
  }
  // 1 where a is above b, else 0.
  friend EPIC_QUANT_INLINE Eight above(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? 1.0f : 0.0f; });
  }

  // Sums and differences of the numbers 1, 2 and 4 places apart.
  EPIC_QUANT_INLINE Eight butterfly1() const { return butterfly(1); }
  EPIC_QUANT_INLINE Eight butterfly2() const { return butterfly(2); }
  EPIC_QUANT_INLINE Eight butterfly4() const { return butterfly(4); }

 private:
  EPIC_QUANT_INLINE Eight butterfly(int apart) const {
    return each([&](int i) { return i & apart ? v[i ^ apart] - v[i] : v[i] + v[i ^ apart]; });
  }
};

// The largest magnitude's bits: those of NaN are above those of infinity.
struct MaxAbsBits {
  std::uint32_t v[8] = {};
  EPIC_QUANT_INLINE void add(Eight x) {
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = bits_of(x.v[i]) & 0x7FFFFFFF;
      v[i] = bits > v[i] ? bits : v[i];
    }
  }
  EPIC_QUANT_INLINE std::uint32_t total() const {
    std::uint32_t top = 0;
    for (std::uint32_t lane : v) top = lane > top ? lane : top;
    return top;
  }
};

// Sums in double precision.
EPIC_QUANT_INLINE double total_of(const double* v) {
  double total = 0;
  for (int i = 0; i < 8; ++i) total += v[i];
  return total;
}

struct SquareSum {
  double sums[8] = {};
  EPIC_QUANT_INLINE void add(Eight x) {
    for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x.v[i]) * static_cast<double>(x.v[i]);
  }
  EPIC_QUANT_INLINE double total() const { return total_of(sums); }
};

struct ProductSums {
  double products[8] = {}, norms[8] = {};
  EPIC_QUANT_INLINE void add(Eight w, Eight q) {
    for (int i = 0; i < 8; ++i) {
      const double wide = static_cast<double>(q.v[i]);
      products[i] += static_cast<double>(w.v[i]) * wide;
      norms[i] += wide * wide;
    }
  }
  EPIC_QUANT_INLINE double product() const { return total_of(products); }
  EPIC_QUANT_INLINE double norm() const { return total_of(norms); }
};

// Thresholds among up to 15 ascending thresholds, and an entry for each place.
template <int Bits>
struct Thresholds {
  float thresholds[1 << Bits], entries[1 << Bits];

  Thresholds(const float* ascending, const float* of_places) {
    std::memcpy(thresholds, ascending, sizeof thresholds - sizeof(float));
    std::memcpy(entries, of_places, sizeof entries);
  }
  EPIC_QUANT_INLINE Eight index(Eight x) const {
    Eight place = Eight::of(0);
    for (int k = 0; k < (1 << Bits) - 1; ++k)
      for (int i = 0; i < 8; ++i) place.v[i] += x.v[i] >= thresholds[k] ? 1.0f : 0.0f;
    return place;
  }
  // Summed up from whole numbers, since a look-up does not vectorize.
  EPIC_QUANT_INLINE Eight entry(Eight x) const {
    Eight entry = Eight::of(entries[0]);
    for (int k = 0; k < (1 << Bits) - 1; ++k)
      for (int i = 0; i < 8; ++i) entry.v[i] += x.v[i] >= thresholds[k] ? entries[k + 1] - entries[k] : 0.0f;
    return entry;
  }
};

#endif

// The first `count` of eight floats, and zeros.
EPIC_QUANT_INLINE Eight load_first(const float* from, std::size_t count) {
  if (count >= 8) return Eight::load(from);
  float first[8] = {};
  std::memcpy(first, from, count * sizeof(float));
  return Eight::load(first);
}

EPIC_QUANT_INLINE float max_of(Eight x) {
  float lanes[8];
  x.store(lanes);
  float most = lanes[0];
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}


}  // namespace
}  // namespace epic_quant
