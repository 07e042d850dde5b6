// Bindings of what works on rows; `epic_quant.kernels.quantizing` has checked shapes, dtypes and memory before.
#include "rows.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>

#include "module.h"

namespace nb = nanobind;

namespace epic_quant {
namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Scheme scheme_of(int rounding, float low, float high, float divisor, double gaussian_step, double peak_level,
                 bool either_sign, int packed_bits, const std::vector<float>& levels,
                 const std::vector<float>& thresholds) {
  Scheme scheme{};
  scheme.rounding = static_cast<Rounding>(rounding);
  scheme.low = low, scheme.high = high;
  scheme.least_squares = divisor == 0, scheme.divisor = divisor;
  scheme.gaussian_step = gaussian_step, scheme.peak_level = peak_level, scheme.either_sign = either_sign;
  scheme.packed_bits = packed_bits;
  std::copy(levels.begin(), levels.end(), scheme.levels);
  std::copy(thresholds.begin(), thresholds.end(), scheme.thresholds);
  while (std::size_t{1} << scheme.table_bits < levels.size()) ++scheme.table_bits;
  return scheme;
}

std::ptrdiff_t quantize_at(const std::string& isa, const Scheme& scheme, std::size_t group_size, std::size_t block,
                           std::uintptr_t signs, std::size_t rows, std::size_t cols, int element, std::uintptr_t weight,
                           std::uintptr_t packed, std::uintptr_t scale, int num_threads) {
  const Quantize job{&scheme, {block, at<float>(signs)}, rows, cols, group_size, static_cast<Element>(element),
                     at<void>(weight), at<std::uint8_t>(packed), at<std::uint16_t>(scale)};
  const Table& table = table_of(isa);
  nb::gil_scoped_release release;
  return static_cast<std::ptrdiff_t>(quantize(table, job, num_threads));
}

void dequantize_at(const std::string& isa, const Scheme& scheme, std::size_t group_size, std::size_t block,
                   std::uintptr_t signs, std::size_t rows, std::size_t cols, int element, std::uintptr_t weight,
                   std::uintptr_t packed, std::uintptr_t scale, int num_threads) {
  const Dequantize job{&scheme, {block, at<float>(signs)}, rows, cols, group_size, static_cast<Element>(element),
                       at<void>(weight), at<std::uint8_t>(packed), at<std::uint16_t>(scale)};
  const Table& table = table_of(isa);
  nb::gil_scoped_release release;
  dequantize(table, job, num_threads);
}

void turn_at(const std::string& isa, std::size_t block, std::uintptr_t signs, bool back, std::size_t rows,
             std::size_t cols, std::uintptr_t from, std::uintptr_t to, int num_threads) {
  const TurnRows job{{block, at<float>(signs)}, back, rows, cols, at<float>(from), at<float>(to)};
  const Table& table = table_of(isa);
  nb::gil_scoped_release release;
  turn(table, job, num_threads);
}

}  // namespace

void bind_rows(nb::module_& module) {
  nb::class_<Scheme>(module, "Scheme").def(nb::new_(&scheme_of));
  module.def("quantize", &quantize_at);
  module.def("dequantize", &dequantize_at);
  module.def("turn", &turn_at);
}

}  // namespace epic_quant
