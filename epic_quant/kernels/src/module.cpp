// Bindings only. Addresses come as integers: `epic_quant.kernels` has checked shapes, dtypes and memory before.
#include <nanobind/nanobind.h>

#include "parallel.h"
#include "table.h"

namespace nb = nanobind;
using namespace epic_quant;

namespace {

// Fastest first.
const Table* const tables[] = {
#ifdef EPIC_QUANT_X86
    &avx2_table,
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

NB_MODULE(_native, module) {
  module.def("isas", &isas, "The instruction sets that there are kernels for and this machine has, fastest first.");
  module.def("threads_of", &threads_of);
}
