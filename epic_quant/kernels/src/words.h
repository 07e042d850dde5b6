// Vectors of 16-bit words: the few operations that a search for paths takes. Eight words in plain C++; sixteen where a
// file that includes this says with EPIC_QUANT_AVX2 that it is AVX2.
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

#ifdef EPIC_QUANT_AVX2

struct Words {
  static constexpr std::size_t size = 16;
  __m256i v;

  static EPIC_QUANT_INLINE Words fill(unsigned word) { return {_mm256_set1_epi16(static_cast<short>(word))}; }
  static EPIC_QUANT_INLINE Words load(const void* from) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(from))};
  }
  // The first words from there on, 2^Bits times each.
  template <int Bits>
  static EPIC_QUANT_INLINE Words load_repeated(const std::uint16_t* from) {
    // No more of them than are needed: what was just stored is not yet to be had across two stores.
    if constexpr (Bits == 4) return fill(*from);
    if constexpr (Bits == 3) {
      std::int32_t two;
      std::memcpy(&two, from, sizeof two);
      return {_mm256_shuffle_epi8(_mm256_set1_epi32(two), places<Bits>())};
    }
    if constexpr (Bits == 2) {
      std::int64_t four;
      std::memcpy(&four, from, sizeof four);
      return {_mm256_shuffle_epi8(_mm256_set1_epi64x(four), places<Bits>())};
    }
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), places<Bits>())};
  }
  EPIC_QUANT_INLINE void store(void* to) const { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }

  friend EPIC_QUANT_INLINE Words operator|(Words a, Words b) { return {_mm256_or_si256(a.v, b.v)}; }
  EPIC_QUANT_INLINE Words up8() const { return {_mm256_slli_epi16(v, 8)}; }
  // Signed a - b, or twice that, which saturate, and the upper half of the square.
  template <bool Twice>
  EPIC_QUANT_INLINE Words squared_difference(Words b) const {
    __m256i difference = _mm256_subs_epi16(v, b.v);
    if (Twice) difference = _mm256_adds_epi16(difference, difference);
    return {_mm256_mulhi_epi16(difference, difference)};
  }
  // Unsigned.
  friend EPIC_QUANT_INLINE Words plus(Words a, Words b) { return {_mm256_adds_epu16(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Words minus(Words a, Words b) { return {_mm256_subs_epu16(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Words smaller(Words a, Words b) { return {_mm256_min_epu16(a.v, b.v)}; }
  // All ones where they are equal.
  friend EPIC_QUANT_INLINE Words equal(Words a, Words b) { return {_mm256_cmpeq_epi16(a.v, b.v)}; }
  // a where the mask has ones, b where it has zeros.
  friend EPIC_QUANT_INLINE Words select(Words mask, Words a, Words b) {
    return {_mm256_blendv_epi8(b.v, a.v, mask.v)};
  }

 private:
  // The bytes of word i >> Bits for word i.
  template <int Bits>
  static EPIC_QUANT_INLINE __m256i places() {
    alignas(32) static constexpr auto bytes = [] {
      struct { std::int8_t at[32]; } all{};
      for (int i = 0; i < 32; ++i) all.at[i] = static_cast<std::int8_t>(2 * (i / 2 >> Bits) + i % 2);
      return all;
    }();
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes.at));
  }
};

#else

struct Words {
  static constexpr std::size_t size = 8;
  std::uint16_t v[8];

  template <class Of>
  static EPIC_QUANT_INLINE Words each(Of of) {
    Words x;
    for (int i = 0; i < 8; ++i) x.v[i] = static_cast<std::uint16_t>(of(i));
    return x;
  }
  static EPIC_QUANT_INLINE Words fill(unsigned word) { return each([&](int) { return word; }); }
  static EPIC_QUANT_INLINE Words load(const void* from) {
    Words x;
    std::memcpy(x.v, from, sizeof x.v);
    return x;
  }
  // The first words from there on, 2^Bits times each.
  template <int Bits>
  static EPIC_QUANT_INLINE Words load_repeated(const std::uint16_t* from) {
    return each([&](int i) { return from[i >> Bits]; });
  }
  EPIC_QUANT_INLINE void store(void* to) const { std::memcpy(to, v, sizeof v); }

  friend EPIC_QUANT_INLINE Words operator|(Words a, Words b) { return each([&](int i) { return a.v[i] | b.v[i]; }); }
  EPIC_QUANT_INLINE Words up8() const { return each([&](int i) { return v[i] << 8; }); }
  // Signed a - b, or twice that, which saturate, and the upper half of the square.
  template <bool Twice>
  EPIC_QUANT_INLINE Words squared_difference(Words b) const {
    return each([&](int i) {
      int difference = static_cast<std::int16_t>(v[i]) - static_cast<std::int16_t>(b.v[i]);
      difference *= Twice ? 2 : 1;
      difference = difference > 32767 ? 32767 : difference < -32768 ? -32768 : difference;
      return difference * difference >> 16;
    });
  }
  // Unsigned.
  friend EPIC_QUANT_INLINE Words plus(Words a, Words b) {
    return each([&](int i) { return a.v[i] + b.v[i] < 0xFFFF ? a.v[i] + b.v[i] : 0xFFFF; });
  }
  friend EPIC_QUANT_INLINE Words minus(Words a, Words b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] - b.v[i] : 0; });
  }
  friend EPIC_QUANT_INLINE Words smaller(Words a, Words b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  // All ones where they are equal.
  friend EPIC_QUANT_INLINE Words equal(Words a, Words b) {
    return each([&](int i) { return a.v[i] == b.v[i] ? 0xFFFF : 0; });
  }
  // a where the mask has ones, b where it has zeros.
  friend EPIC_QUANT_INLINE Words select(Words mask, Words a, Words b) {
    return each([&](int i) { return (a.v[i] & mask.v[i]) | (b.v[i] & ~mask.v[i]); });
  }
};

#endif

EPIC_QUANT_INLINE unsigned least_of(Words x) {
  std::uint16_t words[Words::size];
  x.store(words);
  unsigned least = words[0];
  for (std::size_t i = 1; i < Words::size; ++i) least = words[i] < least ? words[i] : least;
  return least;
}

}  // namespace
}  // namespace epic_quant
