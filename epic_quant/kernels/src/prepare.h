// Activations laid out for the kernels; compiled once for each instruction set.
#pragma once

#include <cstring>

#include "linear.h"

namespace epic_quant {
namespace {

inline std::size_t padded_blocks(const Plan& plan) { return (plan.num_blocks + 7) / 8 * 8; }

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float round_to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// [codes] in the order of the row to [num_units, V, stride, 32], every vector at the given place among its `stride`.
template <int V, class T>
void interleave(const T* from, std::size_t num_units, std::size_t stride, T* to) {
  for (std::size_t unit = 0; unit < num_units; ++unit, from += kVector * V, to += kVector * V * stride)
    for (int v = 0; v < V; ++v)
      for (std::size_t half = 0; half < 2; ++half)
        for (std::size_t j = 0; j < 16; ++j)
          to[v * stride * kVector + half * 16 + j] = from[(half * 16 + j) * V + v];
}

template <class T>
void interleave(Coding coding, const T* from, std::size_t num_units, std::size_t stride, T* to) {
  switch (coding) {
    case Coding::bits2: return interleave<4>(from, num_units, stride, to);
    case Coding::bits3: return interleave<8>(from, num_units, stride, to);
    case Coding::bits4: return interleave<2>(from, num_units, stride, to);
    case Coding::bits8: return interleave<1>(from, num_units, stride, to);
    case Coding::trits: return interleave<5>(from, num_units, stride, to);
  }
}

// One block of a token in `digits` digits a number: its scale, scale times the sum of quotients, and the digits
// [digits, padded] of the row's order.
inline void write_digits(const float* x, std::size_t codes, int digits, std::size_t padded, std::int8_t* to, float* scale,
                  float* sum) {
  // Magnitudes compare as their bits do, and so NaN is the largest of all.
  std::uint32_t top = 0;
  for (std::size_t i = 0; i < codes; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    top = bits > top ? bits : top;
  }
  float absmax;
  std::memcpy(&absmax, &top, sizeof absmax);
  if (top >= 0x7F800000) {  // NaN or infinity makes the whole product NaN, by a scale that is NaN
    for (int d = 0; d < digits; ++d) std::memset(to + d * padded, 0, codes);
    const std::uint32_t nan = 0x7FC00000;
    std::memcpy(scale, &nan, sizeof nan);
    *sum = 0;
    return;
  }
  // Below this a quotient by it could overflow: such activations are zeros beside any others.
  const bool is_zero = absmax < 1e-30f;
  const float inverse = is_zero ? 0 : 127.0f / absmax;
  *scale = is_zero ? 0 : absmax / 127.0f;
  const float most = 127.0f;
  int sums[kMostDigits] = {};
  for (std::size_t start = 0; start < codes; start += 16) {
    float rest[16];
    for (int i = 0; i < 16; ++i) rest[i] = x[start + i] * inverse;
    for (int d = 0; d < digits; ++d) {
      int total = 0;
      for (int i = 0; i < 16; ++i) {
        float digit = round_to_even(rest[i]);
        digit = digit > most ? most : digit < -most ? -most : digit;
        rest[i] = (rest[i] - digit) * 255.0f;
        const int whole = static_cast<int>(digit);
        total += whole;
        to[d * padded + start + i] = static_cast<std::int8_t>(whole);
      }
      sums[d] += total;
    }
  }
  *sum = *scale * (static_cast<float>(sums[0]) + static_cast<float>(sums[1]) * (1.0f / 255) +
                   static_cast<float>(sums[2]) * (1.0f / 65025));
}

// Lays out the digits of a token whose blocks are segments.
inline void prepare_segments(const Linear& job, int digits, const float* x, std::int8_t* to, float* scale, float* sum) {
  const Plan& plan = job.plan;
  float part[256];
  std::int8_t in_order[kMostDigits * 256];
  for (Segment segment; segment.group < job.weights.num_scales; segment.next(plan), ++scale, ++sum) {
    const std::size_t unit_begin = segment.unit * plan.unit_codes, group_begin = segment.group * plan.group_size;
    const std::size_t unit_end = unit_begin + plan.unit_codes, group_end = group_begin + plan.group_size;
    const std::size_t begin = unit_begin > group_begin ? unit_begin : group_begin;
    const std::size_t end = unit_end < group_end ? unit_end : group_end;
    std::memset(part, 0, plan.unit_codes * sizeof(float));
    std::memcpy(part + (begin - unit_begin), x + begin, (end - begin) * sizeof(float));
    write_digits(part, plan.unit_codes, digits, plan.unit_codes, in_order, scale, sum);
    for (int d = 0; d < digits; ++d)
      interleave(job.weights.coding, in_order + d * plan.unit_codes, 1, digits, to + d * kVector);
    to += plan.unit_codes * digits;
  }
}

inline void prepare(const Linear& job, int digits, std::size_t begin, std::size_t end, float* scratch) {
  const Plan& plan = job.plan;
  const std::size_t padded = plan.num_units * plan.unit_codes, cols = job.weights.cols;
  const std::size_t blocks = padded_blocks(plan);
  for (std::size_t token = begin; token < end; ++token) {
    const float* x = job.x + token * cols;
    if (cols < padded) {
      std::memcpy(scratch, x, cols * sizeof(float));
      std::memset(scratch + cols, 0, (padded - cols) * sizeof(float));
      x = scratch;
    }
    if (digits == 0) {
      interleave(job.weights.coding, x, plan.num_units, 1, job.x_values + token * padded);
      continue;
    }
    float* scale = job.x_scale + token * blocks;
    float* sum = job.x_sum + token * blocks;
    std::int8_t in_order[kMostDigits * 512];
    std::int8_t* to = job.x_digits + token * plan.num_digit_units * plan.unit_codes * digits;
    if (plan.kind == Blocks::segments) {
      prepare_segments(job, digits, x, to, scale, sum);
      for (std::size_t b = plan.num_blocks; b < blocks; ++b) scale[b] = sum[b] = 0;
      continue;
    }
    // A stretch of whole units and whole blocks at a time.
    const std::size_t stretch = plan.block_codes > plan.unit_codes ? plan.block_codes : plan.unit_codes;
    for (std::size_t start = 0; start < padded; start += stretch) {
      for (std::size_t at = 0; at < stretch; at += plan.block_codes, ++scale, ++sum)
        write_digits(x + start + at, plan.block_codes, digits, stretch, in_order + at, scale, sum);
      for (int d = 0; d < digits; ++d)
        interleave(job.weights.coding, in_order + d * stretch, stretch / plan.unit_codes, digits,
                   to + start * digits + d * kVector);
    }
    for (std::size_t b = plan.num_blocks; b < blocks; ++b) *scale++ = 0, *sum++ = 0;
  }
}

}  // namespace
}  // namespace epic_quant
