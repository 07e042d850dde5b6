"""Products with packed weights in a sanitized build, by NumPy alone: python sanitized.py PATH_OF_NATIVE_MODULE.

Every buffer is exactly as long as it must be, so that a read or write beyond it is seen. What codes stand for is
worked out here anew, from the bits.
"""

import importlib.util
import sys

import numpy as np
from exact import Exact

CODINGS = {"bits2": 2, "bits3": 3, "bits4": 4, "bits8": 8, "trits": 5}
THREADS = (1, 2, 5)


def codes_of(packed, coding, cols):
    """[rows, cols] of the rows' bytes."""
    if coding == "trits":
        digits = packed[:, :, None] // 3 ** np.arange(5) % 3
        return digits.reshape(len(packed), -1)[:, :cols]
    num_bits = CODINGS[coding]
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : cols * num_bits]
    return (bits.reshape(len(packed), cols, num_bits).astype(int) << np.arange(num_bits)).sum(-1)


def check(native, isa, coding, rows, cols, groups, tokens, table, rng):
    num_bits = CODINGS[coding]
    row_nbytes = -(-cols // 5) if coding == "trits" else -(-cols * num_bits // 8)
    highest = 243 if coding == "trits" else 256
    packed = Exact(rng.integers(0, highest, (rows, row_nbytes), dtype=np.uint8))
    scale = Exact(rng.standard_normal((rows, groups)).astype(np.float16))
    zero = 1 if coding == "trits" else 1 << (num_bits - 1)
    levels = rng.integers(-127, 128, 1 << num_bits).astype(np.int8) if table else np.zeros(0, np.int8)
    codes = codes_of(packed.values, coding, cols)
    integers = levels.astype(int)[codes] if table else codes - zero
    weight = integers * np.repeat(scale.values.astype(float), cols // groups, axis=1)
    matrix = native.Matrix(
        isa,
        packed.address,
        scale.address,
        rows,
        cols,
        row_nbytes,
        groups,
        num_bits,
        0 if table else zero,
        levels.tobytes(),
    )
    x = Exact(rng.standard_normal((tokens, cols)).astype(np.float32))
    expected = x.values.astype(float) @ weight.T
    size = np.linalg.norm(x.values) * np.linalg.norm(weight) / min(cols, 64) ** 0.5
    for int8, bound in ((False, 1e-5), (True, 0.1)):
        for threads in THREADS:
            out = Exact(np.full((tokens, rows), np.nan, np.float32))
            matrix.linear(x.address, tokens, out.address, int8, threads)
            error = np.linalg.norm(out.values - expected)
            assert error <= bound * size, (isa, coding, rows, cols, groups, tokens, table, int8, error / size)


def main(path):
    spec = importlib.util.spec_from_file_location("_native", path)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    assert "torch" not in sys.modules
    rng, checked = np.random.default_rng(0), 0
    for isa in native.isas():
        for coding in CODINGS:
            for table in (False, True) if coding in ("bits2", "bits3", "bits4") else (False,):
                for cols in (1, 2, 31, 33, 127, 320, 641, 2561):
                    for rows, tokens in ((1, 1), (3, 2), (17, 5)):
                        check(native, isa, coding, rows, cols, 1, tokens, table, rng)
                        checked += 1
                for group in (10, 16, 32, 80, 128, 160, 384):
                    for groups in (1, 2, 5):
                        for tokens in (1, 3, 50):
                            check(native, isa, coding, 5, group * groups, groups, tokens, table, rng)
                            checked += 1
                # Scales whose memory is more than any slack beside that of the codes.
                check(native, isa, coding, 5, 32 * 330, 330, 3, table, rng)
                # Rows enough for every thread.
                check(native, isa, coding, 700, 640, 5, 1, table, rng)
                check(native, isa, coding, 700, 640, 5, 3, table, rng)
    print(f"{checked} passed, 0 failed")


if __name__ == "__main__":
    main(sys.argv[1])
