"""Quantizing, decoding and rotating rows in a sanitized build, by NumPy alone: python sanitized_rows.py PATH_OF_MODULE.

Absmax codes, packed bytes and rotations are worked out here anew; what is decoded of other codes must be nearer to the
weights than zeros are.
"""

import numpy as np
from exact import Exact, bits_of, hadamard, row_nbytes, run

ELEMENTS = {np.float32: 0, np.float16: 2}
COLS = (1, 2, 5, 7, 8, 9, 31, 64, 127, 320, 2561)
TABLES = {2: (-127, -38, 38, 127), 3: (-127, -79, -45, -14, 14, 45, 79, 127), 4: tuple(range(-120, 128, 16))}


def packed_of(codes, bits):
    """[rows, row bytes] of [rows, cols] codes; 0 bits for five base-3 digits a byte."""
    if bits == 0:
        digits = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 5))).reshape(len(codes), -1, 5)
        return (digits * 3 ** np.arange(5)).sum(-1).astype(np.uint8)
    each = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(codes), -1), axis=1, bitorder="little")


def check(native, isa, coding, cols, groups, block, element, least_squares, rng):
    bits = bits_of(coding)
    rows, group, threads = 3, cols // groups, int(rng.integers(1, 4))
    half = 1 << bits - 1 if bits else 1
    low, high = (-half, half - 1) if bits else (-1, 1)
    table = TABLES[bits] if least_squares and bits in TABLES and rng.integers(2) else ()
    divisor, peak = (0.0, 127 if table else half) if least_squares else (float(max(high, 1)), 0)
    stored = native.Format(coding, table or range(low, high + 1), 2 if table else 0, divisor, 0.3, peak, False)

    weight = Exact(rng.standard_normal((rows, cols)).astype(element))
    signs = Exact((rng.choice([-1.0, 1.0], cols) / max(block, 1) ** 0.5).astype(np.float32))
    packed = Exact(np.zeros((rows, row_nbytes(coding, cols)), np.uint8))
    scale = Exact(np.zeros((rows, groups), np.float16))
    decoded = Exact(np.full((rows, cols), np.nan, element))
    matrix = native.Matrix(isa, stored, block, signs.address, rows, cols, groups, packed.address, scale.address)
    assert stored.row_nbytes(cols) == row_nbytes(coding, cols)
    assert matrix.quantize(ELEMENTS[element], weight.address, threads) == -1
    matrix.dequantize(ELEMENTS[element], decoded.address, False, threads)

    values = weight.values.astype(np.float32)
    wide = np.repeat(np.abs(values).reshape(rows, groups, group).max(-1), group, axis=1) / np.float32(max(high, 1))
    if not block and not least_squares:
        codes = np.clip(np.round(values / wide), low, high)
        assert np.array_equal(packed.values, packed_of((codes - low).astype(np.uint8), bits))
        stored = np.repeat(scale.values.astype(np.float32), group, axis=1)
        assert np.array_equal(decoded.values, (codes * stored).astype(element))
    else:
        assert np.linalg.norm(decoded.values - values) <= np.linalg.norm(values), (isa, coding, cols, groups, block)
    assert np.isfinite(decoded.values).all()

    x = Exact(rng.standard_normal((rows, cols)).astype(np.float32))
    rotated = Exact(np.full((rows, cols), np.nan, np.float32))
    back = Exact(np.full((rows, cols), np.nan, np.float32))
    if block:
        native.rotate(isa, block, signs.address, False, rows, cols, x.address, rotated.address, threads)
        native.rotate(isa, block, signs.address, True, rows, cols, rotated.address, back.address, threads)
        blocks = (x.values * signs.values).reshape(rows, -1, block)
        assert np.allclose(rotated.values, (blocks @ hadamard(block)).reshape(rows, cols), atol=1e-5)
        assert np.allclose(back.values, x.values, atol=1e-5)

    weight.values[1, -1] = np.nan
    assert matrix.quantize(ELEMENTS[element], weight.address, threads) == 1


def check_all(native, rng):
    checked = 0
    for isa in native.isas():
        for coding in ("trits", *(f"bits{bits}" for bits in range(1, 9))):
            for cols in COLS:
                for groups in (g for g in (1, 2, 3, 5, 8) if cols % g == 0):
                    for block in (0, *(b for b in (1, 2, 4, 8, 64) if cols % b == 0)):
                        for element in ELEMENTS:
                            for least_squares in (False, True) if coding != "bits1" else (False,):
                                check(native, isa, coding, cols, groups, block, element, least_squares, rng)
                                checked += 1
    return checked


if __name__ == "__main__":
    run(check_all)
