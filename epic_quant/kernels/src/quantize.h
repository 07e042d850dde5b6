// Quantizing a row, decoding it and turning it; compiled once for each instruction set. The torch code in
// epic_quant/quant/ says what is computed, and this gives its bits: sums are exact, so their order does not matter.
#pragma once

#include <math.h>

#include <cstring>

#include "eight.h"
#include "rows.h"

namespace epic_quant {
namespace {

constexpr float kFp16Max = 65504.0f;
constexpr float kBf16Max = 3.3895313892515355e38f;
constexpr float kFp32Max = 3.4028234663852886e38f;

inline std::size_t padded(std::size_t n) { return (n + 7) / 8 * 8; }

// ---- elements ----

inline std::size_t size_of(Element element) { return element == Element::fp32 ? 4 : 2; }

inline Eight load(Element element, const char* from) {
  switch (element) {
    case Element::bf16: return Eight::load_bf16(from);
    case Element::fp16: return Eight::load_fp16(from);
    default: return Eight::load(from);
  }
}

inline void store(Element element, Eight x, char* to) {
  switch (element) {
    case Element::bf16: return x.store_bf16(to);
    case Element::fp16: return x.store_fp16(to);
    default: return x.store(to);
  }
}

// Row `row` as fp32 with zeros up to a multiple of eight; false where a number is not finite.
inline bool read_row(Element element, const void* rows, std::size_t row, std::size_t cols, float* to) {
  const std::size_t size = size_of(element), whole = cols / 8 * 8;
  const char* from = static_cast<const char*>(rows) + row * cols * size;
  TopBits top;
  for (std::size_t at = 0; at < whole; at += 8) {
    const Eight x = load(element, from + at * size);
    top.add(x);
    x.store(to + at);
  }
  if (whole < cols) {
    char rest[32] = {};
    std::memcpy(rest, from + whole * size, (cols - whole) * size);
    const Eight x = load(element, rest);
    top.add(x);
    x.store(to + whole);
  }
  return top.total() < 0x7F800000;
}

inline void write_row(Element element, const float* from, std::size_t row, std::size_t cols, void* rows) {
  const std::size_t size = size_of(element), whole = cols / 8 * 8;
  char* to = static_cast<char*>(rows) + row * cols * size;
  const float most = element == Element::fp16 ? kFp16Max : element == Element::bf16 ? kBf16Max : kFp32Max;
  const Eight high = Eight::of(most), low = Eight::of(-most);
  for (std::size_t at = 0; at < whole; at += 8)
    store(element, smaller(larger(Eight::load(from + at), low), high), to + at * size);
  if (whole < cols) {
    char rest[32];
    store(element, smaller(larger(Eight::load(from + whole), low), high), rest);
    std::memcpy(to + whole * size, rest, (cols - whole) * size);
  }
}

// ---- codes to bytes (little-endian machines) ----

// Eight codes of `Bits` bits as bytes, and as the lowest bits of a word: neighbours move together, then pairs, then
// pairs of pairs.
template <int Bits>
struct Eights {
  static constexpr std::uint64_t ones = (std::uint64_t{1} << Bits) - 1, twos = (std::uint64_t{1} << 2 * Bits) - 1;
  static constexpr std::uint64_t fours = (std::uint64_t{1} << 4 * Bits) - 1;
  static constexpr std::uint64_t each = ones * 0x0001000100010001u, each_two = twos * 0x0000000100000001u;

  static std::uint64_t join(std::uint64_t x) {
    x = (x & each) | (x >> 8 & each) << Bits;
    x = (x & each_two) | (x >> 16 & each_two) << 2 * Bits;
    return (x & fours) | (x >> 32 & fours) << 4 * Bits;
  }
  static std::uint64_t split(std::uint64_t x) {
    x = (x & fours) | (x >> 4 * Bits & fours) << 32;
    x = (x & each_two) | (x >> 2 * Bits & each_two) << 16;
    return (x & each) | (x >> Bits & each) << 8;
  }
};

template <int Bits>
void pack_row(const std::uint8_t* codes, std::size_t cols, std::uint8_t* to) {
  std::uint64_t x;
  std::size_t left = row_nbytes(Bits, cols);
  for (; left >= 8; codes += 8, to += Bits, left -= Bits) {
    std::memcpy(&x, codes, 8);
    x = Eights<Bits>::join(x);
    std::memcpy(to, &x, 8);  // what is written too much comes anew
  }
  for (; left; codes += 8) {
    std::memcpy(&x, codes, 8);
    x = Eights<Bits>::join(x);
    for (int byte = 0; byte < Bits && left; ++byte, --left, x >>= 8) *to++ = static_cast<std::uint8_t>(x);
  }
}

template <int Bits>
void unpack_row(const std::uint8_t* from, std::size_t cols, std::uint8_t* codes) {
  std::uint64_t x;
  std::size_t left = row_nbytes(Bits, cols);
  for (; left >= 8; codes += 8, from += Bits, left -= Bits) {
    std::memcpy(&x, from, 8);
    x = Eights<Bits>::split(x);
    std::memcpy(codes, &x, 8);
  }
  for (; left; codes += 8) {
    x = 0;
    for (int byte = 0; byte < Bits && left; ++byte, --left) x |= std::uint64_t{*from++} << 8 * byte;
    x = Eights<Bits>::split(x);
    std::memcpy(codes, &x, 8);
  }
}

inline void pack_trits(const std::uint8_t* codes, std::size_t cols, std::uint8_t* to) {
  for (std::size_t at = 0; at < cols; at += 5, codes += 5)
    *to++ = static_cast<std::uint8_t>(codes[0] + 3 * codes[1] + 9 * codes[2] + 27 * codes[3] + 81 * codes[4]);
}

// The digits of a byte, in the bytes of a word.
struct Trits {
  std::uint64_t of_byte[256];
  Trits() {
    for (unsigned byte = 0; byte < 256; ++byte) {
      of_byte[byte] = 0;
      for (unsigned digit = 0, rest = byte; digit < 5; ++digit, rest /= 3)
        of_byte[byte] |= std::uint64_t{rest % 3} << 8 * digit;
    }
  }
};

inline void unpack_trits(const std::uint8_t* from, std::size_t cols, std::uint8_t* codes) {
  static const Trits trits;
  for (std::size_t at = 0; at < cols; at += 5, codes += 5) std::memcpy(codes, &trits.of_byte[*from++], 8);
}

// Reads up to seven codes beyond `cols`, which must be zeros.
inline void pack_row(int bits, const std::uint8_t* codes, std::size_t cols, std::uint8_t* to) {
  switch (bits) {
    case 0: return pack_trits(codes, cols, to);
    case 1: return pack_row<1>(codes, cols, to);
    case 2: return pack_row<2>(codes, cols, to);
    case 3: return pack_row<3>(codes, cols, to);
    case 4: return pack_row<4>(codes, cols, to);
    case 5: return pack_row<5>(codes, cols, to);
    case 6: return pack_row<6>(codes, cols, to);
    case 7: return pack_row<7>(codes, cols, to);
    default: std::memcpy(to, codes, cols);
  }
}

// Writes up to seven codes beyond `cols`.
inline void unpack_row(int bits, const std::uint8_t* from, std::size_t cols, std::uint8_t* codes) {
  switch (bits) {
    case 0: return unpack_trits(from, cols, codes);
    case 1: return unpack_row<1>(from, cols, codes);
    case 2: return unpack_row<2>(from, cols, codes);
    case 3: return unpack_row<3>(from, cols, codes);
    case 4: return unpack_row<4>(from, cols, codes);
    case 5: return unpack_row<5>(from, cols, codes);
    case 6: return unpack_row<6>(from, cols, codes);
    case 7: return unpack_row<7>(from, cols, codes);
    default: std::memcpy(codes, from, cols);
  }
}

// ---- the turn ----

// Sylvester's Hadamard matrix, entries of 1, times each block: sums and differences of numbers 1, 2, 4 … apart.
inline void transform(float* row, std::size_t cols, std::size_t block) {
  if (block > 1)
    for (std::size_t at = 0; at < cols; at += 8) {
      Eight x = Eight::load(row + at).butterfly1();
      if (block > 2) x = x.butterfly2();
      if (block > 4) x = x.butterfly4();
      x.store(row + at);
    }
  for (std::size_t start = 0; start < cols && block > 8; start += block)
    for (std::size_t apart = 8; apart < block; apart *= 2)
      for (std::size_t pair = start; pair < start + block; pair += 2 * apart)
        for (std::size_t at = pair; at < pair + apart; at += 8) {
          const Eight a = Eight::load(row + at), b = Eight::load(row + at + apart);
          (a + b).store(row + at);
          (a - b).store(row + at + apart);
        }
}

// Beyond this no scale is left to store, and the sums of a turn must not overflow.
inline void bound(float* row, std::size_t cols) {
  const Eight high = Eight::of(0x1p100f), low = Eight::of(-0x1p100f);
  for (std::size_t at = 0; at < cols; at += 8) smaller(larger(Eight::load(row + at), low), high).store(row + at);
}

inline void turn(const Turn& turn, float* row, std::size_t cols) {
  for (std::size_t at = 0; at < cols; at += 8) {
    float signs[8] = {};
    std::memcpy(signs, turn.signs + at, (cols - at < 8 ? cols - at : 8) * sizeof(float));
    (Eight::load(row + at) * Eight::load(signs)).store(row + at);
  }
  transform(row, cols, turn.block);
}

inline void turn_back(const Turn& turn, float* row, std::size_t cols) {
  // The root of the block first, as above; the signs last.
  const float root = fabsf(turn.signs[0]);
  for (std::size_t at = 0; at < cols; at += 8) (Eight::load(row + at) * Eight::of(root)).store(row + at);
  transform(row, cols, turn.block);
  for (std::size_t at = 0; at < cols; ++at) row[at] = turn.signs[at] < 0 ? -row[at] : row[at];
}

// ---- levels ----

struct Whole {
  Eight low, high;
  explicit Whole(const Scheme& scheme) : low(Eight::of(scheme.low)), high(Eight::of(scheme.high)) {}
  Eight level(Eight ratio) const { return smaller(larger(ratio.rounded(), low), high); }
  Eight code(Eight ratio) const { return level(ratio) - low; }
};

struct Thirds {
  Eight limit = Eight::of(0.33f), minus_limit = Eight::of(-0.33f), one = Eight::of(1.0f);
  explicit Thirds(const Scheme&) {}
  Eight level(Eight ratio) const { return above(ratio, limit) - above(minus_limit, ratio); }
  Eight code(Eight ratio) const { return level(ratio) + one; }
};

template <int Bits>
struct Entries {
  Places<Bits> places;
  explicit Entries(const Scheme& scheme) : places(scheme.thresholds, scheme.levels) {}
  Eight level(Eight ratio) const { return places.entry(ratio); }
  Eight code(Eight ratio) const { return places.place(ratio); }
};

// ---- the scale ----

// Scales tried in one pass over a group.
constexpr int kAtOnce = 3;

struct Fit {
  double scale, gain;
};

// For each of some inverses of a scale, the scale of least squares for the levels that it chooses, and what that
// explains. Weights [size] are whole numbers of at most 24 bits, with zeros up to a multiple of eight.
template <int Count, class Levels>
void refit(const Levels& levels, const float* weights, std::size_t size, const double* inverses, Fit* fits) {
  Eight factors[Count];
  ProductSums sums[Count];
  for (int i = 0; i < Count; ++i) factors[i] = Eight::of(static_cast<float>(inverses[i]));
  for (std::size_t at = 0; at < size; at += 8) {
    const Eight w = Eight::load(weights + at);
    for (int i = 0; i < Count; ++i) sums[i].add(w, levels.level(w * factors[i]));
  }
  // The zeros after the group, for which a table may have no entry of zero.
  float of_zero[8];
  levels.level(Eight::of(0)).store(of_zero);
  const double zeros = static_cast<double>(padded(size) - size);
  const double norm_of_zeros = zeros * static_cast<double>(of_zero[0]) * static_cast<double>(of_zero[0]);
  for (int i = 0; i < Count; ++i) {
    const double norm = sums[i].norm() - norm_of_zeros, product = sums[i].product();
    fits[i].scale = norm > 0 ? product / norm : 0;
    fits[i].gain = product * fits[i].scale;
  }
}

// Whether the largest weight is further from zero than the least one.
inline bool leans_up(const float* group, std::size_t size) {
  float most = group[0], least = group[0];
  std::size_t at = 0;
  if (size >= 8) {
    Eight high = Eight::load(group), low = high;
    for (at = 8; at + 8 <= size; at += 8) {
      high = larger(high, Eight::load(group + at));
      low = smaller(low, Eight::load(group + at));
    }
    float highs[8], lows[8];
    high.store(highs);
    low.store(lows);
    for (int i = 0; i < 8; ++i) {
      most = highs[i] > most ? highs[i] : most;
      least = lows[i] < least ? lows[i] : least;
    }
  }
  for (; at < size; ++at) {
    most = group[at] > most ? group[at] : most;
    least = group[at] < least ? group[at] : least;
  }
  return most > -least;
}

inline double clamped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// `whole` [padded size] is scratch.
template <class Levels>
float least_squares_scale(const Scheme& scheme, const Levels& levels, const float* group, std::size_t size,
                          float* whole) {
  const Eight high = Eight::of(0x1p30f), low = Eight::of(-0x1p30f);
  const std::size_t even = size / 8 * 8;
  const float sign = scheme.either_sign && leans_up(group, size) ? -1.0f : 1.0f;
  TopBits top;
  for (std::size_t at = 0; at < even; at += 8) {
    const Eight x = smaller(larger(Eight::load(group + at) * Eight::of(sign), low), high);
    x.store(whole + at);
    top.add(x);
  }
  if (even < size) {
    float rest[8] = {};
    std::memcpy(rest, group + even, (size - even) * sizeof(float));
    const Eight x = smaller(larger(Eight::load(rest) * Eight::of(sign), low), high);
    x.store(whole + even);
    top.add(x);
  }
  const int places = static_cast<int>(top.total() >> 23) - 126, exponent = 24 - (places < -100 ? -100 : places);
  const Eight unit = Eight::of(ldexpf(1.0f, exponent));
  SquareSum squares;  // of 16 bits, whose sums are exact too
  Eight largest = Eight::of(0);
  for (std::size_t at = 0; at < size; at += 8) {
    const Eight x = (Eight::load(whole + at) * unit).rounded();
    x.store(whole + at);
    squares.add((x * Eight::of(1.0f / 256)).rounded());
    largest = larger(largest, x.magnitude());
  }
  float lanes[8];
  largest.store(lanes);
  double peak = 1;
  for (float lane : lanes) peak = static_cast<double>(lane) > peak ? static_cast<double>(lane) : peak;
  const double sum = squares.total() < 1 ? 1 : squares.total();
  const double to_peak = scheme.peak_level / peak;
  const double to_gaussian = 1 / (sqrt(sum / static_cast<double>(size)) * (256 * scheme.gaussian_step));

  // The five that are tried, the one that puts the largest on `peak_level`, and the one between the best.
  double inverses[7];
  inverses[0] = to_peak / 1.1;
  const double finest = (to_gaussian > to_peak ? to_gaussian : to_peak) / 0.9;
  const double ratio = sqrt(sqrt(finest / inverses[0]));
  for (int step = 1; step < 5; ++step) inverses[step] = inverses[step - 1] * ratio;
  inverses[5] = to_peak;
  Fit tried[7];
  for (int step = 0; step < 6; step += kAtOnce) refit<kAtOnce>(levels, whole, size, inverses + step, tried + step);
  int best = 0;
  for (int step = 1; step < 5; ++step)
    if (tried[step].gain > tried[best].gain) best = step;
  const int middle = best < 1 ? 1 : best > 3 ? 3 : best;
  const double before = tried[middle - 1].gain, here = tried[middle].gain, after = tried[middle + 1].gain;
  const double curvature = before - 2 * here + after;
  const double offset = curvature != 0 ? clamped((before - after) / (2 * curvature), -1, 1) : 0;
  const double below = inverses[middle - 1], at = inverses[middle], over = inverses[middle + 1];
  const double between = at + offset * ((over - below) / 2 + offset * ((over + below) / 2 - at));
  inverses[6] = clamped(between, below, over);
  refit<1>(levels, whole, size, inverses + 6, tried + 6);
  for (int step = 5; step < 7; ++step)
    if (tried[step].gain > tried[best].gain) best = step;

  const float found = static_cast<float>(ldexp(tried[best].scale, -exponent));
  const float most = found > kFp16Max ? kFp16Max : found < -kFp16Max ? -kFp16Max : found;
  return sign * from_fp16(to_fp16(most));
}

inline float absmax_scale(const Scheme& scheme, const float* group, std::size_t size) {
  float most = 0;
  std::size_t at = 0;
  if (size >= 8) {
    Eight largest = Eight::of(0);
    for (; at + 8 <= size; at += 8) largest = larger(largest, Eight::load(group + at).magnitude());
    float lanes[8];
    largest.store(lanes);
    for (float lane : lanes) most = lane > most ? lane : most;
  }
  for (; at < size; ++at) {
    const float magnitude = fabsf(group[at]);
    most = magnitude > most ? magnitude : most;
  }
  return most / scheme.divisor;
}

// ---- rows ----

template <class Levels>
std::size_t quantize_rows_with(const Quantize& job, std::size_t begin, std::size_t end, float* scratch) {
  const Scheme& scheme = *job.scheme;
  const Levels levels(scheme);
  float* const row = scratch;
  float* const whole = scratch + job.cols + 16;
  std::uint8_t* const codes = reinterpret_cast<std::uint8_t*>(scratch + 2 * (job.cols + 16));
  std::memset(row, 0, (job.cols + 16) * sizeof(float));
  std::memset(codes, 0, job.cols + 16);
  const std::size_t num_groups = job.cols / job.group_size, nbytes = row_nbytes(scheme.packed_bits, job.cols);
  for (std::size_t at = begin; at < end; ++at) {
    if (!read_row(job.element, job.weight, at, job.cols, row)) return at;
    if (job.turn.block) {
      bound(row, job.cols);
      turn(job.turn, row, job.cols);
    }
    for (std::size_t group = 0; group < num_groups; ++group) {
      const std::size_t start = group * job.group_size;
      const float scale = scheme.least_squares
                              ? least_squares_scale(scheme, levels, row + start, job.group_size, whole)
                              : absmax_scale(scheme, row + start, job.group_size);
      job.scale[at * num_groups + group] = to_fp16(scale > kFp16Max ? kFp16Max : scale);
      const Eight divisor = Eight::of(scale == 0 ? INFINITY : scale);
      // The last eight may reach into the next group, which then writes its own.
      for (std::size_t i = start; i < start + job.group_size; i += 8)
        levels.code(Eight::load(row + i) / divisor).store_bytes(codes + i);
    }
    std::memset(codes + job.cols, 0, 16);
    pack_row(scheme.packed_bits, codes, job.cols, job.packed + at * nbytes);
  }
  return kAllFinite;
}

// Rows [begin, end); gives back the first with a number that is not finite, where it stops, or kAllFinite.
inline std::size_t quantize_rows(const Quantize& job, std::size_t begin, std::size_t end, float* scratch) {
  switch (job.scheme->rounding) {
    case Rounding::whole: return quantize_rows_with<Whole>(job, begin, end, scratch);
    case Rounding::thirds: return quantize_rows_with<Thirds>(job, begin, end, scratch);
    default: break;
  }
  switch (job.scheme->table_bits) {
    case 2: return quantize_rows_with<Entries<2>>(job, begin, end, scratch);
    case 3: return quantize_rows_with<Entries<3>>(job, begin, end, scratch);
    default: return quantize_rows_with<Entries<4>>(job, begin, end, scratch);
  }
}

inline void dequantize_rows(const Dequantize& job, std::size_t begin, std::size_t end, float* scratch) {
  const Scheme& scheme = *job.scheme;
  float* const row = scratch;
  std::uint8_t* const codes = reinterpret_cast<std::uint8_t*>(scratch + job.cols + 16);
  std::memset(row, 0, (job.cols + 16) * sizeof(float));
  const std::size_t num_groups = job.cols / job.group_size, nbytes = row_nbytes(scheme.packed_bits, job.cols);
  for (std::size_t at = begin; at < end; ++at) {
    unpack_row(scheme.packed_bits, job.packed + at * nbytes, job.cols, codes);
    for (std::size_t group = 0; group < num_groups; ++group) {
      const float scale = from_fp16(job.scale[at * num_groups + group]);
      const std::size_t start = group * job.group_size, stop = start + job.group_size;
      if (scheme.rounding == Rounding::entries)
        for (std::size_t i = start; i < stop; ++i) row[i] = scheme.levels[codes[i]] * scale;
      else
        for (std::size_t i = start; i < stop; ++i) row[i] = (static_cast<float>(codes[i]) + scheme.low) * scale;
    }
    if (job.turn.block) turn_back(job.turn, row, job.cols);
    write_row(job.element, row, at, job.cols, job.weight);
  }
}

inline void turn_rows(const TurnRows& job, std::size_t begin, std::size_t end, float* scratch) {
  std::memset(scratch, 0, (job.cols + 16) * sizeof(float));
  for (std::size_t at = begin; at < end; ++at) {
    std::memcpy(scratch, job.from + at * job.cols, job.cols * sizeof(float));
    (job.back ? turn_back : turn)(job.turn, scratch, job.cols);
    std::memcpy(job.to + at * job.cols, scratch, job.cols * sizeof(float));
  }
}

}  // namespace
}  // namespace epic_quant
