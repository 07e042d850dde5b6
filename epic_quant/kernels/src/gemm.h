// What products with a stored matrix have in common on every instruction set, and those in fp32.
#pragma once

#include "activations.h"
#include "codes.h"
#include "eight.h"
#include "format.h"

namespace epic_quant {
namespace {

// The row's scales [num_scales] from fp16, each for the blocks that it serves, and zeros for blocks behind the row.
inline void expand_scales(const StoredMatrix& matrix, std::size_t row, float* to) {
  const Layout& layout = matrix.layout;
  const std::uint16_t* from = matrix.scale + row * matrix.num_scales;
  const std::size_t blocks = layout.padded_blocks();
  if (matrix.num_scales == 1) {
    const Eight all = Eight::of(from_fp16(*from));
    for (std::size_t b = 0; b < blocks; b += 8) all.store(to + b);
    return;
  }
  std::size_t b = 0;
  if (layout.kind == Blocks::segments) {
    for (Segment segment; segment.group < matrix.num_scales; segment.next(matrix))
      to[b++] = from_fp16(from[segment.group]);
    for (; b < blocks; ++b) to[b] = 0;
    return;
  }
  const std::size_t each = matrix.group_size / layout.block_codes, used = matrix.num_scales * each;
  if (each == 1) {
    for (; b + 8 <= used; b += 8) Eight::load_fp16(from + b).store(to + b);
    for (; b < used; ++b) to[b] = from_fp16(from[b]);
  } else {
    for (std::size_t scale = 0; scale < matrix.num_scales; ++scale)
      for (std::size_t i = 0; i < each; ++i) to[b++] = from_fp16(from[scale]);
  }
  for (; b < blocks; ++b) to[b] = 0;
}

// The same wherever scales lie, and minima where the coding has them.
template <class Kind>
EPIC_QUANT_INLINE void expand_scales(const StoredMatrix& matrix, std::size_t row, float* to, float* minima) {
  const Layout& layout = matrix.layout;
  if constexpr (Kind::has_scales) {
    constexpr std::size_t kGroups = Kind::V * kVector / Kind::group_codes;
    const std::uint8_t* unit = matrix.packed + row * matrix.row_nbytes;
    for (std::size_t b = 0; b < layout.num_blocks; b += kGroups, unit += Kind::unit_nbytes)
      Codes<Kind::coding>::scales(unit, to + b, minima + b);
    for (std::size_t b = layout.num_blocks; b < layout.padded_blocks(); ++b) {
      to[b] = 0;
      if (Kind::has_minima) minima[b] = 0;
    }
  } else {
    expand_scales(matrix, row, to);
  }
}

// Rows of which several are decoded at a time: a row's index, which repeats the last one behind the end, whose products
// are dropped.
struct Rows {
  std::size_t first, count;

  Rows(std::size_t first, std::size_t end, std::size_t most)
      : first(first), count(end - first < most ? end - first : most) {}
  std::size_t operator[](std::size_t r) const { return first + (r < count ? r : count - 1); }
};

// The weights of one unit in fp32, exactly as (code - zero) * scale, level * scale or code * scale - minimum.
template <class Kind, class B>
EPIC_QUANT_INLINE void decode_fp32(const Layout& layout, const Levels<B>& levels, const std::uint8_t* packed,
                                   std::size_t unit, const float* scales, const float* minima,
                                   const std::int32_t* groups, float* to) {
  alignas(32) std::int8_t values[Kind::V * kVector];
  decode_unit<Kind>(packed, levels, values, [&](B codes) EPIC_QUANT_INLINE_LAMBDA {
    return levels.template value<Kind>(codes);
  });
  if constexpr (Kind::has_scales) {
    for (int at = 0; at < Kind::V * static_cast<int>(kVector); at += 8) {
      const std::size_t block = (unit * Kind::V * kVector + at) / Kind::group_codes;
      const Eight weights = Eight::load_int8(values + at) * Eight::of(scales[block]);
      (Kind::has_minima ? weights - Eight::of(minima[block]) : weights).store(to + at);
    }
    return;
  }
  const bool halves = layout.kind == Blocks::halves, segments = layout.kind == Blocks::segments;
  const Eight low = Eight::of(segments ? 0 : scales[halves ? 2 * unit : unit / layout.block_units]);
  const Eight high = halves ? Eight::of(scales[2 * unit + 1]) : low;
  for (int at = 0; at < Kind::V * static_cast<int>(kVector); at += 8) {
    const Eight scale = segments ? Eight::gather(scales, groups + at) : at & 16 ? high : low;
    (Eight::load_int8(values + at) * scale).store(to + at);
  }
}

// Any number of tokens in fp32. Tiles of Tile::rows rows are decoded for as many as Tile::tokens tokens, and R of those
// rows by T of those tokens go through Tile::multiply<T> at once, which adds products of a tile's codes to sums
// [rows][Tile::tokens][8].
template <class Kind, class B, class Tile>
void gemm_fp32(const Product& product, std::size_t begin, std::size_t end, void* scratch) {
  constexpr std::size_t kRows = Tile::rows, kTokens = Tile::tokens;
  constexpr int R = Tile::R, T = Tile::T;
  static_assert(kRows <= kMaxTileRows && kRows % R == 0 && kRows * kTokens <= kMaxTileSums, "scratch is for no more");
  constexpr std::size_t kUnitCodes = Kind::V * kVector;
  constexpr std::size_t kTileUnits = kTileCodes / kUnitCodes ? kTileCodes / kUnitCodes : 1;
  const StoredMatrix& matrix = product.matrix;
  const Layout& layout = matrix.layout;
  const Levels<B> levels(matrix.format);
  const std::size_t padded = layout.padded_cols();
  const bool segments = layout.kind == Blocks::segments;
  const std::size_t scale_stride = segments ? matrix.num_scales : layout.padded_blocks();
  // The group of every code of a tile, where those of a unit differ; the last one's behind the row.
  std::int32_t groups[kTileUnits * kUnitCodes];
  float* scales = static_cast<float*>(scratch);
  float* minima = scales + kRows * ((scale_stride + 15) / 16 * 16);
  float* tile = Kind::has_minima ? minima + (minima - scales) : minima;
  float* sums = tile + kRows * kTileUnits * kUnitCodes;
  for (std::size_t first = begin; first < end; first += kRows) {
    const Rows rows(first, end, kRows);
    for (std::size_t r = 0; r < kRows; ++r) {
      if (segments)
        for (std::size_t s = 0; s < matrix.num_scales; ++s)
          scales[r * scale_stride + s] = from_fp16(matrix.scale[rows[r] * matrix.num_scales + s]);
      else
        expand_scales<Kind>(matrix, rows[r], scales + r * scale_stride, minima + r * scale_stride);
    }
    for (std::size_t token = 0; token < product.tokens; token += kTokens) {
      const std::size_t tokens = product.tokens - token < kTokens ? product.tokens - token : kTokens;
      for (std::size_t r = 0; r < kRows; ++r) std::memset(sums + r * kTokens * 8, 0, tokens * 8 * sizeof(float));
      for (std::size_t unit = 0; unit < layout.num_units; unit += kTileUnits) {
        const std::size_t units = layout.num_units - unit < kTileUnits ? layout.num_units - unit : kTileUnits;
        const std::size_t codes = units * kUnitCodes;
        for (std::size_t at = 0; segments && at < codes; ++at) {
          const std::size_t within = at % kUnitCodes;
          const std::size_t in_order = unit * kUnitCodes + at - within + within % kVector * Kind::V + within / kVector;
          const std::size_t last = matrix.num_scales - 1, group = in_order / matrix.group_size;
          groups[at] = static_cast<std::int32_t>(group < last ? group : last);
        }
        for (std::size_t r = 0; r < kRows; ++r) {
          const Row<Kind> packed(matrix, rows[r]);
          for (std::size_t u = 0; u < units; ++u) {
            const std::uint8_t* own = packed.unit(unit + u);
            // The next rows' bytes come from memory while these are multiplied.
            for (int line = 0; line < Kind::unit_nbytes && token == 0; line += 64)
              EPIC_QUANT_PREFETCH(own + kRows * matrix.row_nbytes + line);
            decode_fp32<Kind>(layout, levels, own, unit + u, scales + r * scale_stride, minima + r * scale_stride,
                              groups + u * kUnitCodes, tile + r * codes + u * kUnitCodes);
          }
        }
        const float* x = product.x_values + token * padded + unit * kUnitCodes;
        std::size_t t = 0;
        for (; t + T <= tokens; t += T)
          for (std::size_t r = 0; r < rows.count; r += R)
            Tile::template multiply<T>(tile + r * codes, codes, x + t * padded, padded, sums + (r * kTokens + t) * 8);
        for (; t < tokens; ++t)
          for (std::size_t r = 0; r < rows.count; r += R)
            Tile::template multiply<1>(tile + r * codes, codes, x + t * padded, padded, sums + (r * kTokens + t) * 8);
      }
      for (std::size_t r = 0; r < rows.count; ++r)
        for (std::size_t t = 0; t < tokens; ++t)
          product.out[(token + t) * matrix.rows + first + r] = Eight::load(sums + (r * kTokens + t) * 8).sum();
    }
  }
}

}  // namespace
}  // namespace epic_quant
