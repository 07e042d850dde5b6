// Eight numbers at a time: the few operations that quantizing takes. Each rounds once, as IEEE 754 has it, and the sums
// are exact, so that every form gives the same bits. A file that includes this is compiled for one instruction set,
// and says with EPIC_QUANT_AVX2 that it is AVX2 with F16C.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef EPIC_QUANT_AVX2
#include <immintrin.h>
#endif

namespace epic_quant {
namespace {

#ifdef EPIC_QUANT_AVX2

struct Eight {
  __m256 v;

  static Eight of(float x) { return {_mm256_set1_ps(x)}; }
  static Eight load(const void* from) { return {_mm256_loadu_ps(static_cast<const float*>(from))}; }
  static Eight load_bf16(const void* from) {
    const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
  }
  static Eight load_fp16(const void* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)))};
  }
  void store(void* to) const { _mm256_storeu_ps(static_cast<float*>(to), v); }
  // For finite numbers.
  void store_bf16(void* to) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i upper = _mm256_srli_epi32(up, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  void store_fp16(void* to) const {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Whole numbers from 0 to 255, as bytes.
  void store_bytes(std::uint8_t* to) const {
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }

  friend Eight operator+(Eight a, Eight b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Eight operator-(Eight a, Eight b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Eight operator*(Eight a, Eight b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Eight operator/(Eight a, Eight b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Eight smaller(Eight a, Eight b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Eight larger(Eight a, Eight b) { return {_mm256_max_ps(a.v, b.v)}; }
  Eight magnitude() const { return {_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)))}; }
  // To the nearest whole number, ties to even.
  Eight rounded() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // 1 where a is above b, else 0.
  friend Eight above(Eight a, Eight b) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), _mm256_set1_ps(1.0f))};
  }

  // Sums and differences of the numbers 1, 2 and 4 places apart.
  Eight butterfly1() const { return paired(_mm256_permute_ps(v, 0xB1), 0xAA); }
  Eight butterfly2() const { return paired(_mm256_permute_ps(v, 0x4E), 0xCC); }
  Eight butterfly4() const { return paired(_mm256_permute2f128_ps(v, v, 1), 0xF0); }

 private:
  Eight paired(__m256 other, int negated) const {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i is_second = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(negated), bit), bit);
    return {_mm256_add_ps(other, _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(is_second, 31))))};
  }
};

// The largest of magnitudes, as their bits: those of NaN are above those of infinity.
struct TopBits {
  __m256i v = _mm256_setzero_si256();
  void add(Eight x) { v = _mm256_max_epu32(v, _mm256_castps_si256(x.magnitude().v)); }
  std::uint32_t total() const {
    alignas(32) std::uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    std::uint32_t top = 0;
    for (std::uint32_t lane : lanes) top = lane > top ? lane : top;
    return top;
  }
};

// Sums in double precision.
inline double total_of(__m256d v) {
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, v);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

struct SquareSum {
  __m256d sums = _mm256_setzero_pd();
  void add(Eight x) {
    const __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
    const __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
    sums = _mm256_fmadd_pd(first, first, _mm256_fmadd_pd(second, second, sums));
  }
  double total() const { return total_of(sums); }
};

struct ProductSums {
  __m256d products = _mm256_setzero_pd(), norms = _mm256_setzero_pd();
  void add(Eight w, Eight q) {
    add(_mm256_castps256_ps128(w.v), _mm256_castps256_ps128(q.v));
    add(_mm256_extractf128_ps(w.v, 1), _mm256_extractf128_ps(q.v, 1));
  }
  double product() const { return total_of(products); }
  double norm() const { return total_of(norms); }

 private:
  void add(__m128 w, __m128 q) {
    const __m256d wide = _mm256_cvtps_pd(q);
    products = _mm256_fmadd_pd(_mm256_cvtps_pd(w), wide, products);
    norms = _mm256_fmadd_pd(wide, wide, norms);
  }
};

// Places among up to 15 ascending thresholds, and an entry for each place.
template <int Bits>
struct Places {
  __m256i thresholds[Bits];
  __m256 low, high;

  Places(const float* ascending, const float* entries) {
    for (int step = 0; step < Bits; ++step) {
      alignas(32) float row[8] = {};
      for (int place = 0; place < 1 << step; ++place) row[place] = ascending[((2 * place + 1) << (Bits - 1 - step)) - 1];
      thresholds[step] = _mm256_castps_si256(_mm256_load_ps(row));
    }
    alignas(32) float row[16] = {};
    for (int place = 0; place < 1 << Bits; ++place) row[place] = entries[place];
    low = _mm256_load_ps(row);
    high = _mm256_load_ps(row + 8);
  }
  // How many thresholds x reaches: a bit of it at each step, the highest first.
  __m256i places(Eight x) const {
    __m256i place = _mm256_setzero_si256();
    for (int step = 0; step < Bits; ++step) {
      const __m256 threshold = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(thresholds[step], place));
      const __m256i reached = _mm256_castps_si256(_mm256_cmp_ps(x.v, threshold, _CMP_GE_OQ));
      place = _mm256_sub_epi32(_mm256_add_epi32(place, place), reached);
    }
    return place;
  }
  Eight place(Eight x) const { return {_mm256_cvtepi32_ps(places(x))}; }
  Eight entry(Eight x) const {
    const __m256i place = places(x);
    const __m256 from_low = _mm256_permutevar8x32_ps(low, place);
    if (Bits < 4) return {from_low};
    const __m256 from_high = _mm256_permutevar8x32_ps(high, place);
    return {_mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(place, 28)))};
  }
};

inline std::uint16_t to_fp16(float x) {
  return static_cast<std::uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}
inline float from_fp16(std::uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

#else

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

// Ties to even. Subnormals are rounded by adding a number whose last place is 2^-24.
inline std::uint16_t to_fp16(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);
  if (rest < 0x38800000) return static_cast<std::uint16_t>(sign | (bits_of(of_bits(rest) + 0.5f) - bits_of(0.5f)));
  return static_cast<std::uint16_t>(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
}
inline float from_fp16(std::uint16_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16, rest = x & 0x7FFF;
  if (rest < 0x0400) return of_bits(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f));
  return of_bits(sign | ((rest << 13) + (rest < 0x7C00 ? 0x38000000 : 0x70000000)));
}

struct Eight {
  float v[8];

  template <class Of>
  static Eight each(Of of) {
    Eight x;
    for (int i = 0; i < 8; ++i) x.v[i] = of(i);
    return x;
  }
  static Eight of(float x) {
    return each([&](int) { return x; });
  }
  static Eight load(const void* from) {
    Eight x;
    std::memcpy(x.v, from, sizeof x.v);
    return x;
  }
  static Eight load_bf16(const void* from) {
    std::uint16_t halves[8];
    std::memcpy(halves, from, sizeof halves);
    return each([&](int i) { return of_bits(static_cast<std::uint32_t>(halves[i]) << 16); });
  }
  static Eight load_fp16(const void* from) {
    std::uint16_t halves[8];
    std::memcpy(halves, from, sizeof halves);
    return each([&](int i) { return from_fp16(halves[i]); });
  }
  void store(void* to) const { std::memcpy(to, v, sizeof v); }
  // For finite numbers.
  void store_bf16(void* to) const {
    std::uint16_t halves[8];
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = bits_of(v[i]);
      halves[i] = static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
    std::memcpy(to, halves, sizeof halves);
  }
  void store_fp16(void* to) const {
    std::uint16_t halves[8];
    for (int i = 0; i < 8; ++i) halves[i] = to_fp16(v[i]);
    std::memcpy(to, halves, sizeof halves);
  }
  // Whole numbers from 0 to 255, as bytes.
  void store_bytes(std::uint8_t* to) const {
    for (int i = 0; i < 8; ++i) to[i] = static_cast<std::uint8_t>(static_cast<int>(v[i]));
  }

  friend Eight operator+(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Eight operator-(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Eight operator*(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Eight operator/(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend Eight smaller(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Eight larger(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  Eight magnitude() const {
    return each([&](int i) { return of_bits(bits_of(v[i]) & 0x7FFFFFFF); });
  }
  // To the nearest whole number, ties to even: beside 2^23 there is no room for a fraction.
  Eight rounded() const {
    return each([&](int i) {
      const std::uint32_t bits = bits_of(v[i]), sign = bits & 0x80000000;
      const float magnitude = of_bits(bits & 0x7FFFFFFF), room = magnitude < 8388608.0f ? 8388608.0f : 0.0f;
      return of_bits(sign | bits_of((magnitude + room) - room));
    });
  }
  // 1 where a is above b, else 0.
  friend Eight above(Eight a, Eight b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? 1.0f : 0.0f; });
  }

  // Sums and differences of the numbers 1, 2 and 4 places apart.
  Eight butterfly1() const { return butterfly(1); }
  Eight butterfly2() const { return butterfly(2); }
  Eight butterfly4() const { return butterfly(4); }

 private:
  Eight butterfly(int apart) const {
    return each([&](int i) { return i & apart ? v[i ^ apart] - v[i] : v[i] + v[i ^ apart]; });
  }
};

// The largest of magnitudes, as their bits: those of NaN are above those of infinity.
struct TopBits {
  std::uint32_t v[8] = {};
  void add(Eight x) {
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = bits_of(x.v[i]) & 0x7FFFFFFF;
      v[i] = bits > v[i] ? bits : v[i];
    }
  }
  std::uint32_t total() const {
    std::uint32_t top = 0;
    for (std::uint32_t lane : v) top = lane > top ? lane : top;
    return top;
  }
};

// Sums in double precision.
inline double total_of(const double* v) {
  double total = 0;
  for (int i = 0; i < 8; ++i) total += v[i];
  return total;
}

struct SquareSum {
  double sums[8] = {};
  void add(Eight x) {
    for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x.v[i]) * static_cast<double>(x.v[i]);
  }
  double total() const { return total_of(sums); }
};

struct ProductSums {
  double products[8] = {}, norms[8] = {};
  void add(Eight w, Eight q) {
    for (int i = 0; i < 8; ++i) {
      const double wide = static_cast<double>(q.v[i]);
      products[i] += static_cast<double>(w.v[i]) * wide;
      norms[i] += wide * wide;
    }
  }
  double product() const { return total_of(products); }
  double norm() const { return total_of(norms); }
};

// Places among up to 15 ascending thresholds, and an entry for each place.
template <int Bits>
struct Places {
  float thresholds[1 << Bits], entries[1 << Bits];

  Places(const float* ascending, const float* of_places) {
    std::memcpy(thresholds, ascending, sizeof thresholds - sizeof(float));
    std::memcpy(entries, of_places, sizeof entries);
  }
  // How many thresholds x reaches.
  Eight place(Eight x) const {
    Eight place = Eight::of(0);
    for (int k = 0; k < (1 << Bits) - 1; ++k)
      for (int i = 0; i < 8; ++i) place.v[i] += x.v[i] >= thresholds[k] ? 1.0f : 0.0f;
    return place;
  }
  // Summed up from whole numbers, since a look-up does not vectorize.
  Eight entry(Eight x) const {
    Eight entry = Eight::of(entries[0]);
    for (int k = 0; k < (1 << Bits) - 1; ++k)
      for (int i = 0; i < 8; ++i) entry.v[i] += x.v[i] >= thresholds[k] ? entries[k + 1] - entries[k] : 0.0f;
    return entry;
  }
};

#endif

}  // namespace
}  // namespace epic_quant
