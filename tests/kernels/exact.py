"""What the scripts that run in a sanitized build share; they import this beside them."""

import ctypes
import importlib.util
import sys

import numpy as np

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


class Exact:
    """An array in memory of its own from malloc, so that a read or write beyond it is seen."""

    def __init__(self, values):
        self.address = libc.malloc(values.nbytes)
        buffer = (ctypes.c_char * values.nbytes).from_address(self.address)
        self.values = np.frombuffer(buffer, dtype=values.dtype).reshape(values.shape)
        self.values[...] = values

    def __del__(self):
        libc.free(self.address)


def bits_of(coding):
    """Bits of a code; 0 for five base-3 digits a byte."""
    return 0 if coding == "trits" else int(coding.removeprefix("bits"))


def row_nbytes(coding, cols):
    return -(-cols * bits_of(coding) // 8) or -(-cols // 5)


def hadamard(block):
    """Sylvester's matrix of ones, [block, block]."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def run(check_all):
    """Load the native module that the command line names, and call check_all(native, rng), which counts its cases."""
    spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    assert "torch" not in sys.modules
    print(f"{check_all(native, np.random.default_rng(0))} passed, 0 failed")
