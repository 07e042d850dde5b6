// The path through a trellis whose values are nearest to a row: Viterbi (1967). Compiled once for each instruction set.
// The torch code in epic_quant/quant/trellis.py says what is computed, and this gives its bits: costs are whole numbers,
// and among equal ones the first state wins.
#pragma once

#include "format.h"
#include "words.h"

namespace epic_quant {
namespace {

// The cost of a state that no path leads to. Other costs are capped below it, far above what a good path costs.
constexpr unsigned kNoPath = 0xFFFF, kMostCost = kNoPath - 1 - (1 << 14);

// With more bits distances are smaller, so that twice of them, and four times the cost, is exact enough and does not
// saturate where it matters.
template <int Bits>
constexpr bool kTwice = Bits > 2;

// One column: `costs` of the paths that end in each state become those one weight further. States that share all but
// their highest symbol are followed by the same ones, so the best of them, and which it was, is found once for all of
// these: `best` has it for every 2 W of them, of which the first W are even bytes and the others odd ones. Costs are
// counted from `base` on, which no path is below; gives back what none is below in the next column.
template <int Bits>
unsigned advance(const std::uint16_t* costs, const std::int16_t* values, std::int16_t x, std::size_t num_states,
                 unsigned base, std::uint16_t* next, std::uint8_t* best) {
  constexpr std::size_t kAhead = std::size_t{1} << Bits, W = Words::size;
  const std::size_t ends = num_states >> Bits;
  const Words at = Words::fill(static_cast<std::uint16_t>(x)), no_path = Words::fill(kNoPath);
  Words lowest = no_path;
  std::uint16_t least[2 * W + 8];
  for (std::size_t end = 0; end < ends; end += 2 * W) {
    Words which[2];
    EPIC_QUANT_UNROLL for (std::size_t half = 0; half < 2; ++half) {
      Words own = Words::load(costs + end + half * W);
      which[half] = Words::fill(0);
      EPIC_QUANT_UNROLL for (unsigned i = 1; i < kAhead; ++i) {
        const Words before = own;
        own = smaller(own, Words::load(costs + i * ends + end + half * W));
        which[half] = select(equal(own, before), which[half], Words::fill(i));
      }
      lowest = smaller(lowest, own);
      const Words counted = smaller(minus(own, Words::fill(base)), Words::fill(kMostCost));
      (counted | equal(own, no_path)).store(least + half * W);
    }
    (which[0] | which[1].up8()).store(best + end);
    const std::int16_t* const of_next = values + (end << Bits);
    EPIC_QUANT_UNROLL for (std::size_t i = 0; i < 2 * kAhead; ++i) {
      const Words error = at.template squared_difference<kTwice<Bits>>(Words::load(of_next + i * W));
      plus(Words::load_repeated<Bits>(least + (i * W >> Bits)), error).store(next + (end << Bits) + i * W);
    }
  }
  return least_of(lowest) - base;
}

// Row `row` of a search, with scratch of that many bytes.
template <int Bits>
void find_path(const PathSearch& search, std::size_t row, std::uint16_t* scratch) {
  constexpr std::size_t W = Words::size;
  const std::size_t num_states = std::size_t{1} << search.state_bits, ends = num_states >> Bits;
  const std::int16_t* const x = search.x + row * search.cols;
  std::uint16_t *costs = scratch, *next = scratch + num_states;
  std::uint8_t* const best = reinterpret_cast<std::uint8_t*>(next + num_states);
  std::size_t first = 0, last = num_states;
  if (search.before[row] >= 0) {
    first = (static_cast<std::size_t>(search.before[row]) << Bits) % num_states;
    last = first + (std::size_t{1} << Bits);
  }
  const Words at = Words::fill(static_cast<std::uint16_t>(x[0]));
  for (std::size_t state = 0; state < num_states; state += W)
    at.template squared_difference<kTwice<Bits>>(Words::load(search.values + state)).store(costs + state);
  for (std::size_t state = 0; state < num_states; ++state)
    if (state < first || state >= last) costs[state] = kNoPath;
  unsigned base = 0;
  for (std::size_t col = 1; col < search.cols; ++col) {
    base = advance<Bits>(costs, search.values, x[col], num_states, base, next, best + col * ends);
    std::uint16_t* const swapped = costs;
    costs = next, next = swapped;
  }
  // A row ends with a state whose lower bits, which would belong to weights behind it, are zeros.
  std::size_t state = 0;
  const std::size_t step = search.ends ? ends : 1;
  for (std::size_t other = step; other < num_states; other += step)
    if (costs[other] < costs[state]) state = other;
  for (std::size_t col = search.cols; col-- > 0;) {
    if (col < search.keep) search.states[row * search.keep + col] = static_cast<std::uint16_t>(state);
    const std::size_t end = state >> Bits, half = end / W % 2;
    if (col) state = best[col * ends + (end - end % (2 * W)) + 2 * (end % W) + half] * ends + end;
  }
}

inline void find_paths(const PathSearch& search, std::size_t begin, std::size_t end, std::uint16_t* scratch) {
  void (*find)(const PathSearch&, std::size_t, std::uint16_t*) = search.bits == 1   ? find_path<1>
                                                                 : search.bits == 2 ? find_path<2>
                                                                 : search.bits == 3 ? find_path<3>
                                                                                    : find_path<4>;
  for (std::size_t row = begin; row < end; ++row) find(search, row, scratch);
}

}  // namespace
}  // namespace epic_quant
