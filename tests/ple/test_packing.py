"""Rows kept packed are the quantizer's, from a packed file or packed as they are read."""

import pytest
import torch

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, QuantizationError, SpecError
from epic_quant.ple import PLERowCache, pack_table
from epic_quant.quant import quantize
from epic_quant.spec import WeightSpec

from .conftest import DIM, LAYERS, ROWS, write_table

SPECS = ["int8", "int8-g16", "int4-g16", "int3", "ternary", "absmax3-packed", "codebook4-g16", "affine3"]
SPECS += ["int4-g48+had16"]
INT8 = WeightSpec("int8")


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_what_the_quantizer_makes_of_them(finite_checkpoint, weights, tmp_path, spec, from_file):
    spec = WeightSpec.parse(spec)
    quantized = quantize(weights, spec)
    packed = pack_table(finite_checkpoint, spec, tmp_path / "packed.safetensors") if from_file else None
    ids = torch.tensor([5, 200, 5, 6, 0])
    with PLERowCache(finite_checkpoint, capacity_rows=3, spec=spec, packed=packed) as cache:
        for _ in range(2):
            rows = cache.rows(ids)
            assert rows.shape == (5, LAYERS, DIM)
            assert torch.equal(rows.view(5, -1), quantized.rows(ids).dequantize())
        assert cache.rows(ids[:0]).shape == (0, LAYERS, DIM)
        assert cache.row_nbytes * ROWS == quantized.nbytes
        assert cache.stats.resident_nbytes == 3 * cache.row_nbytes


def test_rows_of_a_ggml_type_are_packed_as_any_others(tmp_path):
    table = torch.randn(ROWS, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    with Checkpoint.open(write_table(tmp_path, table, dim=16)) as checkpoint:
        path = pack_table(checkpoint, WeightSpec("iq4_nl"), tmp_path / "packed.safetensors")
        with PLERowCache(checkpoint, capacity_rows=3, packed=path) as cache:
            expected = quantize(table, WeightSpec("iq4_nl")).rows(torch.tensor([7, 200])).dequantize()
            assert torch.equal(cache.rows(torch.tensor([7, 200])).view(2, -1), expected)
            assert cache.row_nbytes == 54
        with pytest.raises(QuantizationError, match="rows of 96 weights are no multiple of 256"):
            pack_table(checkpoint, WeightSpec("q4_k"), tmp_path / "none.safetensors")


def test_a_packed_file_names_its_own_spec(finite_checkpoint, tmp_path):
    path = pack_table(finite_checkpoint, INT8, tmp_path / "packed.safetensors")
    with PLERowCache(finite_checkpoint, capacity_rows=3, packed=path) as cache:
        assert cache.row_nbytes == LAYERS * DIM + 2
    with pytest.raises(SpecError, match="packed as int8, but int4 is asked for"):
        PLERowCache(finite_checkpoint, capacity_rows=3, packed=path, spec=WeightSpec("int4"))


def test_the_same_bytes_hold_more_packed_rows(finite_checkpoint):
    held = {}
    for spec in ("bf16", "int8", "int4"):
        with PLERowCache(finite_checkpoint, capacity_nbytes=4000, spec=WeightSpec(spec)) as cache:
            held[spec] = cache.capacity_rows
    assert held == {"bf16": 4000 // 96, "int8": 4000 // 50, "int4": 4000 // 26}


def test_a_table_packed_in_parts_is_packed_the_same(finite_checkpoint, tmp_path, monkeypatch):
    whole = pack_table(finite_checkpoint, WeightSpec("int4", 16), tmp_path / "whole.safetensors").read_bytes()
    monkeypatch.setattr("epic_quant.ple.packing._CHUNK_NBYTES", 2000)
    assert pack_table(finite_checkpoint, WeightSpec("int4", 16), tmp_path / "parts.safetensors").read_bytes() == whole


def test_a_packed_file_of_another_checkpoint_is_refused(finite_checkpoint, weights, tmp_path):
    path = pack_table(finite_checkpoint, INT8, tmp_path / "packed.safetensors")
    (tmp_path / "other").mkdir()
    with (
        Checkpoint.open(write_table(tmp_path / "other", weights * 2)) as other,
        pytest.raises(CheckpointError, match="packed from another checkpoint"),
    ):
        PLERowCache(other, capacity_rows=3, packed=path)


def test_a_file_that_is_no_packed_table_is_refused(finite_checkpoint):
    with pytest.raises(CheckpointError, match="unknown tensor"):
        PLERowCache(finite_checkpoint, capacity_rows=3, packed=finite_checkpoint.source + "/model.safetensors")


def test_weights_that_are_not_finite_are_named_and_leave_no_file(tmp_path, weights):
    weights = weights.clone()
    weights[77, 3] = float("nan")
    with Checkpoint.open(write_table(tmp_path, weights)) as opened:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(QuantizationError, match="row 77"):
            pack_table(opened, INT8, tmp_path / "packed.safetensors")
        assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_is_an_error(finite_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        pack_table(finite_checkpoint, INT8, tmp_path / "none" / "packed.safetensors")
    with pytest.raises(CheckpointError, match=r"must end"):
        pack_table(finite_checkpoint, INT8, tmp_path / "packed.bin")
