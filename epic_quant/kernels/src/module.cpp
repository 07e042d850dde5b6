// Bindings only. Addresses come as integers: `epic_quant.kernels` has checked shapes, dtypes and memory before.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "matrix.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace epic_quant;

namespace {

// Fastest first.
const Isa* const kIsas[] = {
#ifdef EPIC_QUANT_X86
    &avx512vnni_isa, &avx2_isa,
#endif
    &portable_isa,
};

nb::list isas() {
  nb::list names;
  for (const Isa* isa : kIsas)
    if (isa->runs_here()) names.append(isa->name);
  return names;
}

const Isa& isa_of(const std::string& name) {
  for (const Isa* isa : kIsas)
    if (name == isa->name && isa->runs_here()) return *isa;
  throw std::invalid_argument("no kernels for '" + name + "'");
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Format format_of(const std::string& coding, const std::vector<int>& levels, int rounding, float divisor,
                 double gaussian_step, double peak_level, bool either_sign, int state_bits, unsigned multiplier) {
  return make_format(coding, levels, static_cast<Rounding>(rounding), divisor, gaussian_step, peak_level, either_sign,
                     state_bits, multiplier);
}

StoredMatrix matrix_of(const std::string& isa, const Format& format, std::size_t block, std::uintptr_t signs,
                       std::size_t rows, std::size_t cols, std::size_t num_scales, std::uintptr_t packed,
                       std::uintptr_t scale) {
  return make_matrix(isa_of(isa), format, {block, at<float>(signs)}, rows, cols, num_scales, at<std::uint8_t>(packed),
                     at<std::uint16_t>(scale));
}

}  // namespace

NB_MODULE(_native, module) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;

  module.def("isas", &isas, "The instruction sets that there are kernels for and this machine has, fastest first.");
  module.def("threads_of", &threads_of);
  module.def("sum_of_words", [](std::uintptr_t words, std::size_t count, int num_threads) {
    return sum_of_words(at<std::uint64_t>(words), count, num_threads);
  }, Unlocked());

  nb::class_<Format>(module, "Format")
      .def(nb::new_(&format_of), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg("state_bits") = 0, nb::arg("multiplier") = 0)
      .def_prop_ro("block_cols", [](const Format& format) {
        return row_of(format.coding).group_codes ? row_of(format.coding).unit_codes() : 0;
      })
      .def_prop_ro("group_cols", [](const Format& format) { return row_of(format.coding).group_codes; })
      .def("row_nbytes", [](const Format& format, std::size_t cols) { return row_nbytes(format.coding, cols); });

  nb::class_<StoredMatrix>(module, "Matrix")
      .def(nb::new_(&matrix_of))
      .def_prop_ro("has_matmul", &StoredMatrix::has_products)
      .def("matmul", [](const StoredMatrix& matrix, std::uintptr_t x, std::size_t tokens, std::uintptr_t out, bool int8,
                        int num_threads) {
        matmul(matrix, at<float>(x), tokens, at<float>(out), int8 ? Activations::int8 : Activations::fp32, num_threads);
      }, Unlocked())
      .def("quantize", [](const StoredMatrix& matrix, int element, std::uintptr_t weight, int num_threads) {
        return static_cast<std::ptrdiff_t>(
            quantize(matrix, static_cast<Element>(element), at<void>(weight), num_threads));
      }, Unlocked())
      .def("dequantize", [](const StoredMatrix& matrix, int element, std::uintptr_t weight, bool rotated,
                            int num_threads) {
        dequantize(matrix, static_cast<Element>(element), at<void>(weight), rotated, num_threads);
      }, Unlocked());

  module.def("find_paths", [](const std::string& isa, int bits, int state_bits, std::uintptr_t values, std::uintptr_t x,
                              std::size_t rows, std::size_t cols, std::uintptr_t before, bool ends, std::size_t keep,
                              std::uintptr_t states, int num_threads) {
    find_paths(isa_of(isa), {at<std::int16_t>(x), cols, at<std::int16_t>(values), bits, state_bits,
                             at<std::int32_t>(before), ends, keep, at<std::uint16_t>(states)}, rows, num_threads);
  }, Unlocked());

  module.def("find_compensated_paths", [](const std::string& isa, int bits, int state_bits, std::uintptr_t values,
                                          std::uintptr_t x, std::uintptr_t scales, std::size_t rows, std::size_t cols,
                                          std::uintptr_t factor, std::uintptr_t own_factors,
                                          std::uintptr_t over_diagonal, std::uintptr_t before, bool ends,
                                          std::size_t most, std::size_t keep, std::uintptr_t states, int num_threads) {
    find_compensated_paths(isa_of(isa), {at<float>(x), at<float>(scales), cols, at<float>(factor),
                                         at<float>(own_factors), at<float>(over_diagonal), at<float>(values), bits,
                                         state_bits, at<std::int32_t>(before), ends, most, keep,
                                         at<std::uint16_t>(states)}, rows, num_threads);
  }, Unlocked());

  module.def("rotate", [](const std::string& isa, std::size_t block, std::uintptr_t signs, bool inverse,
                          std::size_t rows, std::size_t cols, std::uintptr_t from, std::uintptr_t to,
                          int num_threads) {
    rotate(isa_of(isa), {block, at<float>(signs)}, inverse, rows, cols, at<float>(from), at<float>(to), num_threads);
  }, Unlocked());
}
