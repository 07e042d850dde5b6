"""Stored bytes of every format, written out: a change here makes weights that were stored before unreadable."""

import pytest
import torch

from epic_quant.spec import FORMATS

from .conftest import stored

# Spec: (rows of levels, scale of a level, packed bytes, fp16 scales). The weights are levels times scale, exactly.
GOLDEN = {
    "bf16": ([[1, -2, 0.5]], 1, "803f 00c0 003f", ""),
    "absmax-ternary": ([[-1, 0, 1, 1, 0], [0, 0, 0, 0, -1]], 0.5, "a401 5500", "0038 0038"),
    "absmax2": ([[-2, -1, 0, 1]], 0.5, "e4", "0038"),
    "absmax3": ([[-4, -3, -2, -1, 0, 1, 2, 3]], 0.5, "10325476", "0038"),
    "absmax3-packed": ([[-4, -3, -2, -1, 0, 1, 2, 3]], 0.5, "88c6fa", "0038"),
    "absmax4": ([[-7, -1, 0, 1, 7]], 0.5, "7198 0f", "0038"),
    "ternary": ([[-1, 0, 1, 1, 0, -1], [1, 1, 1, 1, 1, 1]], 0.5, "9c00 f202", "0038 0038"),
    "int2": ([[-2, -1, 0, 1]], 0.5, "e4", "0038"),
    "int3": ([[-4, -3, -2, -1, 0, 1, 2, 3]], 0.5, "88c6fa", "0038"),
    "int4": ([[-8, -4, -1, 0, 1, 2, 3, 7, -7]], 0.5, "4087a9fb01", "0038"),
    "int4-g4": ([[-8, 7, 0, 1, 8, -7, 2, 3]], 0.5, "f098 f056", "0038 00b8"),
    "int5": ([[-16, -8, -1, 0, 1, 2, 7, 15]], 0.5, "003d18e5fd", "0038"),
    "int6": ([[-32, -17, -1, 0, 1, 2, 15, 30, 31]], 0.5, "c0f381a1f8fa3f", "0038"),
    "int7": ([[-64, 63, 18, -16, 10, -48]], 0.5, "80bf14a68400", "0038"),
    "int8": ([[-128, 127, 27, -18, -26, -27]], 0.5, "00ff9b6e6665", "0038"),
    "affine2": ([[-5, -4, -3, -2]], 0.5, "e4", "0038 00c1"),
    "affine2-g4": ([[3, 4, 5, 6, -1, 0, 1, 2]], 0.5, "e4 e4", "0038 003e 0038 00b8"),
    "affine3": ([[1, 2, 3, 4, 5, 6, 7, 8]], 0.5, "88c6fa", "0038 0038"),
    "affine4": ([[-8, -4, -1, 0, 1, 2, 3, 7, -7]], 0.5, "4087a9fb01", "0038 00c4"),
    "affine5": ([[-16, -8, -1, 0, 1, 2, 7, 15]], 0.5, "003d18e5fd", "0038 00c8"),
    "affine6": ([[-32, -17, -1, 0, 1, 2, 15, 30, 31]], 0.5, "c0f381a1f8fa3f", "0038 00cc"),
    "affine7": ([[-64, 63, 18, -16, 10, -48]], 0.5, "80bf14a68400", "0038 00d0"),
    "affine8": ([[-128, 127, 27, -18, -26, -27]], 0.5, "00ff9b6e6665", "0038 00d4"),
    "codebook2": ([[-127, -38, 38, 127]], 2**-6, "e4", "0024"),
    "codebook3": ([[-127, -79, -45, -14, 14, 45, 79, 127]], 2**-6, "88c6fa", "0024"),
    "codebook4": (
        [[-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127]],
        2**-6,
        "1032547698badcfe",
        "0024",
    ),
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_stored_bytes_never_change(spec):
    levels, scale, packed, scales = GOLDEN[spec]
    weight = torch.tensor(levels) * scale
    quantized = stored(weight, spec)
    found = [tensor.view(torch.uint8).numpy().tobytes() for tensor in quantized.tensors().values()]
    assert found == [bytes.fromhex(tensor) for tensor in (packed, scales) if tensor]
    assert torch.equal(quantized.dequantize(), weight)


def test_every_format_has_its_bytes_written_out():
    assert set(FORMATS) <= set(GOLDEN)
