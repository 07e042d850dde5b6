// What the files that bind share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "table.h"

namespace epic_quant {

// The kernels of an instruction set; throws std::invalid_argument where this machine has none.
const Table& table_of(const std::string& isa);

void bind_rows(nanobind::module_& module);

}  // namespace epic_quant
