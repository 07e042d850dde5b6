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

# ggml's types: one block, of the weights ((37 i + 11) mod 256 - 128) (1 + ⌊i / 16⌋) / 256.
GOLDEN_BLOCKS = {
    "q8_0": "3d9f412c1803efdac63f2b1602edd9c43d292900d7ae85774e26fdd4ab82744b22f9",
    "q6_k": (
        "30ca54ee7923bd41db65ff8934ce51ec7a10b60ca14ee4892fc51bb15df3993e4ae34ca70069d23bd43d98f16ac32cc5fc8a13ab"
        "33cc740d9b23bc44dc8513accd24db3298ff56bd13ca2187ee45ac03a71079d24ca50ea8006ad33c960f99f1b943dd67f19b20ca"
        "54ee7812ac31cb55ef7923bd41db65ff8a34ce52ec76009a18dceda1b6470b18dceda176470b18dc2e72b584c8db1f6e71b584c8"
        "db1f62714185b4f8ef1e524185b4f82f1e524185b7f82c1d514286b7f82c1d514286fbe807f21822282bcd40ba4c4f54a399757f"
        "2718"
    ),
    "q5_k": (
        "dd1f9c2f8890d7dd879097daa7cbe5ff5ad296b4a5294b5ad296b425294b5ad296a425294b5ad2b6a425294b5ad2b4a44678bb6d"
        "90d2044679bb6da0d2144689f93e82d71c60b5f94e83d72c60b50a4eba0e5296ea2276ba0e52a6ea3276ca1e4398fd4095ea0f53"
        "a8fd4095fa0f54a952a6eb3f85da0e52a7fb4f86da1e63a7fd40a5fa0e53a80d50a5fa0f54b90d51d71b60a5f94e93d72c60b50a"
        "5e93e82c70c50a4f94e93e70c50a5fa4e93e81d6"
    ),
    "q4_k": (
        "3d247f2f8891d5df879197da87b9d0ff93a4c53647687993b4c53647688993b4e426486b8da0c2e426496b8da0c20427c507294b"
        "6d81a3c507294b6d81a3c5072a4c6f80b2d5072a4c6f90b2d5072a4c284a7c9eb2e406285a7c9ec2e406285a7da0c2f406285b7d"
        "a0c2f406295b7da06b8ea0c2e527496c8ea0c20527496c8eb0d205274a6c9fb0d205284a7d9fb0d3"
    ),
    "q3_k": (
        "90086c6f7ff393900c6c6ffff393800cfdef6e6202919dfdef6e6210919dffef6cf5936c39c6936cc6936c39c69368c6916c3bd6"
        "a17bc6916c3bd6ad7bc69d6c64dab1641bceb164dab164dbceb127deb3e4194ea7194eb3e4194ea4194eb3e4f23b5ac8195e30fd"
        "0a3935f1d12b"
    ),
    "q2_k": (
        "112222447565876768a9a9abacedfeffd82c6d71b286dbd82c6d71b286dbd82c2d7176868bd82c2d7176868bd82c217261b686cb"
        "dc1c6161b686cb1c1c6161b687d8182d6172b687d8182d6172b687d89e348d36"
    ),
    "q5_0": "14ab8fc7e3715806b3600efba95805a3500efba848f5",
    "q4_0": "90b0ab8a694827e6c5ab8a694827e6c5ab8a",
    "iq4_nl": "19205385b6d8f91b3c5485b6d8f91b3c5485",
    "tq2_0": (
        "95151555554595951515556545959515195565458595151955654595951511556161868698182161618686181821616686841818"
        "2161668684181821616686847243"
    ),
    "tq1_0": (
        "837d7e817f7583837d7e81887583837e9a7f88757a837e9a7f887583837e617f31319494bdbb3631319494bbbb363186c1cb23407243"
    ),
}

# Trellises: packed bytes and scale of 144 such weights, of which the last 16 are words in order.
GOLDEN_PATHS = {
    "trellis1": ("aaaaaa2aeb6bcd874a818d1d39044f5406a2", "5427"),
    "trellis2": ("4dbfa6bb4d618986857de50d20b6eb7324aa562ce361234d3e11eed380b282d5c2a576bc", "b328"),
    "trellis3": (
        "1e69053f72cd5b198be68e146d2523996140f6293a711e3b6e455b702357f83fa621e060b589562e8ff7ddc0ee7f57700b5400d1e69e",
        "9728",
    ),
    "trellis4": (
        "2e4e0cc78e7f4de5db74bca4077e5c01116cc1f2e2c8a20d53f05222603ad663cc27a6944bee7f4d8b225ffc62994be4f42de6f00366"
        "37791287bf1c95c8fe64344ce682628046c0",
        "b628",
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


@pytest.mark.parametrize("spec", GOLDEN_BLOCKS)
def test_stored_blocks_never_change(spec):
    index = torch.arange(FORMATS[spec].block_size).unsqueeze(0)
    weight = ((index * 37 + 11) % 256 - 128) * (1 + index // 16) / 256
    assert stored(weight, spec).blocks.numpy().tobytes().hex() == GOLDEN_BLOCKS[spec]


@pytest.mark.parametrize("spec", GOLDEN_PATHS)
def test_stored_paths_never_change(spec):
    index = torch.arange(144).unsqueeze(0)
    quantized = stored(((index * 37 + 11) % 256 - 128) * (1 + index // 16) / 256, spec)
    packed, scale = (tensor.view(torch.uint8).numpy().tobytes().hex() for tensor in quantized.tensors().values())
    assert (packed, scale) == GOLDEN_PATHS[spec]


def test_every_format_has_its_bytes_written_out():
    assert set(FORMATS) <= set(GOLDEN) | set(GOLDEN_BLOCKS) | set(GOLDEN_PATHS)
