// Bindings only. Addresses come as integers: `epic_quant.kernels` has checked shapes, dtypes and memory before.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "linear.h"
#include "module.h"
#include "parallel.h"
#include "table.h"

namespace nb = nanobind;
using namespace epic_quant;

namespace {

// Fastest first.
const Table* const tables[] = {
#ifdef EPIC_QUANT_X86
    &avx512vnni_table, &avx2_table,
#endif
    &portable_table,
};

nb::list isas() {
  nb::list names;
  for (const Table* table : tables)
    if (table->runs_here()) names.append(table->name);
  return names;
}

}  // namespace

const Table& epic_quant::table_of(const std::string& isa) {
  for (const Table* table : tables)
    if (isa == table->name && table->runs_here()) return *table;
  throw std::invalid_argument("no kernels for " + isa);
}

namespace {

// A matrix whose memory somebody else keeps.
struct Matrix {
  const Table* table;
  Weights weights;

  Matrix(const std::string& isa, std::uintptr_t packed, std::uintptr_t scale, std::size_t rows, std::size_t cols,
         std::size_t row_nbytes, std::size_t num_scales, int coding, int zero, nb::bytes levels)
      : table(&table_of(isa)), weights{} {
    weights.packed = reinterpret_cast<const std::uint8_t*>(packed);
    weights.scale = reinterpret_cast<const std::uint16_t*>(scale);
    weights.rows = rows;
    weights.cols = cols;
    weights.row_nbytes = row_nbytes;
    weights.num_scales = num_scales;
    weights.coding = static_cast<Coding>(coding);
    weights.zero = zero;
    weights.has_levels = levels.size() > 0;
    std::memcpy(weights.levels, levels.c_str(), levels.size() < 16 ? levels.size() : 16);
  }

  void linear(std::uintptr_t x, std::size_t tokens, std::uintptr_t out, bool int8, int num_threads) const {
    nb::gil_scoped_release release;
    epic_quant::linear(*table, weights, reinterpret_cast<const float*>(x), tokens, reinterpret_cast<float*>(out),
                       int8 ? Activations::int8 : Activations::fp32, num_threads);
  }
};

}  // namespace

NB_MODULE(_native, module) {
  module.def("isas", &isas, "The instruction sets that there are kernels for and this machine has, fastest first.");
  module.def("threads_of", &threads_of);
  module.def("sum_of_words", [](std::uintptr_t words, std::size_t count, int num_threads) {
    nb::gil_scoped_release release;
    return sum_of_words(reinterpret_cast<const std::uint64_t*>(words), count, num_threads);
  });
  nb::class_<Matrix>(module, "Matrix")
      .def(nb::init<const std::string&, std::uintptr_t, std::uintptr_t, std::size_t, std::size_t, std::size_t,
                    std::size_t, int, int, nb::bytes>())
      .def("linear", &Matrix::linear);
  bind_rows(module);
}
