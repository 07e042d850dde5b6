// One table of kernels by instruction set: another instruction set is another file that fills a table.
#pragma once

namespace epic_quant {

struct Table {
  const char* name;
  // Whether this machine can run the table's kernels.
  bool (*runs_here)();
};

extern const Table portable_table;
#ifdef EPIC_QUANT_X86
extern const Table avx2_table;
#endif

}  // namespace epic_quant
