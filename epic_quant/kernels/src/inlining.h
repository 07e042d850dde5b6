// Kernels are small functions on vectors, which must be inlined whatever the compiler thinks of their number, around
// loops that it vectorizes best in a function of their own.
#pragma once

#if defined(__GNUC__)
#define EPIC_QUANT_UNROLL _Pragma("GCC unroll 16")
#define EPIC_QUANT_VECTORIZE _Pragma("GCC unroll 1")  // a loop that is unrolled first is not vectorized
#define EPIC_QUANT_INLINE inline __attribute__((always_inline))
#define EPIC_QUANT_INLINE_LAMBDA __attribute__((always_inline))
#define EPIC_QUANT_OWN_FUNCTION __attribute__((noinline))
#define EPIC_QUANT_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define EPIC_QUANT_UNROLL
#define EPIC_QUANT_VECTORIZE
#define EPIC_QUANT_INLINE __forceinline
#define EPIC_QUANT_INLINE_LAMBDA
#define EPIC_QUANT_OWN_FUNCTION
#define EPIC_QUANT_PREFETCH(address) static_cast<void>(address)
#endif
