// Quantizing rows and decoding them; compiled once for each instruction set. The torch code in epic_quant/quant/ says
// what is computed, and this gives its bits: sums are exact, so their order does not matter.
#pragma once

#include <math.h>

#include "codes.h"
#include "eight.h"
#include "format.h"
#include "gemm.h"
#include "hadamard.h"

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
  MaxAbsBits max_abs;
  for (std::size_t at = 0; at < whole; at += 8) {
    const Eight x = load(element, from + at * size);
    max_abs.add(x);
    x.store(to + at);
  }
  if (whole < cols) {
    char rest[32] = {};
    std::memcpy(rest, from + whole * size, (cols - whole) * size);
    const Eight x = load(element, rest);
    max_abs.add(x);
    x.store(to + whole);
  }
  return max_abs.total() < 0x7F800000;
}

// What is NaN stays so.
inline void write_row(Element element, const float* from, std::size_t row, std::size_t cols, void* rows) {
  const std::size_t size = size_of(element), whole = cols / 8 * 8;
  char* to = static_cast<char*>(rows) + row * cols * size;
  const float most = element == Element::fp16 ? kFp16Max : element == Element::bf16 ? kBf16Max : kFp32Max;
  const Eight high = Eight::of(most), low = Eight::of(-most);
  for (std::size_t at = 0; at < whole; at += 8)
    store(element, smaller(high, larger(low, Eight::load(from + at))), to + at * size);
  if (whole < cols) {
    char rest[32];
    store(element, smaller(high, larger(low, Eight::load(from + whole))), rest);
    std::memcpy(to + whole * size, rest, (cols - whole) * size);
  }
}

// Beyond this no scale is left to store, and the sums of a rotation must not overflow.
inline void bound(float* row, std::size_t cols) {
  const Eight high = Eight::of(0x1p100f), low = Eight::of(-0x1p100f);
  for (std::size_t at = 0; at < cols; at += 8) smaller(larger(Eight::load(row + at), low), high).store(row + at);
}

// ---- levels ----

struct Nearest {
  Eight low, high;
  explicit Nearest(const Format& format) : low(Eight::of(format.low)), high(Eight::of(format.high)) {}
  Eight level(Eight ratio) const { return smaller(larger(ratio.rounded(), low), high); }
  Eight code(Eight ratio) const { return level(ratio) - low; }
};

struct Sign {
  Eight limit = Eight::of(0.33f), minus_limit = Eight::of(-0.33f), one = Eight::of(1.0f);
  explicit Sign(const Format&) {}
  Eight level(Eight ratio) const { return above(ratio, limit) - above(minus_limit, ratio); }
  Eight code(Eight ratio) const { return level(ratio) + one; }
};

template <int Bits>
struct Table {
  Thresholds<Bits> thresholds;
  explicit Table(const Format& format) : thresholds(format.thresholds, format.levels) {}
  Eight level(Eight ratio) const { return thresholds.entry(ratio); }
  Eight code(Eight ratio) const { return thresholds.index(ratio); }
};

// ---- the scale ----

// Scales tried in one pass over a group.
constexpr int kAtOnce = 3;

struct Fit {
  double scale, gain;
};

// For each of some inverses of a scale, the scale of least squares for the levels that it chooses, and what that
// explains. Weights [size] are whole numbers of at most 24 bits, with zeros up to a multiple of eight.
template <int Count, class Rounder>
EPIC_QUANT_OWN_FUNCTION void refit(const Rounder& rounder, const float* weights, std::size_t size,
                                   const double* inverses, Fit* fits) {
  Eight factors[Count];
  ProductSums sums[Count];
  for (int i = 0; i < Count; ++i) factors[i] = Eight::of(static_cast<float>(inverses[i]));
  for (std::size_t at = 0; at < size; at += 8) {
    const Eight w = Eight::load(weights + at);
    for (int i = 0; i < Count; ++i) sums[i].add(w, rounder.level(w * factors[i]));
  }
  // The zeros after the group, for which a table may have no entry of zero.
  float of_zero[8];
  rounder.level(Eight::of(0)).store(of_zero);
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
  Eight high = Eight::of(0), low = high;
  for (std::size_t at = 0; at < size; at += 8) {
    const Eight x = load_first(group + at, size - at);
    high = larger(high, x);
    low = smaller(low, x);
  }
  return max_of(high) > max_of(Eight::of(0) - low);
}

inline double clamped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// `whole` [padded size] is scratch.
template <class Rounder>
EPIC_QUANT_OWN_FUNCTION float least_squares_scale(const Format& format, const Rounder& rounder, const float* group,
                                                  std::size_t size, float* whole) {
  const Eight high = Eight::of(0x1p30f), low = Eight::of(-0x1p30f);
  const float sign = format.either_sign && leans_up(group, size) ? -1.0f : 1.0f;
  MaxAbsBits max_abs;
  for (std::size_t at = 0; at < size; at += 8) {
    const Eight x = smaller(larger(load_first(group + at, size - at) * Eight::of(sign), low), high);
    x.store(whole + at);
    max_abs.add(x);
  }
  const int places = static_cast<int>(max_abs.total() >> 23) - 126, exponent = 24 - (places < -100 ? -100 : places);
  const Eight unit = Eight::of(ldexpf(1.0f, exponent));
  SquareSum squares;  // of 16 bits, whose sums are exact too
  Eight largest = Eight::of(0);
  for (std::size_t at = 0; at < size; at += 8) {
    const Eight x = (Eight::load(whole + at) * unit).rounded();
    x.store(whole + at);
    squares.add((x * Eight::of(1.0f / 256)).rounded());
    largest = larger(largest, x.magnitude());
  }
  const double peak = max_of(largest) > 1 ? static_cast<double>(max_of(largest)) : 1;
  const double sum = squares.total() < 1 ? 1 : squares.total();
  const double to_peak = format.peak_level / peak;
  const double to_gaussian = 1 / (sqrt(sum / static_cast<double>(size)) * (256 * format.gaussian_step));

  // The five that are tried, the one that puts the largest on `peak_level`, and the one between the best.
  double inverses[7];
  inverses[0] = to_peak / 1.1;
  const double finest = (to_gaussian > to_peak ? to_gaussian : to_peak) / 0.9;
  const double ratio = sqrt(sqrt(finest / inverses[0]));
  for (int step = 1; step < 5; ++step) inverses[step] = inverses[step - 1] * ratio;
  inverses[5] = to_peak;
  Fit tried[7];
  for (int step = 0; step < 6; step += kAtOnce) refit<kAtOnce>(rounder, whole, size, inverses + step, tried + step);
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
  refit<1>(rounder, whole, size, inverses + 6, tried + 6);
  for (int step = 5; step < 7; ++step)
    if (tried[step].gain > tried[best].gain) best = step;

  const float found = static_cast<float>(ldexp(tried[best].scale, -exponent));
  const float most = found > kFp16Max ? kFp16Max : found < -kFp16Max ? -kFp16Max : found;
  return sign * from_fp16(to_fp16(most));
}

inline float absmax_scale(const Format& format, const float* group, std::size_t size) {
  Eight largest = Eight::of(0);
  for (std::size_t at = 0; at < size; at += 8)
    largest = larger(largest, load_first(group + at, size - at).magnitude());
  return max_of(largest) / format.divisor;
}

// ---- rows ----

template <class Rounder>
std::size_t quantize_rows(const StoredMatrix& matrix, Element element, const void* weight, std::size_t begin,
                          std::size_t end, float* scratch) {
  const Format& format = matrix.format;
  const Rounder rounder(format);
  const std::size_t cols = matrix.cols, group_size = matrix.group_size;
  void (*pack)(const std::uint8_t*, std::size_t, std::uint8_t*) = nullptr;
  by_coding(format.coding, [&](auto kind) {
    if constexpr (!kind.has_scales && !kind.is_trellis) pack = Codes<kind.coding>::pack;
  });
  float* const row = scratch;
  float* const whole = scratch + cols + 16;
  std::uint8_t* const codes = reinterpret_cast<std::uint8_t*>(scratch + 2 * (cols + 16));
  std::memset(row, 0, (cols + 16) * sizeof(float));
  std::memset(codes, 0, cols + 16);
  for (std::size_t at = begin; at < end; ++at) {
    if (!read_row(element, weight, at, cols, row)) return at;
    if (matrix.rotation.block) {
      bound(row, cols);
      rotate(matrix.rotation, row, cols);
    }
    std::uint16_t* const scales = matrix.scale + at * matrix.num_scales;
    for (std::size_t group = 0; group < matrix.num_scales; ++group) {
      const std::size_t start = group * group_size;
      const float scale = format.divisor == 0 ? least_squares_scale(format, rounder, row + start, group_size, whole)
                                              : absmax_scale(format, row + start, group_size);
      scales[group] = to_fp16(scale > kFp16Max ? kFp16Max : scale);
      const Eight divisor = Eight::of(scale == 0 ? INFINITY : scale);
      // The last eight may reach into the next group, which then writes its own.
      for (std::size_t i = start; i < start + group_size; i += 8)
        rounder.code(Eight::load(row + i) / divisor).store_bytes(codes + i);
    }
    std::memset(codes + cols, 0, 16);
    pack(codes, cols, matrix.packed + at * matrix.row_nbytes);
  }
  return kAllFinite;
}

template <class Kind>
void unpack_codes(const StoredMatrix& matrix, std::size_t row, std::uint8_t* codes) {
  Codes<Kind::coding>::unpack(matrix.packed + row * matrix.row_nbytes, matrix.cols, codes);
}

// The values of a trellis and 128 more, as codes whose zero is 128.
template <class Kind>
void unpack_path(const StoredMatrix& matrix, std::size_t row, std::uint8_t* codes) {
  constexpr std::size_t kUnitCodes = Kind::V * kVector;
  const Levels<Vector, true> levels(matrix.format);
  const Row<Kind> packed(matrix, row);
  for (std::size_t at = 0, unit = 0; at < matrix.cols; at += kUnitCodes, ++unit) {
    std::uint8_t in_order[kUnitCodes];
    for (int half = 0; half < 32; half += Vector::size) {
      Vector v[8], w[8];
      decode<Kind>(packed.unit(unit), half, levels, v);
      // Byte j of vector i goes to byte 8 j + i.
      EPIC_QUANT_UNROLL for (int i = 0; i < 4; ++i) w[2 * i] = v[i].zip_low(v[i + 4]), w[2 * i + 1] = v[i].zip_high(v[i + 4]);
      EPIC_QUANT_UNROLL for (int i = 0; i < 4; ++i) v[2 * i] = w[i].zip_low(w[i + 4]), v[2 * i + 1] = w[i].zip_high(w[i + 4]);
      EPIC_QUANT_UNROLL for (int i = 0; i < 4; ++i) w[2 * i] = v[i].zip_low(v[i + 4]), w[2 * i + 1] = v[i].zip_high(v[i + 4]);
      EPIC_QUANT_UNROLL for (int i = 0; i < 8; ++i) w[i].store_lanes(in_order + 8 * half + 16 * i, 128);
    }
    std::memcpy(codes + at, in_order, matrix.cols - at < kUnitCodes ? matrix.cols - at : kUnitCodes);
  }
}

inline void dequantize_rows(const StoredMatrix& matrix, Element element, void* weight, bool rotated, std::size_t begin,
                            std::size_t end, float* scratch) {
  const Format& format = matrix.format;
  const std::size_t cols = matrix.cols, num_scales = matrix.num_scales, group_size = matrix.group_size;
  const float low = format.low;
  void (*unpack)(const StoredMatrix&, std::size_t, std::uint8_t*) = nullptr;
  by_coding(format.coding, [&](auto kind) {
    if constexpr (kind.is_trellis)
      unpack = unpack_path<decltype(kind)>;
    else if constexpr (!kind.has_scales)
      unpack = unpack_codes<decltype(kind)>;
  });
  float* const row = scratch;
  std::uint8_t* const codes = reinterpret_cast<std::uint8_t*>(scratch + cols + 16);
  std::memset(row, 0, (cols + 16) * sizeof(float));
  for (std::size_t at = begin; at < end; ++at) {
    unpack(matrix, at, codes);
    for (std::size_t group = 0; group < num_scales; ++group) {
      const float scale = from_fp16(matrix.scale[at * num_scales + group]);
      const std::size_t start = group * group_size, stop = start + group_size;
      if (format.table_bits)
        for (std::size_t i = start; i < stop; ++i) row[i] = format.levels[codes[i]] * scale;
      else
        scale_codes(codes + start, group_size, low, scale, row + start);
    }
    if (matrix.rotation.block && !rotated) unrotate(matrix.rotation, row, cols);
    write_row(element, row, at, cols, weight);
  }
}

// The same where units hold scales.
template <class Kind>
void dequantize_units(const StoredMatrix& matrix, Element element, void* weight, bool, std::size_t begin,
                      std::size_t end, float* scratch) {
  const Layout& layout = matrix.layout;
  const Levels<Vector> levels(matrix.format);
  float* const scales = scratch + matrix.cols;
  float* const minima = scales + layout.padded_blocks();
  for (std::size_t at = begin; at < end; ++at) {
    expand_scales<Kind>(matrix, at, scales, minima);
    for (std::size_t unit = 0; unit < layout.num_units; ++unit)
      decode_fp32<Kind>(layout, levels, matrix.packed + at * matrix.row_nbytes + unit * Kind::unit_nbytes, unit, scales,
                        minima, nullptr, scratch + unit * layout.unit_codes);
    write_row(element, scratch, at, matrix.cols, weight);
  }
}

// The kernels of a format that work on rows, chosen by how it rounds. None quantizes to units that hold scales.
inline Kernels row_kernels(const Format& format) {
  Kernels kernels{};
  by_product_kind(format, [&](auto kind) {
    if constexpr (kind.has_scales) kernels.dequantize = dequantize_units<decltype(kind)>;
  });
  if (kernels.dequantize) return kernels;
  kernels.dequantize = dequantize_rows;
  if (row_of(format.coding).is_trellis) return kernels;  // paths are searched for in viterbi.h
  kernels.quantize = format.rounding == Rounding::nearest ? quantize_rows<Nearest>
                     : format.rounding == Rounding::sign  ? quantize_rows<Sign>
                     : format.table_bits == 2             ? quantize_rows<Table<2>>
                     : format.table_bits == 3             ? quantize_rows<Table<3>>
                                                          : quantize_rows<Table<4>>;
  return kernels;
}

}  // namespace
}  // namespace epic_quant
