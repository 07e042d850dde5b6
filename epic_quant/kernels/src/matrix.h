// What is done with a stored matrix, shared among threads.
#pragma once

#include <string>
#include <vector>

#include "format.h"

namespace epic_quant {

// A format of codes from 0 on that stand for `levels`, ascending whole numbers; a trellis has instead 16 for the upper
// half of an index and 16 for the lower, state bits and a multiplier. Throws std::invalid_argument for an unknown coding,
// and for what no kernel has.
Format make_format(const std::string& coding, const std::vector<int>& levels, Rounding rounding, float divisor,
                   double gaussian_step, double peak_level, bool either_sign, int state_bits, unsigned multiplier);

// A matrix in memory that somebody else keeps, with all that kernels need to know of it.
StoredMatrix make_matrix(const Isa& isa, const Format& format, Rotation rotation, std::size_t rows, std::size_t cols,
                         std::size_t num_scales, std::uint8_t* packed, std::uint16_t* scale);

enum class Activations { fp32, int8 };

// out [tokens, rows] = x [tokens, cols] times the matrix transposed, which must have products. The numbers in x may be
// any.
void matmul(const StoredMatrix& matrix, const float* x, std::size_t tokens, float* out, Activations activations,
            int num_threads);

// Writes what is stored of `weight` [rows, cols]; gives back the first row with a number that is not finite, or
// kAllFinite.
std::size_t quantize(const StoredMatrix& matrix, Element element, const void* weight, int num_threads);

// The inverse; `rotated` leaves the rows as they are stored.
void dequantize(const StoredMatrix& matrix, Element element, void* weight, bool rotated, int num_threads);

// A search in that many rows.
void find_paths(const Isa& isa, const PathSearch& search, std::size_t rows, int num_threads);
void find_compensated_paths(const Isa& isa, const CompensatedSearch& search, std::size_t rows, int num_threads);

// Rows of [rows, cols] rotated, or rotated back.
void rotate(const Isa& isa, const Rotation& rotation, bool inverse, std::size_t rows, std::size_t cols,
            const float* from, float* to, int num_threads);

}  // namespace epic_quant
