// Codings: how codes become a row's bytes, how a row's bytes become its codes in order, and how a unit's bytes become
// vectors of codes for products, which is written once for every size of vectors. Little-endian machines only.
//
// A unit of a row has two halves, each of consecutive bytes of the row, and decodes to V vectors of 32 codes: byte
// 16 * half + j of vector v is code half * 16 V + j * V + v of the unit, the order in which shifts and masks find them.
// Activations are laid out in the same order, so that nothing is ever put back. Units that hold scales have vectors of
// consecutive codes, and each of their bytes has those that are a multiple of 32 apart.
#pragma once

#include <utility>

#include "bytes.h"
#include "eight.h"
#include "format.h"

namespace epic_quant {
namespace {

constexpr std::size_t kVector = 32;

// Every specialization has
//   pack(codes, cols, to)       bytes of a row; reads up to seven codes beyond `cols`, which must be zeros
//   unpack(from, cols, codes)   the inverse; writes up to seven codes beyond `cols`
//   decode<L>(in, codes)        for products: V vectors of codes from vectors of bytes, of which L in a row belong
//                               together (and where a code may cross bytes, those at the same place of all `in`)
// or, where units hold scales, only decode, whose vectors of bytes begin at `input_at`, and
//   scales(unit, scales, minima)  those of its groups in fp32; minima only where the coding has them
// and a trellis only decode, with the first vector of what follows as one more, which gives values and not codes.
template <Coding K>
struct Codes;

// Codes of `Bits` bits. Eight of them move together as the bytes of a word: neighbours first, then pairs, then fours.
template <int Bits>
struct BitCodes {
  static void pack(const std::uint8_t* codes, std::size_t cols, std::uint8_t* to) {
    std::uint64_t x;
    std::size_t left = (cols * Bits + 7) / 8;
    for (; left >= 8; codes += 8, to += Bits, left -= Bits) {
      std::memcpy(&x, codes, 8);
      x = join(x);
      std::memcpy(to, &x, 8);  // the bytes beyond are written again by the next
    }
    for (; left; codes += 8) {
      std::memcpy(&x, codes, 8);
      x = join(x);
      for (int byte = 0; byte < Bits && left; ++byte, --left, x >>= 8) *to++ = static_cast<std::uint8_t>(x);
    }
  }
  static void unpack(const std::uint8_t* from, std::size_t cols, std::uint8_t* codes) {
    std::uint64_t x;
    std::size_t left = (cols * Bits + 7) / 8;
    for (; left >= 8; codes += 8, from += Bits, left -= Bits) {
      std::memcpy(&x, from, 8);
      x = split(x);
      std::memcpy(codes, &x, 8);
    }
    for (; left; codes += 8) {
      x = 0;
      for (int byte = 0; byte < Bits && left; ++byte, --left) x |= std::uint64_t{*from++} << 8 * byte;
      x = split(x);
      std::memcpy(codes, &x, 8);
    }
  }

 private:
  static constexpr std::uint64_t kOne = (std::uint64_t{1} << Bits) - 1, kTwo = (std::uint64_t{1} << 2 * Bits) - 1;
  static constexpr std::uint64_t kFour = (std::uint64_t{1} << 4 * Bits) - 1;
  static constexpr std::uint64_t kOnes = kOne * 0x0001000100010001u, kTwos = kTwo * 0x0000000100000001u;

  static std::uint64_t join(std::uint64_t x) {
    x = (x & kOnes) | (x >> 8 & kOnes) << Bits;
    x = (x & kTwos) | (x >> 16 & kTwos) << 2 * Bits;
    return (x & kFour) | (x >> 32 & kFour) << 4 * Bits;
  }
  static std::uint64_t split(std::uint64_t x) {
    x = (x & kFour) | (x >> 4 * Bits & kFour) << 32;
    x = (x & kTwos) | (x >> 2 * Bits & kTwos) << 16;
    return (x & kOnes) | (x >> Bits & kOnes) << 8;
  }
};

// Whole codes in a byte.
template <int Bits>
struct ByteCodes : BitCodes<Bits> {
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[1], B (&codes)[8 / Bits]) {
    EPIC_QUANT_UNROLL for (int v = 0; v < 8 / Bits; ++v) codes[v] = field(in[0], v * Bits, Bits);
  }
};

template <>
struct Codes<Coding::bits1> : BitCodes<1> {};
template <>
struct Codes<Coding::bits2> : ByteCodes<2> {};
template <>
struct Codes<Coding::bits4> : ByteCodes<4> {};
template <>
struct Codes<Coding::bits5> : BitCodes<5> {};
template <>
struct Codes<Coding::bits6> : BitCodes<6> {};
template <>
struct Codes<Coding::bits7> : BitCodes<7> {};

template <>
struct Codes<Coding::bits8> : ByteCodes<8> {
  static void pack(const std::uint8_t* codes, std::size_t cols, std::uint8_t* to) { std::memcpy(to, codes, cols); }
  static void unpack(const std::uint8_t* from, std::size_t cols, std::uint8_t* codes) {
    std::memcpy(codes, from, cols);
  }
};

// Among L bytes, those whose index is R modulo 3; and where bytes R, R + 3, R + 6 … of 3 L bytes are modulo L.
template <int L, int R>
struct Third {
  static constexpr Lane is_third() {
    Lane lane{};
    for (int i = 0; i < 16; ++i) lane.at[i] = i % L % 3 == R ? -1 : 0;
    return lane;
  }
  static constexpr Lane in_order() {
    Lane lane{};
    for (int i = 0; i < 16; ++i) lane.at[i] = static_cast<std::int8_t>(i / L * L + (3 * (i % L) + R) % L);
    return lane;
  }
  static constexpr Lane bytes = is_third(), order = in_order();
};

// Bytes R, R + 3, R + 6 … of the 3 L that three vectors have, L each. Byte i of vector k is byte k L + i, which is k +
// i modulo 3 where L is 1 modulo 3: two blends bring the bytes wanted together, and a shuffle in order.
template <int L, int R, class B>
EPIC_QUANT_INLINE B thirds(const B (&in)[3]) {
  static_assert(L % 3 == 1, "the thirds go by it");
  const B first_two = B::template select<Third<L, 1>>(in[R], in[(R + 2) % 3]);
  return B::template select<Third<L, 2>>(first_two, in[(R + 1) % 3]).look_up(B::repeat(Third<L, R>::order.at));
}
#ifndef EPIC_QUANT_AVX2
template <int L, int R>
EPIC_QUANT_OWN_FUNCTION Bytes<16> thirds(const Bytes<16> (&in)[3]) {
  return Bytes<16>::each([&](int i) EPIC_QUANT_INLINE_LAMBDA { return in[(3 * i + R) / 16].v[(3 * i + R) % 16]; });
}
#endif

// Eight codes in three bytes.
template <>
struct Codes<Coding::bits3> : BitCodes<3> {
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[3], B (&codes)[8]) {
    const B b0 = thirds<L, 0>(in), b1 = thirds<L, 1>(in), b2 = thirds<L, 2>(in);
    codes[0] = field(b0, 0, 3);
    codes[1] = field(b0, 3, 3);
    codes[2] = merge(B::fill(3), b0.down(6), b1.up(2) & B::fill(7));
    codes[3] = field(b1, 1, 3);
    codes[4] = field(b1, 4, 3);
    codes[5] = merge(B::fill(1), b1.down(7), (b2 + b2) & B::fill(7));
    codes[6] = field(b2, 2, 3);
    codes[7] = field(b2, 5, 3);
  }
};

// What is below 9 modulo 3 and over 3.
constexpr Lane kModulo3 = {{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0}};
constexpr Lane kOver3 = {{0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2}};

// Five base-3 digits a byte. For products it is divided by 9, and the quotient by 3, by multiplying with 57/512
// (7282/65536 for odd bytes, the even one below being their fraction) and 86/256, all exact for bytes up to 242; tables
// split what is below 9.
template <>
struct Codes<Coding::trits> {
  static void pack(const std::uint8_t* codes, std::size_t cols, std::uint8_t* to) {
    for (std::size_t at = 0; at < cols; at += 5, codes += 5)
      *to++ = static_cast<std::uint8_t>(codes[0] + 3 * codes[1] + 9 * codes[2] + 27 * codes[3] + 81 * codes[4]);
  }
  static void unpack(const std::uint8_t* from, std::size_t cols, std::uint8_t* codes) {
    static const Digits digits;
    EPIC_QUANT_UNROLL for (std::size_t at = 0; at < cols; at += 5, codes += 5)
      std::memcpy(codes, &digits.of_byte[*from++], 8);
  }
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[1], B (&codes)[5]) {
    const B byte = in[0], modulo3 = B::repeat(kModulo3.at), over3 = B::repeat(kOver3.at);
    const B ninth = byte.even_times(57).down(9) | byte.high_times(7282).odd();
    const B below9 = byte - ninth - ninth.up(3);
    const B top = ninth.even_times(86).down(8) | ninth.odd_times(86).odd();
    codes[0] = modulo3.look_up(below9);
    codes[1] = over3.look_up(below9);
    codes[2] = ninth - top - (top + top);
    codes[3] = modulo3.look_up(top);
    codes[4] = over3.look_up(top);
  }

 private:
  // The digits of a byte, in the bytes of a word.
  struct Digits {
    std::uint64_t of_byte[256];
    Digits() {
      for (unsigned byte = 0; byte < 256; ++byte) {
        of_byte[byte] = 0;
        for (unsigned digit = 0, rest = byte; digit < 5; ++digit, rest /= 3)
          of_byte[byte] |= std::uint64_t{rest % 3} << 8 * digit;
      }
    }
  };
};

// ---- ggml's types: units that hold scales ----

inline float fp16_at(const std::uint8_t* from) {
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return from_fp16(bits);
}

// Signed bytes, as codes from 0 on, after an fp16 scale.
template <>
struct Codes<Coding::q8_0> {
  static constexpr int input_at[] = {2};
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[1], B (&codes)[1]) {
    codes[0] = in[0] ^ B::fill(128);
  }
  static EPIC_QUANT_INLINE void scales(const std::uint8_t* unit, float* scales, float*) { *scales = fp16_at(unit); }
};

// The lower four bits of 256 codes, 64 a 32 bytes, the upper two of them, sixteen signed bytes and the fp16 scale that
// they are multiples of.
template <>
struct Codes<Coding::q6_k> {
  static constexpr int input_at[] = {0, 32, 64, 96, 128, 160};
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[6], B (&codes)[8]) {
    EPIC_QUANT_UNROLL for (int v = 0; v < 8; ++v) {
      const B low = field(in[v / 4 * 2 + v % 2], v % 4 / 2 * 4, 4), high = field(in[4 + v / 4], v % 4 * 2, 2);
      codes[v] = low | high.up(4);
    }
  }
  static EPIC_QUANT_INLINE void scales(const std::uint8_t* unit, float* scales, float*) {
    const Eight scale = Eight::of(fp16_at(unit + 208));
    (Eight::load_int8(unit + 192) * scale).store(scales);
    (Eight::load_int8(unit + 200) * scale).store(scales + 8);
  }
};

// Two fp16 scales, eight multiples of each in six bits, and 256 codes.
template <>
struct Codes<Coding::q4_k> {
  static constexpr int input_at[] = {16, 48, 80, 112};
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[4], B (&codes)[8]) {
    EPIC_QUANT_UNROLL for (int v = 0; v < 8; ++v) codes[v] = field(in[v / 2], v % 2 * 4, 4);
  }
  // Six bits of the first four, and two of the last four above the half bytes that hold the rest.
  static EPIC_QUANT_INLINE void scales(const std::uint8_t* unit, float* scales, float* minima) {
    std::uint32_t first[2], rest;
    std::memcpy(first, unit + 4, sizeof first);
    std::memcpy(&rest, unit + 12, sizeof rest);
    multiples(first[0], rest, fp16_at(unit)).store(scales);
    multiples(first[1], rest >> 4, fp16_at(unit + 2)).store(minima);
  }

 private:
  static EPIC_QUANT_INLINE Eight multiples(std::uint32_t first, std::uint32_t rest, float scale) {
    const std::uint32_t eight[2] = {first & 0x3F3F3F3F, (rest & 0x0F0F0F0F) | (first >> 2 & 0x30303030)};
    return Eight::load_int8(eight) * Eight::of(scale);
  }
};

// ---- trellises ----

// State bits up to which many states lie in one word.
constexpr int kShortState = 12;

// What a state stands for, as a signed byte; or 128 more, as an unsigned one.
template <class B>
struct StateValues {
  StateValues(const States& states, bool from128)
      : is_short(states.state_bits <= kShortState), mask(B::fill_words(states.mask())), multiplier(states.multiplier),
        high(B::repeat(states.high) ^ B::fill(from128 ? 128 : 0)), low(B::repeat(states.low)) {}
  bool is_short;
  B mask;
  unsigned multiplier;
  B high, low;
};

// A row is a stream of bits, the lowest first, and the state of weight i are those from bit i * Bits of it on. Half a
// unit is eight streams of 16 weights side by side: [Bits, 8] words of 16 bits, so that all shifts are the same. Weights
// v and v + 8 of them become the lower and the upper bytes of vector v.
template <int Bits>
struct TrellisCodes {
  template <int L, class B>
  static EPIC_QUANT_INLINE void decode(const B (&in)[Bits + 1], const StateValues<B>& states, B (&values)[8]) {
    B words[Bits + 1];
    EPIC_QUANT_UNROLL for (int i = 0; i < Bits; ++i) words[i] = in[i];
    words[Bits] = in[0].template from_second_word<L>(in[Bits]);
    states.is_short ? decode_words<true>(words, states, values) : decode_words<false>(words, states, values);
  }

 private:
  template <bool Short, class B>
  static EPIC_QUANT_INLINE void decode_words(const B (&words)[Bits + 1], const StateValues<B>& states, B (&values)[8]) {
    EPIC_QUANT_UNROLL for (int v = 0; v < 8; ++v) {
      const B first = product<Short>(words, v * Bits, states), second = product<Short>(words, (v + 8) * Bits, states);
      const B index = first.down(8) | second.odd();
      values[v] = states.high.look_up(index.down(4) & B::fill(15)) + states.low.look_up(index & B::fill(15));
    }
  }

  template <bool Short, class B>
  static EPIC_QUANT_INLINE B product(const B (&words)[Bits + 1], int at, const StateValues<B>& states) {
    const int word = at / 16, shift = at % 16;
    const bool in_one_word = shift == 0 || (Short && shift <= 16 - kShortState);
    const B own = shift ? words[word].down(shift) : words[word];
    const B window = in_one_word ? own : own | words[word + 1].up(16 - shift);
    return (window & states.mask).times(states.multiplier);
  }
};

template <>
struct Codes<Coding::trellis1> : TrellisCodes<1> {};
template <>
struct Codes<Coding::trellis2> : TrellisCodes<2> {};
template <>
struct Codes<Coding::trellis3> : TrellisCodes<3> {};
template <>
struct Codes<Coding::trellis4> : TrellisCodes<4> {};

// ---- the coding of a matrix, as a type ----

template <Coding K, bool Table = false>
struct Kind {
  static constexpr Coding coding = K;
  static constexpr int V = row_of(K).num_vectors, unit_nbytes = row_of(K).unit_nbytes;
  static constexpr int group_codes = row_of(K).group_codes;
  static constexpr bool has_scales = group_codes > 0, has_minima = row_of(K).has_minima;
  static constexpr int inputs = unit_nbytes / 32;  // vectors of bytes, of which a block has some bytes more
  static constexpr bool is_trellis = row_of(K).is_trellis;
  static constexpr bool has_bytes = V && row_of(K).num_bits == 8;
  // Codes stand for signed levels of their own, by a table or as bytes from 128 on, and not for code - zero.
  static constexpr bool has_levels = Table;
};

template <class Visit, int... Index>
void by_coding(Coding coding, Visit& visit, std::integer_sequence<int, Index...>) {
  (void)((static_cast<int>(coding) == Index && (visit(Kind<static_cast<Coding>(Index)>{}), true)) || ...);
}

// Calls visit with a Kind of the coding.
template <class Visit>
void by_coding(Coding coding, Visit&& visit) {
  by_coding(coding, visit, std::make_integer_sequence<int, kNumCodings>{});
}

// The same where there are products, with what codes stand for.
template <class Visit>
void by_product_kind(const Format& format, Visit&& visit) {
  by_coding(format.coding, [&](auto kind) {
    constexpr Coding K = kind.coding;
    constexpr bool has_values = kind.has_bytes || kind.is_trellis;
    constexpr bool has_tables = kind.V && !has_values && !kind.has_scales && K != Coding::trits;
    if constexpr (has_values) visit(Kind<K, true>{});
    if constexpr (kind.V && !has_values && !has_tables) visit(Kind<K, false>{});
    if constexpr (has_tables)
      format.table_bits ? visit(Kind<K, true>{}) : visit(Kind<K, false>{});
  });
}

// ---- rows for products ----

// What codes stand for, as signed bytes; or 128 more, as unsigned bytes.
template <class B, bool From128 = false>
struct Levels {
  explicit Levels(const Format& format)
      : table(B::repeat(format.table) ^ B::fill(From128 ? 128 : 0)), zero(B::fill(format.zero)),
        states(format.states, From128) {}

  // Levels of a table, or of bytes; a trellis has been decoded to them.
  template <class Kind>
  EPIC_QUANT_INLINE B level(B codes) const {
    if constexpr (Kind::is_trellis) return codes;
    return !Kind::has_bytes ? table.look_up(codes) : From128 ? codes : codes ^ B::fill(128);
  }
  // Of any coding.
  template <class Kind>
  EPIC_QUANT_INLINE B value(B codes) const {
    return Kind::has_levels ? level<Kind>(codes) : codes - zero;
  }
  B table, zero;
  StateValues<B> states;
};

// Bytes that hold what a row lacks to whole blocks, and what is read behind them.
constexpr std::size_t kTailNbytes = 272;

// Units of a row that are read in place: those whose last bytes, and what a trellis reads of the next, are in the row.
template <class Kind>
EPIC_QUANT_INLINE std::size_t units_in_place(const StoredMatrix& matrix) {
  if (!Kind::is_trellis) return matrix.row_nbytes / Kind::unit_nbytes;
  const std::size_t whole = matrix.cols / (Kind::V * kVector);
  return whole ? whole - 1 : 0;
}

// The units from `first` on, of which some are not in place, with zeros after.
template <class Kind>
EPIC_QUANT_INLINE void copy_tail(const StoredMatrix& matrix, const std::uint8_t* row, std::size_t first,
                                 std::uint8_t (&tail)[kTailNbytes]) {
  std::memset(tail, 0, sizeof tail);
  std::size_t size = matrix.row_nbytes - first * Kind::unit_nbytes;
  const std::uint8_t* from = row + first * Kind::unit_nbytes;
  if constexpr (Kind::is_trellis) {
    // What is left of half a unit has its words in order.
    constexpr std::size_t kHalf = Kind::unit_nbytes / 2, kWords = Kind::inputs;
    const std::size_t whole = (matrix.cols - first * Kind::V * kVector) / (kHalf * 8 / kWords) * kHalf;
    for (std::size_t word = 0; whole + 2 * word < size; ++word)
      std::memcpy(tail + whole + 16 * (word % kWords) + 2 * (word / kWords), from + whole + 2 * word, 2);
    size = whole;
  }
  std::memcpy(tail, from, size);
}

// Where a row's units are read: in place, or in a copy of those that reach past its end.
template <class Kind>
struct Row {
  EPIC_QUANT_INLINE Row(const StoredMatrix& matrix, std::size_t row)
      : in_place_(matrix.packed + row * matrix.row_nbytes), whole_(units_in_place<Kind>(matrix)) {
    // A block of several units may begin inside the row and end far behind it.
    if (whole_ < matrix.layout.num_units) copy_tail<Kind>(matrix, in_place_, whole_, tail_);
  }
  EPIC_QUANT_INLINE const std::uint8_t* unit(std::size_t index) const {
    return index < whole_ ? in_place_ + index * Kind::unit_nbytes : tail_ + (index - whole_) * Kind::unit_nbytes;
  }

 private:
  const std::uint8_t* in_place_;
  std::size_t whole_;
  std::uint8_t tail_[kTailNbytes];
};

// The codes of a unit, or where vectors have 16 bytes those from byte `at` of each vector on.
template <class Kind, class B, bool From128>
EPIC_QUANT_INLINE void decode(const std::uint8_t* unit, int at, const Levels<B, From128>& levels,
                              B (&codes)[Kind::V]) {
  B in[Kind::inputs + Kind::is_trellis];
  EPIC_QUANT_UNROLL for (int i = 0; i < Kind::inputs + Kind::is_trellis; ++i) {
    if constexpr (Kind::has_scales)
      in[i] = B::load(unit + Codes<Kind::coding>::input_at[i] + at);
    else
      in[i] = B::load_lanes(unit + at * Kind::inputs + 16 * i, 16 * Kind::inputs);
  }
  if constexpr (Kind::is_trellis)
    Codes<Kind::coding>::template decode<16>(in, levels.states, codes);
  else
    Codes<Kind::coding>::template decode<16>(in, codes);
}

// A unit as `of` makes bytes of vectors of codes: [V, 32].
template <class Kind, class B, bool From128, class Of>
EPIC_QUANT_INLINE void decode_unit(const std::uint8_t* unit, const Levels<B, From128>& levels, void* to, Of of) {
  EPIC_QUANT_UNROLL for (int at = 0; at < 32; at += B::size) {
    B codes[Kind::V];
    decode<Kind>(unit, at, levels, codes);
    EPIC_QUANT_UNROLL for (int v = 0; v < Kind::V; ++v)
      of(codes[v]).store(static_cast<std::uint8_t*>(to) + v * 32 + at);
  }
}

}  // namespace
}  // namespace epic_quant
