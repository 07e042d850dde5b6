// Activations packed for products; compiled once for each instruction set.
#pragma once

#include "codes.h"
#include "eight.h"
#include "format.h"
#include "hadamard.h"

namespace epic_quant {
namespace {

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float round_to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// [codes] in the order of the row to [num_units, V, stride, 32], every vector at the given place among its `stride`.
template <class Kind, class T>
void interleave(const T* from, std::size_t num_units, std::size_t stride, T* to) {
  constexpr int V = Kind::V;
  for (std::size_t unit = 0; unit < num_units; ++unit, from += kVector * V, to += kVector * V * stride)
    for (int v = 0; v < V; ++v)
      for (std::size_t half = 0; half < 2; ++half)
        for (std::size_t j = 0; j < 16; ++j)
          to[v * stride * kVector + half * 16 + j] =
              from[Kind::has_scales ? v * kVector + half * 16 + j : (half * 16 + j) * V + v];
}

template <class T>
void interleave(Coding coding, const T* from, std::size_t num_units, std::size_t stride, T* to) {
  by_coding(coding, [&](auto kind) { interleave<decltype(kind)>(from, num_units, stride, to); });
}

// One block of a token in int8 limbs: its scale, scale times the sum of quotients, and the limbs [limbs, padded] of the
// row's order.
inline void write_limbs(const float* x, std::size_t codes, int limbs, std::size_t padded, std::int8_t* to, float* scale,
                        float* sum) {
  std::uint32_t max_abs_bits = 0;
  for (std::size_t i = 0; i < codes; ++i) {
    const std::uint32_t bits = bits_of(x[i]) & 0x7FFFFFFF;
    max_abs_bits = bits > max_abs_bits ? bits : max_abs_bits;
  }
  if (max_abs_bits >= 0x7F800000) {  // NaN or infinity makes the whole product NaN, by a scale that is NaN
    for (int limb = 0; limb < limbs; ++limb) std::memset(to + limb * padded, 0, codes);
    *scale = of_bits(0x7FC00000);
    *sum = 0;
    return;
  }
  const float absmax = of_bits(max_abs_bits);
  // Below this a quotient by it could overflow: such activations are zeros beside any others.
  const bool is_zero = absmax < 1e-30f;
  const float inverse = is_zero ? 0 : 127.0f / absmax;
  *scale = is_zero ? 0 : absmax / 127.0f;
  int sums[kMaxLimbs] = {};
  for (std::size_t start = 0; start < codes; start += 16) {
    float rest[16];
    for (int i = 0; i < 16; ++i) rest[i] = x[start + i] * inverse;
    for (int limb = 0; limb < limbs; ++limb) {
      int total = 0;
      for (int i = 0; i < 16; ++i) {
        float value = round_to_even(rest[i]);
        value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
        rest[i] = (rest[i] - value) * 255.0f;
        const int whole = static_cast<int>(value);
        total += whole;
        to[limb * padded + start + i] = static_cast<std::int8_t>(whole);
      }
      sums[limb] += total;
    }
  }
  float total = 0;
  for (int limb = 0; limb < kMaxLimbs; ++limb) total += static_cast<float>(sums[limb]) * kLimbScales[limb];
  *sum = *scale * total;
}

// The limbs of a token whose blocks are segments.
inline void pack_segments(const StoredMatrix& matrix, int limbs, const float* x, std::int8_t* to, float* scale,
                          float* sum) {
  const std::size_t unit_codes = matrix.layout.unit_codes;
  float part[256];
  std::int8_t in_order[kMaxLimbs * 256];
  for (Segment segment; segment.group < matrix.num_scales; segment.next(matrix), ++scale, ++sum) {
    const std::size_t unit_begin = segment.unit * unit_codes, group_begin = segment.group * matrix.group_size;
    const std::size_t unit_end = unit_begin + unit_codes, group_end = group_begin + matrix.group_size;
    const std::size_t begin = unit_begin > group_begin ? unit_begin : group_begin;
    const std::size_t end = unit_end < group_end ? unit_end : group_end;
    std::memset(part, 0, unit_codes * sizeof(float));
    std::memcpy(part + (begin - unit_begin), x + begin, (end - begin) * sizeof(float));
    write_limbs(part, unit_codes, limbs, unit_codes, in_order, scale, sum);
    for (int limb = 0; limb < limbs; ++limb)
      interleave(matrix.format.coding, in_order + limb * unit_codes, 1, limbs, to + limb * kVector);
    to += unit_codes * limbs;
  }
}

inline void pack_activations(const Product& product, int limbs, std::size_t begin, std::size_t end, float* scratch) {
  const StoredMatrix& matrix = product.matrix;
  const Layout& layout = matrix.layout;
  const std::size_t padded = layout.padded_cols(), cols = matrix.cols, blocks = layout.padded_blocks();
  const Coding coding = matrix.format.coding;
  for (std::size_t token = begin; token < end; ++token) {
    const float* x = product.x + token * cols;
    if (cols < padded || matrix.rotation.block) {
      std::memcpy(scratch, x, cols * sizeof(float));
      std::memset(scratch + cols, 0, (padded - cols) * sizeof(float));
      if (matrix.rotation.block) rotate(matrix.rotation, scratch, cols);
      x = scratch;
    }
    if (limbs == 0) {
      interleave(coding, x, layout.num_units, 1, product.x_values + token * padded);
      continue;
    }
    float* scale = product.x_scale + token * blocks;
    float* sum = product.x_sum + token * blocks;
    std::int8_t in_order[kMaxLimbs * 512];
    std::int8_t* to = product.x_limbs + token * layout.num_limb_units * layout.unit_codes * limbs;
    if (layout.kind == Blocks::segments) {
      pack_segments(matrix, limbs, x, to, scale, sum);
      for (std::size_t b = layout.num_blocks; b < blocks; ++b) scale[b] = sum[b] = 0;
      continue;
    }
    // A stretch of whole units and whole blocks at a time.
    const std::size_t stretch = layout.block_codes > layout.unit_codes ? layout.block_codes : layout.unit_codes;
    for (std::size_t start = 0; start < padded; start += stretch) {
      for (std::size_t at = 0; at < stretch; at += layout.block_codes, ++scale, ++sum)
        write_limbs(x + start + at, layout.block_codes, limbs, stretch, in_order + at, scale, sum);
      for (int limb = 0; limb < limbs; ++limb)
        interleave(coding, in_order + limb * stretch, stretch / layout.unit_codes, limbs,
                   to + start * limbs + limb * kVector);
    }
    for (std::size_t b = layout.num_blocks; b < blocks; ++b) *scale++ = 0, *sum++ = 0;
  }
}

}  // namespace
}  // namespace epic_quant
