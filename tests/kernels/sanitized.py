"""Products with stored matrices in a sanitized build, by NumPy alone: python sanitized.py PATH_OF_NATIVE_MODULE.

What codes stand for is worked out here anew, from the bits.
"""

import numpy as np
from exact import Exact, bits_of, hadamard, row_nbytes, run

CODINGS = ("bits2", "bits3", "bits4", "bits8", "trits")
THREADS = (1, 2, 5)


def codes_of(packed, coding, cols):
    """[rows, cols] of the rows' bytes."""
    if coding == "trits":
        digits = packed[:, :, None] // 3 ** np.arange(5) % 3
        return digits.reshape(len(packed), -1)[:, :cols]
    num_bits = bits_of(coding)
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : cols * num_bits]
    return (bits.reshape(len(packed), cols, num_bits).astype(int) << np.arange(num_bits)).sum(-1)


def check(native, isa, coding, rows, cols, groups, tokens, table, rng):
    num_bits = bits_of(coding)
    highest = 256 if num_bits else 243
    packed = Exact(rng.integers(0, highest, (rows, row_nbytes(coding, cols)), dtype=np.uint8))
    scale = Exact(rng.standard_normal((rows, groups)).astype(np.float16))
    half = 1 << num_bits - 1 if num_bits else 1
    levels = (
        np.sort(rng.choice(np.arange(-127, 128), 1 << num_bits, replace=False)) if table else np.arange(-half, half)
    )
    levels = levels if num_bits else np.arange(-1, 2)
    weight = levels[codes_of(packed.values, coding, cols)] * np.repeat(
        scale.values.astype(float), cols // groups, axis=1
    )
    block = int(rng.choice([block for block in (1, 2, 16, 64) if cols % block == 0])) if rng.integers(2) else 0
    signs = Exact((rng.choice([-1.0, 1.0], cols) / max(block, 1) ** 0.5).astype(np.float32))
    stored = native.Format(coding, levels.tolist(), 2 if table else 0, 0.0, 0.3, float(half), False)
    matrix = native.Matrix(isa, stored, block, signs.address, rows, cols, groups, packed.address, scale.address)
    x = Exact(rng.standard_normal((tokens, cols)).astype(np.float32))
    rotated = x.values.astype(float)
    if block:
        rotated = ((rotated * signs.values).reshape(tokens, -1, block) @ hadamard(block)).reshape(tokens, cols)
    expected = rotated @ weight.T
    # Levels of a short row may all be zero, but what is subtracted for their zero point rounds.
    weight_size = max(np.linalg.norm(weight), np.linalg.norm(scale.values))
    size = np.linalg.norm(x.values) * weight_size / min(cols, 64) ** 0.5
    for int8, bound in ((False, 1e-5), (True, 0.1)):
        for threads in THREADS:
            out = Exact(np.full((tokens, rows), np.nan, np.float32))
            matrix.matmul(x.address, tokens, out.address, int8, threads)
            error = np.linalg.norm(out.values - expected)
            assert error <= bound * size, (isa, coding, rows, cols, groups, tokens, table, int8, error / size)


def check_all(native, rng):
    checked = 0
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
    return checked


if __name__ == "__main__":
    run(check_all)
