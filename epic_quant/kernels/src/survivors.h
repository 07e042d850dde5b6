// Paths through a trellis when the columns that follow make up for what rounding one loses (GPTQ). What a column's
// value should be then depends on the path, so that a search for one path to each state would compare unlike things.
// Instead the paths of least error so far survive, each with errors of its own: the M-algorithm (Anderson and Mohan,
// 1984) with per-survivor processing (Raheli et al., 1995). Compiled once for each instruction set. The torch code in
// epic_quant/quant/trellis.py says what is computed, and this gives its bits: products and sums are rounded one by one
// and in one order, and among equal errors the first survives.
#pragma once

#include "eight.h"
#include "format.h"

namespace epic_quant {
namespace {

// Errors that a survivor has of its own; those before are the same for all.
constexpr std::size_t kOwnErrors = 32;
constexpr std::uint32_t kBins = 256;

struct Survivors {
  float* errors;  // [most and seven more, kOwnErrors], that of a column at its number modulo kOwnErrors
  float* cost;    // [most], of the errors of all columns
  std::uint16_t* state;
  std::size_t count;
};

// Room that a search takes, and where its parts lie.
struct SurvivorScratch {
  Survivors now, next;
  float* candidate_cost;         // [candidates]
  float* left;                   // [most and seven more], of the column's weight
  std::uint32_t *bins, *picked;  // [kBins + 1, 4]; [most]
  float* columns;                // [cols], as errors that are the same for all have left them
  std::uint16_t *parent, *path;  // [cols, most]

  static std::size_t num_candidates(const CompensatedSearch& search) {
    const std::size_t first = std::size_t{1} << search.state_bits, others = search.most << search.bits;
    return first > others ? first : others;
  }
  static std::size_t nbytes(const CompensatedSearch& search) {
    const std::size_t most = search.most + 8, floats = 2 * most * (kOwnErrors + 2) + 2 * most + 4 * (kBins + 1);
    return (floats + num_candidates(search) + search.cols * (1 + search.most)) * sizeof(float);
  }
  SurvivorScratch(const CompensatedSearch& search, float* memory) {
    const auto take = [&](std::size_t floats) {
      float* const taken = memory;
      memory += floats;
      return taken;
    };
    const std::size_t most = search.most + 8;
    for (Survivors* one : {&now, &next}) {
      one->errors = take(most * kOwnErrors), one->cost = take(most), one->count = 0;
      one->state = reinterpret_cast<std::uint16_t*>(take(most));
      std::memset(one->errors, 0, most * kOwnErrors * sizeof(float));
    }
    left = take(most), picked = reinterpret_cast<std::uint32_t*>(take(most));
    bins = reinterpret_cast<std::uint32_t*>(take(4 * (kBins + 1)));
    candidate_cost = take(num_candidates(search));
    columns = take(search.cols);
    parent = reinterpret_cast<std::uint16_t*>(take(search.cols * search.most));
    path = parent + search.cols * search.most;
  }
};

// Which of `count` costs, at least 0, are the least, in their order: at most `most`, as whole bins of the range between
// the least and the largest, of which there are kBins at most in the order of their bits; or the first ones, where one
// bin has more. Costs of infinity are left out. `bins` is scratch. No branch depends on a cost, since nothing could
// predict it.
inline std::size_t pick_least(const float* costs, std::size_t count, std::size_t most, std::uint32_t* bins,
                              std::uint32_t* picked) {
  constexpr std::uint32_t kInfinite = 0x7F800000;
  std::uint32_t least = kInfinite, largest = 0, infinite = 0;
  EPIC_QUANT_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = bits_of(costs[i]), finite = bits == kInfinite ? 0 : bits;
    least = bits < least ? bits : least;
    largest = finite > largest ? finite : largest;
    infinite += bits == kInfinite;
  }
  std::uint32_t below = kInfinite;
  if (count - infinite > most) {
    int shift = 0;
    while ((largest - least) >> shift >= kBins) ++shift;
    std::memset(bins, 0, 4 * (kBins + 1) * sizeof *bins);
    // Four at a time count on their own, so that they need not wait for each other.
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t bin = (bits_of(costs[i]) - least) >> shift;  // that of infinity may be behind the others
      ++bins[4 * (bin < kBins ? bin : kBins) + i % 4];
    }
    std::uint32_t bin = 0;
    const auto in_bin = [&] { return bins[4 * bin] + bins[4 * bin + 1] + bins[4 * bin + 2] + bins[4 * bin + 3]; };
    for (std::size_t room = most; in_bin() <= room; ++bin) room -= in_bin();
    below = least + ((bin ? bin : 1) << shift);
  }
  std::size_t taken = 0;
  for (std::size_t i = 0; i < count && taken < most; ++i) {
    picked[taken] = static_cast<std::uint32_t>(i);
    taken += bits_of(costs[i]) < below;
  }
  if (!taken) picked[taken++] = 0;  // where none is finite any will do
  return taken;
}

// What errors of their own take of eight survivors' weights in a column.
EPIC_QUANT_INLINE Eight taken_of(const float* errors, const float* factors) {
  Eight sums[8];
  EPIC_QUANT_UNROLL for (std::size_t i = 0; i < 8; ++i, errors += kOwnErrors) {
    sums[i] = Eight::load(errors) * Eight::load(factors);
    EPIC_QUANT_UNROLL for (std::size_t at = 8; at < kOwnErrors; at += 8)
      sums[i] = sums[i] + Eight::load(errors + at) * Eight::load(factors + at);
  }
  return pairwise_sums(sums);
}

// The costs of what follows a survivor of some cost: an error more, where `left` of a weight becomes one of the values.
template <int Bits>
EPIC_QUANT_INLINE void follow(float before, float left, const float* values, float scale, float over, float* costs) {
  for (std::size_t i = 0; i < std::size_t{1} << Bits; ++i) {
    const float error = (left - values[i] * scale) * over;
    costs[i] = before + error * error;
  }
}

template <int Bits>
void find_compensated_path(const CompensatedSearch& search, std::size_t row, float* memory) {
  SurvivorScratch scratch(search, memory);
  constexpr std::size_t ahead = std::size_t{1} << Bits;
  const std::size_t cols = search.cols;
  const std::size_t num_states = std::size_t{1} << search.state_bits;
  const float* const scales = search.scales + row * cols;
  std::memcpy(scratch.columns, search.x + row * cols, cols * sizeof(float));
  std::uint16_t* parent = scratch.parent;
  std::uint16_t* path = scratch.path;
  for (std::size_t col = 0; col < cols; ++col, parent += search.most, path += search.most) {
    Survivors &now = scratch.now, &next = scratch.next;
    const float* const factors = search.own_factors + col * kOwnErrors;
    const float over = search.over_diagonal[col], scale = scales[col];
    if (col >= kOwnErrors) {
      // The error that leaves is that of the best survivor, and whatever has another one goes.
      std::size_t best = 0;
      for (std::size_t i = 1; i < now.count; ++i) best = now.cost[i] < now.cost[best] ? i : best;
      const float error = now.errors[best * kOwnErrors + col % kOwnErrors];
      const float* const of_error = search.factor + (col - kOwnErrors) * cols;
      for (std::size_t later = col; later < cols; ++later)
        scratch.columns[later] = scratch.columns[later] - of_error[later] * error;
      for (std::size_t i = 0; i < now.count; ++i)
        if (bits_of(now.errors[i * kOwnErrors + col % kOwnErrors]) != bits_of(error)) now.cost[i] = of_bits(0x7F800000);
    }
    // Zeros follow the symbols of a row: bits of the state that lie behind it.
    const std::size_t behind = search.ends ? col * search.bits + search.state_bits : 0;
    const std::size_t zeros = behind > cols * search.bits ? behind - cols * search.bits : 0;
    const std::size_t step = std::size_t{1} << (zeros < static_cast<std::size_t>(search.bits) ? zeros : search.bits);
    std::size_t count;
    const bool is_free = col == 0 && search.before[row] < 0;
    if (col == 0) {
      const std::size_t from = is_free ? 0 : (static_cast<std::size_t>(search.before[row]) << Bits) % num_states;
      count = is_free ? num_states : ahead;
      const std::size_t first_step = is_free ? std::size_t{1} << (zeros < 16 ? zeros : 16) : step;
      for (std::size_t i = 0; i < count; ++i) {
        const float error = (scratch.columns[0] - search.values[from + i] * scale) * over;
        scratch.candidate_cost[i] = i % first_step ? of_bits(0x7F800000) : error * error;
      }
    } else {
      count = now.count * ahead;
      for (std::size_t i = 0; i < now.count; i += 8)
        (Eight::of(scratch.columns[col]) - taken_of(now.errors + i * kOwnErrors, factors)).store(scratch.left + i);
      for (std::size_t i = 0; i < now.count; ++i) {
        float* const costs = scratch.candidate_cost + i * ahead;
        const float* const values = search.values + (static_cast<std::size_t>(now.state[i]) << Bits) % num_states;
        follow<Bits>(now.cost[i], scratch.left[i], values, scale, over, costs);
        for (std::size_t b = 0; step > 1 && b < ahead; ++b)
          if (b % step) costs[b] = of_bits(0x7F800000);
      }
    }
    next.count = pick_least(scratch.candidate_cost, count, search.most, scratch.bins, scratch.picked);
    for (std::size_t i = 0; i < next.count; ++i) {
      const std::size_t picked = scratch.picked[i], from = col == 0 ? 0 : picked >> Bits;
      float* const errors = next.errors + i * kOwnErrors;
      std::size_t state = picked;
      float left = scratch.columns[0];
      if (col == 0) {
        if (!is_free) state += (static_cast<std::size_t>(search.before[row]) << Bits) % num_states;
        std::memset(errors, 0, kOwnErrors * sizeof(float));
      } else {
        const float* const own = now.errors + from * kOwnErrors;
        left = scratch.left[from];
        std::memcpy(errors, own, kOwnErrors * sizeof(float));
        state = ((static_cast<std::size_t>(now.state[from]) << Bits) % num_states) + picked % ahead;
      }
      errors[col % kOwnErrors] = (left - search.values[state] * scale) * over;
      next.cost[i] = scratch.candidate_cost[picked];
      next.state[i] = path[i] = static_cast<std::uint16_t>(state);
      parent[i] = static_cast<std::uint16_t>(from);
    }
    const Survivors swapped = now;
    now = next, next = swapped;
  }
  std::size_t best = 0;
  for (std::size_t i = 1; i < scratch.now.count; ++i)
    best = scratch.now.cost[i] < scratch.now.cost[best] ? i : best;
  for (std::size_t col = cols; col-- > 0;) {
    parent -= search.most, path -= search.most;
    if (col < search.keep) search.states[row * search.keep + col] = path[best];
    best = parent[best];
  }
}

inline std::size_t compensated_nbytes(const CompensatedSearch& search) { return SurvivorScratch::nbytes(search); }

inline void find_compensated_paths(const CompensatedSearch& search, std::size_t begin, std::size_t end, float* scratch) {
  void (*find)(const CompensatedSearch&, std::size_t, float*) = search.bits == 1   ? find_compensated_path<1>
                                                                : search.bits == 2 ? find_compensated_path<2>
                                                                : search.bits == 3 ? find_compensated_path<3>
                                                                                   : find_compensated_path<4>;
  for (std::size_t row = begin; row < end; ++row) find(search, row, scratch);
}

}  // namespace
}  // namespace epic_quant
