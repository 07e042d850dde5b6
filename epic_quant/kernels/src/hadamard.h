// Rotating rows by signs and Sylvester's Hadamard matrix, block by block; compiled once for each instruction set. Rows
// are fp32, with memory up to a multiple of eight.
#pragma once

#include <math.h>

#include "eight.h"
#include "format.h"

namespace epic_quant {
namespace {

// The matrix, entries of 1, times each block: sums and differences of numbers 1, 2, 4 … apart.
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

inline void rotate(const Rotation& rotation, float* row, std::size_t cols) {
  for (std::size_t at = 0; at < cols; at += 8)
    (Eight::load(row + at) * load_first(rotation.signs + at, cols - at)).store(row + at);
  transform(row, cols, rotation.block);
}

inline void unrotate(const Rotation& rotation, float* row, std::size_t cols) {
  // The root of the block first, as above; the signs last.
  const float root = fabsf(rotation.signs[0]);
  for (std::size_t at = 0; at < cols; at += 8) (Eight::load(row + at) * Eight::of(root)).store(row + at);
  transform(row, cols, rotation.block);
  for (std::size_t at = 0; at < cols; ++at) row[at] = rotation.signs[at] < 0 ? -row[at] : row[at];
}

// `scratch` has cols + 16 floats.
inline void rotate_rows(const Rotation& rotation, bool inverse, std::size_t cols, const float* from, float* to,
                        std::size_t begin, std::size_t end, float* scratch) {
  std::memset(scratch, 0, (cols + 16) * sizeof(float));
  for (std::size_t at = begin; at < end; ++at) {
    std::memcpy(scratch, from + at * cols, cols * sizeof(float));
    (inverse ? unrotate : rotate)(rotation, scratch, cols);
    std::memcpy(to + at * cols, scratch, cols * sizeof(float));
  }
}

}  // namespace
}  // namespace epic_quant
