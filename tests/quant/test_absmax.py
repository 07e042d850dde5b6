"""The original's formats, written out anew in NumPy."""

import numpy as np
import pytest
import torch

from epic_quant.quant import format_named

from .conftest import stored

PUBLISHED = {
    "absmax-ternary": (1, lambda ratio: (ratio > 0.33).astype(int) - (ratio < -0.33), 2, 1),
    "absmax2": (2, lambda ratio: np.clip(np.round(ratio), -2, 1), 2, 2),
    "absmax3": (4, lambda ratio: np.clip(np.round(ratio), -4, 3), 4, 4),
    "absmax3-packed": (4, lambda ratio: np.clip(np.round(ratio), -4, 3), 3, 4),
    "absmax4": (7, lambda ratio: np.clip(np.round(ratio), -8, 7), 4, 8),
}


@pytest.mark.parametrize("spec", PUBLISHED)
def test_codes_scales_and_bytes_are_as_published(spec):
    divisor, code, stored_bits, offset = PUBLISHED[spec]
    weight = np.random.default_rng(3).standard_normal((40, 256)).astype(np.float32) * 0.05
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(divisor)
    codes = code(weight / scale)
    quantized = stored(torch.from_numpy(weight), spec)
    assert np.array_equal(quantized.scale.numpy(), scale.astype(np.float16))
    assert quantized.packed.shape == (40, 256 * stored_bits // 8)
    found = format_named(spec).packing.unpack(quantized.packed, 256).numpy().astype(int) - offset
    assert np.array_equal(found, codes)
    expected = codes.astype(np.float32) * scale.astype(np.float16).astype(np.float32)
    assert np.array_equal(quantized.dequantize().numpy(), expected)
