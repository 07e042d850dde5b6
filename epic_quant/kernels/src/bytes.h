// Vectors of N bytes: the few operations that decoding codes takes. Bytes<16> is plain C++; a file that includes this
// is compiled for one instruction set, and has Bytes<32> where it says with EPIC_QUANT_AVX2 that it is AVX2, and
// Bytes<64> with EPIC_QUANT_AVX512. An operation that only one of them has (such as a permutation across all 64 bytes)
// serves decoders that are for that size alone.
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

// Sixteen bytes, the same in every 128-bit lane. `select` takes them as a type that has them as `bytes`, so that a mask
// register can be made of them.
struct Lane {
  std::int8_t at[16];
};

template <int N>
struct Bytes;

#ifndef EPIC_QUANT_AVX2

template <>
struct Bytes<16> {
  static constexpr int size = 16;
  std::uint8_t v[16];

  template <class Of>
  static EPIC_QUANT_INLINE Bytes each(Of of) {
    Bytes x;
    for (int i = 0; i < size; ++i) x.v[i] = static_cast<std::uint8_t>(of(i));
    return x;
  }
  // The same over 16-bit words, of which the first byte is the lower.
  template <class Of>
  EPIC_QUANT_INLINE Bytes each_word(Of of) const {
    std::uint16_t words[8];
    std::memcpy(words, v, sizeof words);
    for (int i = 0; i < 8; ++i) words[i] = static_cast<std::uint16_t>(of(static_cast<unsigned>(words[i])));
    return load(words);
  }

  static EPIC_QUANT_INLINE Bytes load(const void* from) {
    Bytes x;
    std::memcpy(x.v, from, sizeof x.v);
    return x;
  }
  static EPIC_QUANT_INLINE Bytes load_lanes(const std::uint8_t* from, std::size_t) { return load(from); }
  static EPIC_QUANT_INLINE Bytes repeat(const void* sixteen) { return load(sixteen); }
  static EPIC_QUANT_INLINE Bytes fill(int byte) { return each([&](int) { return byte; }); }
  EPIC_QUANT_INLINE void store(void* to) const { std::memcpy(to, v, sizeof v); }

  friend EPIC_QUANT_INLINE Bytes operator&(Bytes a, Bytes b) { return each([&](int i) { return a.v[i] & b.v[i]; }); }
  friend EPIC_QUANT_INLINE Bytes operator|(Bytes a, Bytes b) { return each([&](int i) { return a.v[i] | b.v[i]; }); }
  friend EPIC_QUANT_INLINE Bytes operator^(Bytes a, Bytes b) { return each([&](int i) { return a.v[i] ^ b.v[i]; }); }
  friend EPIC_QUANT_INLINE Bytes operator+(Bytes a, Bytes b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  friend EPIC_QUANT_INLINE Bytes operator-(Bytes a, Bytes b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  EPIC_QUANT_INLINE Bytes down(int by) const { return each_word([&](unsigned word) { return word >> by; }); }
  EPIC_QUANT_INLINE Bytes up(int by) const { return each_word([&](unsigned word) { return word << by; }); }
  EPIC_QUANT_INLINE Bytes even_times(unsigned factor) const {
    return each_word([&](unsigned word) { return (word & 0xFF) * factor; });
  }
  EPIC_QUANT_INLINE Bytes odd_times(unsigned factor) const {
    return each_word([&](unsigned word) { return (word >> 8) * factor; });
  }
  EPIC_QUANT_INLINE Bytes high_times(unsigned factor) const {
    return each_word([&](unsigned word) { return word * factor >> 16; });
  }
  EPIC_QUANT_INLINE Bytes odd() const { return each_word([](unsigned word) { return word & 0xFF00; }); }
  EPIC_QUANT_INLINE Bytes times(unsigned factor) const {
    return each_word([&](unsigned word) { return word * factor; });
  }
  static EPIC_QUANT_INLINE Bytes fill_words(unsigned word) {
    return Bytes{}.each_word([&](unsigned) { return word; });
  }
  template <int L>
  EPIC_QUANT_INLINE Bytes from_second_word(Bytes next) const {
    static_assert(L == 16, "one row at a time");
    return each([&](int i) { return i < 14 ? v[i + 2] : next.v[i - 14]; });
  }
  EPIC_QUANT_INLINE Bytes zip_low(Bytes other) const {
    return each([&](int i) { return i % 2 ? other.v[i / 2] : v[i / 2]; });
  }
  EPIC_QUANT_INLINE Bytes zip_high(Bytes other) const {
    return each([&](int i) { return i % 2 ? other.v[8 + i / 2] : v[8 + i / 2]; });
  }
  EPIC_QUANT_INLINE void store_lanes(std::uint8_t* to, std::size_t) const { store(to); }

  EPIC_QUANT_OWN_FUNCTION Bytes look_up(Bytes indices) const { return each([&](int i) { return v[indices.v[i]]; }); }
};

#else

template <>
struct Bytes<32> {
  static constexpr int size = 32;
  __m256i v;

  static EPIC_QUANT_INLINE Bytes load(const void* from) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(from))};
  }
  // Sixteen bytes for every 128-bit lane, `stride` apart.
  static EPIC_QUANT_INLINE Bytes load_lanes(const std::uint8_t* from, std::size_t stride) {
    if (stride == 16) return load(from);
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + stride));
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1)};
  }
  // The same sixteen bytes in every lane.
  static EPIC_QUANT_INLINE Bytes repeat(const void* sixteen) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(sixteen)))};
  }
  static EPIC_QUANT_INLINE Bytes fill(int byte) { return {_mm256_set1_epi8(static_cast<char>(byte))}; }
  EPIC_QUANT_INLINE void store(void* to) const { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }

  friend EPIC_QUANT_INLINE Bytes operator&(Bytes a, Bytes b) { return {_mm256_and_si256(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator^(Bytes a, Bytes b) { return {_mm256_xor_si256(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator+(Bytes a, Bytes b) { return {_mm256_add_epi8(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator-(Bytes a, Bytes b) { return {_mm256_sub_epi8(a.v, b.v)}; }
  // Every byte shifted; what comes in from its neighbour is to be masked away.
  EPIC_QUANT_INLINE Bytes down(int by) const { return {_mm256_srli_epi16(v, by)}; }
  EPIC_QUANT_INLINE Bytes up(int by) const { return {_mm256_slli_epi16(v, by)}; }

  // On 16-bit words, of which the first byte is the lower: products of it, or of the upper one, with a factor below
  // 128; the upper half of the word's own product; the word with its lower byte cleared.
  EPIC_QUANT_INLINE Bytes even_times(unsigned factor) const {
    return {_mm256_maddubs_epi16(v, _mm256_set1_epi16(static_cast<short>(factor)))};
  }
  EPIC_QUANT_INLINE Bytes odd_times(unsigned factor) const { return even_times(factor << 8); }
  EPIC_QUANT_INLINE Bytes high_times(unsigned factor) const {
    return {_mm256_mulhi_epu16(v, _mm256_set1_epi16(static_cast<short>(factor)))};
  }
  EPIC_QUANT_INLINE Bytes odd() const { return {_mm256_and_si256(v, _mm256_set1_epi16(static_cast<short>(0xFF00)))}; }
  // The lower halves of products of words with a factor.
  EPIC_QUANT_INLINE Bytes times(unsigned factor) const {
    return {_mm256_mullo_epi16(v, _mm256_set1_epi16(static_cast<short>(factor)))};
  }
  static EPIC_QUANT_INLINE Bytes fill_words(unsigned word) { return {_mm256_set1_epi16(static_cast<short>(word))}; }
  // In every L bytes, all words but the first, and after them the first of `next`.
  template <int L>
  EPIC_QUANT_INLINE Bytes from_second_word(Bytes next) const {
    static_assert(L == 16, "one row at a time");
    return {_mm256_alignr_epi8(next.v, v, 2)};
  }

  // Bytes of this and of another in turns, from the lower or upper halves of lanes.
  EPIC_QUANT_INLINE Bytes zip_low(Bytes other) const { return {_mm256_unpacklo_epi8(v, other.v)}; }
  EPIC_QUANT_INLINE Bytes zip_high(Bytes other) const { return {_mm256_unpackhi_epi8(v, other.v)}; }
  // The inverse of `load_lanes`.
  EPIC_QUANT_INLINE void store_lanes(std::uint8_t* to, std::size_t stride) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + stride), _mm256_extracti128_si256(v, 1));
  }

  // This as a table, lane by lane, of indices below 16.
  EPIC_QUANT_INLINE Bytes look_up(Bytes indices) const { return {_mm256_shuffle_epi8(v, indices.v)}; }
  // b where the mask has -1, a where it has 0.
  template <class Mask>
  static EPIC_QUANT_INLINE Bytes select(Bytes a, Bytes b) {
    return {_mm256_blendv_epi8(a.v, b.v, repeat(Mask::bytes.at).v)};
  }
};

#ifdef EPIC_QUANT_AVX512

template <>
struct Bytes<64> {
  static constexpr int size = 64;
  __m512i v;

  static EPIC_QUANT_INLINE Bytes load(const void* from) { return {_mm512_loadu_si512(from)}; }
  static EPIC_QUANT_INLINE Bytes repeat(const void* sixteen) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(sixteen)))};
  }
  static EPIC_QUANT_INLINE Bytes fill(int byte) { return {_mm512_set1_epi8(static_cast<char>(byte))}; }
  EPIC_QUANT_INLINE void store(void* to) const { _mm512_storeu_si512(to, v); }

  friend EPIC_QUANT_INLINE Bytes operator&(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator^(Bytes a, Bytes b) { return {_mm512_xor_si512(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator+(Bytes a, Bytes b) { return {_mm512_add_epi8(a.v, b.v)}; }
  friend EPIC_QUANT_INLINE Bytes operator-(Bytes a, Bytes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
  EPIC_QUANT_INLINE Bytes down(int by) const { return {_mm512_srli_epi16(v, static_cast<unsigned>(by))}; }
  EPIC_QUANT_INLINE Bytes up(int by) const { return {_mm512_slli_epi16(v, static_cast<unsigned>(by))}; }

  EPIC_QUANT_INLINE Bytes even_times(unsigned factor) const {
    return {_mm512_maddubs_epi16(v, _mm512_set1_epi16(static_cast<short>(factor)))};
  }
  EPIC_QUANT_INLINE Bytes odd_times(unsigned factor) const { return even_times(factor << 8); }
  EPIC_QUANT_INLINE Bytes high_times(unsigned factor) const {
    return {_mm512_mulhi_epu16(v, _mm512_set1_epi16(static_cast<short>(factor)))};
  }
  EPIC_QUANT_INLINE Bytes odd() const { return {_mm512_and_si512(v, _mm512_set1_epi16(static_cast<short>(0xFF00)))}; }
  EPIC_QUANT_INLINE Bytes times(unsigned factor) const {
    return {_mm512_mullo_epi16(v, _mm512_set1_epi16(static_cast<short>(factor)))};
  }
  static EPIC_QUANT_INLINE Bytes fill_words(unsigned word) { return {_mm512_set1_epi16(static_cast<short>(word))}; }
  template <int L>
  EPIC_QUANT_INLINE Bytes from_second_word(Bytes next) const {
    static_assert(L == 4, "sixteen rows at a time");
    return {_mm512_or_si512(_mm512_srli_epi32(v, 16), _mm512_slli_epi32(next.v, 16))};
  }

  EPIC_QUANT_INLINE Bytes look_up(Bytes indices) const { return {_mm512_shuffle_epi8(v, indices.v)}; }
  template <class Mask>
  static EPIC_QUANT_INLINE Bytes select(Bytes a, Bytes b) {
    constexpr __mmask64 mask = mask_of(Mask::bytes);
    return {_mm512_mask_blend_epi8(mask, a.v, b.v)};
  }

 private:
  static constexpr std::uint64_t mask_of(const Lane& lane) {
    std::uint64_t mask = 0;
    for (int i = 0; i < size; ++i) mask |= std::uint64_t{lane.at[i % 16] != 0} << i;
    return mask;
  }
};

#endif
#endif

// The size that products of one row use.
#ifdef EPIC_QUANT_AVX2
using Vector = Bytes<32>;
#else
using Vector = Bytes<16>;
#endif

// Bits of a where the mask has ones, of b elsewhere.
template <class B>
EPIC_QUANT_INLINE B merge(B mask, B a, B b) {
  return b ^ ((a ^ b) & mask);
}

// `count` bits of every byte, from bit `from` on.
template <class B>
EPIC_QUANT_INLINE B field(B bytes, int from, int count) {
  return count == 8 ? bytes : (from ? bytes.down(from) : bytes) & B::fill((1 << count) - 1);
}

}  // namespace
}  // namespace epic_quant
