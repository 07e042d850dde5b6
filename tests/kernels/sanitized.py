"""Products with stored matrices in a sanitized build, by NumPy alone: python sanitized.py PATH_OF_NATIVE_MODULE.

What codes stand for is worked out here anew, from the bits.
"""

import numpy as np
from exact import Exact, bits_of, hadamard, row_nbytes, run

# Columns and bytes of a block, and columns that share a scale, of ggml's types.
BLOCKS = {"q8_0": (32, 34, 32), "q6_k": (256, 210, 16), "q4_k": (256, 144, 32)}
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


def decoded(blocks, coding):
    """Weights [..., codes of a block] of blocks [..., bytes]."""
    start = {"q8_0": 0, "q6_k": 208, "q4_k": 0}[coding]
    scale = blocks[..., start : start + 4].copy().view(np.float16).astype(float)
    if coding == "q8_0":
        return scale[..., :1] * blocks[..., 2:].view(np.int8)
    if coding == "q6_k":
        halves = blocks[..., :128].reshape(*blocks.shape[:-1], 2, 1, 64) >> np.array([[0], [4]]) & 15
        quarters = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]]) & 3
        codes = halves.reshape(*blocks.shape[:-1], 256) + 16 * quarters.reshape(*blocks.shape[:-1], 256) - 32
        return scale[..., :1] * np.repeat(blocks[..., 192:208].view(np.int8), 16, axis=-1) * codes
    bits = np.unpackbits(blocks[..., 4:16], axis=-1, bitorder="little").reshape(*blocks.shape[:-1], 3, 4, 8)
    first, rest = bits[..., :2, :, :6], bits[..., 2, :, :].reshape(*blocks.shape[:-1], 4, 2, 4).swapaxes(-3, -2)
    last = np.concatenate([rest, bits[..., :2, :, 6:]], axis=-1)
    scales, minima = np.moveaxis((np.concatenate([first, last], -2) << np.arange(6)).sum(-1), -2, 0)
    codes = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 1, 32) >> np.array([[0], [4]]) & 15
    weights = (scale[..., :1] * scales)[..., None] * codes.reshape(*blocks.shape[:-1], 8, 32)
    return (weights - (scale[..., 1:2] * minima)[..., None]).reshape(*blocks.shape[:-1], 256)


def check_blocks(native, isa, coding, rows, blocks, tokens, rng):
    block_cols, nbytes, group_cols = BLOCKS[coding]
    cols, levels = block_cols * blocks, {"q8_0": range(-128, 128), "q6_k": range(-32, 32), "q4_k": range(16)}[coding]
    values = rng.integers(0, 256, (rows, blocks, nbytes), dtype=np.uint8)
    for at in {"q8_0": (0,), "q6_k": (208,), "q4_k": (0, 2)}[coding]:
        values[..., at : at + 2] = rng.standard_normal((rows, blocks)).astype(np.float16)[..., None].view(np.uint8)
    packed, x = Exact(values), Exact(rng.standard_normal((tokens, cols)).astype(np.float32))
    stored = native.Format(coding, list(levels), 0, 0.0, 0.0, 0.0, False)
    assert (stored.block_cols, stored.group_cols, stored.row_nbytes(cols)) == (block_cols, group_cols, blocks * nbytes)
    matrix = native.Matrix(isa, stored, 0, 0, rows, cols, cols // group_cols, packed.address, 0)
    weight = decoded(values, coding).reshape(rows, cols)
    size = np.linalg.norm(x.values) * np.linalg.norm(weight) / min(cols, 64) ** 0.5
    for threads in THREADS:
        row_values = Exact(np.full((rows, cols), np.nan, np.float32))
        matrix.dequantize(0, row_values.address, False, threads)
        assert np.allclose(row_values.values, weight, rtol=1e-6, atol=1e-6 * np.abs(weight).max())
        for int8, bound in ((False, 1e-5), (True, 0.1)):
            out = Exact(np.full((tokens, rows), np.nan, np.float32))
            matrix.matmul(x.address, tokens, out.address, int8, threads)
            error = np.linalg.norm(out.values - x.values.astype(float) @ weight.T)
            assert error <= bound * size, (isa, coding, rows, blocks, tokens, int8, error / size)


def path_values(packed, bits, cols, state_bits, multiplier, levels):
    """Values [rows, cols] of a trellis' rows: pieces of 128 weights are eight streams of 16 side by side."""
    words = packed.reshape(len(packed), -1, 2).astype(int) @ np.array([1, 256])
    split = cols // 128 * 8 * bits
    pieces = words[:, :split].reshape(len(packed), -1, bits, 8).swapaxes(2, 3).reshape(len(packed), -1)
    words = np.concatenate([pieces, words[:, split:], np.zeros((len(packed), 2), int)], axis=1)
    first = np.arange(cols) * bits
    both = words[:, first // 16] + (words[:, first // 16 + 1] << 16)
    index = (both >> first % 16 & (1 << state_bits) - 1) * multiplier % 65536 // 256
    return levels[index // 16] + levels[16 + index % 16]


def check_trellis(native, isa, bits, rows, cols, groups, tokens, rng):
    state_bits, multiplier = int(rng.choice([12, 16])), int(rng.integers(0, 2**15)) * 2 + 1
    levels = rng.integers(-63, 64, 32)
    packed = Exact(rng.integers(0, 256, (rows, -(-cols * bits // 16) * 2), dtype=np.uint8))
    scale = Exact(rng.standard_normal((rows, groups)).astype(np.float16))
    stored = native.Format(f"trellis{bits}", levels.tolist(), 0, 0.0, 0.0, 0.0, False, state_bits, multiplier)
    assert stored.row_nbytes(cols) == packed.values.shape[1]
    matrix = native.Matrix(isa, stored, 0, 0, rows, cols, groups, packed.address, scale.address)
    weight = path_values(packed.values, bits, cols, state_bits, multiplier, levels)
    weight = weight * np.repeat(scale.values.astype(float), cols // groups, axis=1)
    x = Exact(rng.standard_normal((tokens, cols)).astype(np.float32))
    size = np.linalg.norm(x.values) * max(np.linalg.norm(weight), np.linalg.norm(scale.values)) / min(cols, 64) ** 0.5
    for threads in THREADS:
        decoded = Exact(np.full((rows, cols), np.nan, np.float32))
        matrix.dequantize(0, decoded.address, False, threads)
        assert np.array_equal(decoded.values, weight.astype(np.float32)), (isa, bits, rows, cols, groups)
        for int8, bound in ((False, 1e-5), (True, 0.1)):
            out = Exact(np.full((tokens, rows), np.nan, np.float32))
            matrix.matmul(x.address, tokens, out.address, int8, threads)
            error = np.linalg.norm(out.values - x.values.astype(float) @ weight.T)
            assert error <= bound * size, (isa, bits, rows, cols, groups, tokens, int8, error / size)


def check_paths(native, isa, bits, rows, cols, keep, rng):
    values = Exact((rng.integers(-127, 128, 1 << 12) * 256).astype(np.int16))
    x = Exact((rng.standard_normal((rows, cols)) * 10000).clip(-32768, 32767).astype(np.int16))
    before = Exact(rng.integers(-1, 1 << 12, rows).astype(np.int32))
    states = Exact(np.zeros((rows, keep), np.uint16))
    # A state that goes before must leave bits that can be zeros.
    ends = cols * bits >= 12 - bits and bool(rng.integers(2))
    arguments = (before.address, ends, keep, states.address, int(rng.choice(THREADS)))
    native.find_paths(isa, bits, 12, values.address, x.address, rows, cols, *arguments)
    check_path(before, states, bits)
    # The same where later columns make up for errors, with few survivors and with more than there are paths at first.
    factor = np.eye(cols) + np.triu(rng.standard_normal((cols, cols)), 1) / 8
    own = np.zeros((cols, 32))
    for col in range(cols):
        for apart in range(1, min(32, col + 1)):
            own[col, (col - apart) % 32] = factor[col - apart, col]
    floats = [values.values / 256, x.values / 256, np.ones((rows, cols)), factor, own, np.ones(cols)]
    kept = [Exact(one.astype(np.float32)) for one in floats]
    value_address, x_address, scales, *others = (one.address for one in kept)
    given = (isa, bits, 12, value_address, x_address, scales, rows, cols, *others, before.address, False)
    native.find_compensated_paths(*given, int(rng.choice([1, 5, 300])), keep, states.address, int(rng.choice(THREADS)))
    check_path(before, states, bits)


def check_path(before, states, bits):
    """Each state follows the one before it."""
    path = np.concatenate([before.values[:, None], states.values.astype(int)], axis=1)
    follows = path[:, 1:] >> bits == path[:, :-1] & (1 << 12 - bits) - 1
    assert (follows | (path[:, :-1] < 0)).all(), (bits, states.values.shape)


def check_all(native, rng):
    checked = 0
    for isa in native.isas():
        for bits in (1, 2, 3, 4):
            for cols in (1, 5, 16, 127, 128, 130, 256, 300, 640, 2561):
                for rows, tokens in ((1, 1), (3, 2), (17, 5), (40, 50)):
                    check_trellis(native, isa, bits, rows, cols, 1, tokens, rng)
                    checked += 1
                check_paths(native, isa, bits, 3, min(cols, 130), int(rng.integers(1, min(cols, 130) + 1)), rng)
                checked += 1
            for group in (10, 16, 80, 128, 160, 384):
                for groups in (1, 2, 5):
                    check_trellis(native, isa, bits, 5, group * groups, groups, 3, rng)
                    checked += 1
        for coding in BLOCKS:
            for blocks in (1, 2, 3, 10, 33):
                for rows, tokens in ((1, 1), (3, 2), (17, 5), (5, 50), (700, 1)):
                    check_blocks(native, isa, coding, rows, blocks, tokens, rng)
                    checked += 1
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
