"""What is found in a checkpoint's values, against NumPy, and what is said of it."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from epic_quant import values
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.inspection import main
from epic_quant.values import LARGEST, check_values, read_values

UP, SHARED_K = "model.layers.1.mlp.up_proj.weight", "model.layers.11.self_attn.k_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def changed(toy, tmp_path):
    """`changed(change)`: a folder with the toy checkpoint after `change(tensors)`."""

    def make(change):
        folder = shutil.copytree(toy("e4b"), tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 40),
    cols=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 100.0]),
    chunk=st.sampled_from([1, 8, 64, 2**19]),
    zeros=st.sets(st.integers(0, 39)),
)
def test_a_sound_tensor_is_summed_up_as_numpy_does(seed, rows, cols, dtype, scale, chunk, zeros):
    weight = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    for row in zeros:
        weight[row:][:1] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_CHUNK_WEIGHTS", chunk)
        found = read_values("w", weight)
    expected = weight.double().numpy()
    assert found.fault is None
    assert found.num_rows == rows
    assert found.zero_rows == int((expected == 0).all(axis=1).sum())
    assert found.max_abs == np.abs(expected).max()
    if scale > 1e-20:  # The squares of smaller ones are zero in fp32.
        assert found.rms == pytest.approx(np.sqrt(np.square(expected).mean()), rel=1e-5)


@given(
    bad=st.dictionaries(
        st.tuples(st.integers(0, 19), st.integers(0, 4)),
        st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -70_000.0]),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    chunk=st.sampled_from([1, 16, 2**19]),
)
def test_the_first_bad_row_is_named(bad, dtype, chunk):
    weight = torch.ones(20, 5, dtype=dtype)
    for place, value in bad.items():
        weight[place] = value
    first = min(row for row, _ in bad)
    there = [value for (row, _), value in bad.items() if row == first]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_CHUNK_WEIGHTS", chunk)
        fault = read_values("w", weight).fault
    assert f" in row {first}" in fault
    assert fault.startswith("NaN") == any(map(math.isnan, there))
    assert fault.startswith("infinity") == (any(map(math.isinf, there)) and not any(map(math.isnan, there)))


@pytest.mark.parametrize("sign", [1, -1])
def test_what_the_largest_scale_holds_is_sound_and_the_next_number_is_not(sign):
    assert read_values("w", torch.full((2, 3), sign * LARGEST)).fault is None
    weight = torch.full((2, 3), sign * LARGEST)
    weight[1, 2] *= 1.001
    assert "in row 1, beyond 65504" in read_values("w", weight).fault


def test_values_of_a_vector_are_rows_of_their_own_and_nothing_is_found_in_nothing():
    weight = torch.ones(7)
    weight[4] = math.nan
    assert read_values("w", weight).fault == "NaN in row 4"
    assert read_values("w", torch.empty(0, 5)).max_abs == 0


def test_the_check_names_checkpoint_tensor_and_row(toy_checkpoint_with_nan):
    with pytest.raises(CheckpointError, match=rf"nan: {UP} has NaN in row 3"):
        list(check_values(toy_checkpoint_with_nan, toy_checkpoint_with_nan.names))


def test_a_sound_checkpoint_passes_and_every_tensor_is_read(toy_checkpoint):
    assert tuple(check_values(toy_checkpoint, toy_checkpoint.names)) == toy_checkpoint.names


def shown(folder, capsys):
    status = main([str(folder), "--values"])
    lines = capsys.readouterr().out.splitlines()
    return status, [line for line in lines if line], lines[-1]


def test_a_sound_checkpoint_has_no_findings(toy, capsys):
    status, lines, verdict = shown(toy("e4b"), capsys)
    assert status == 0
    assert not any(line.startswith("tensor ") and "found" in line for line in lines)
    assert "0 with NaN, infinity or overflow, so a run can measure them" in verdict
    with Checkpoint.open(toy("e4b")) as checkpoint:
        arrays = {name: checkpoint.tensor(name).double().numpy() for name in checkpoint.names}
    peaks = {name: np.abs(x).max() / np.sqrt(np.square(x).mean()) for name, x in arrays.items()}
    name = max(peaks, key=peaks.get)
    assert verdict.endswith(f"the largest outlier is {peaks[name]:,.1f} times the rms, in {name}")


def damage(tensors):
    tensors[UP][3, 5] = -math.inf
    tensors["model.layers.0.mlp.up_proj.weight"][:2] = 0
    tensors["model.layers.2.mlp.up_proj.weight"][9, 9] = 500
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_everything_remarkable_is_a_line(changed, capsys):
    status, lines, verdict = shown(changed(damage), capsys)
    said = "\n".join(" ".join(line.split()) for line in lines)
    assert status == 1
    assert f"{UP} infinity in row 3" in said
    assert "model.layers.0.mlp.up_proj.weight 2 of 80 rows are zero" in said
    assert "model.layers.2.mlp.up_proj.weight the largest of 500 is " in said
    assert "model.norm.weight float64, where most weights are bfloat16" in said
    assert "lm_head.weight the embedding again: 11,520 bytes twice" in said
    assert "1 with NaN, infinity or overflow, so no run can measure them" in verdict


def test_a_fault_in_a_tensor_that_is_never_used_is_shown_but_harmless(changed, capsys):
    shared_k = torch.full((64, 48), math.nan, dtype=torch.bfloat16)
    status, lines, verdict = shown(changed(lambda tensors: tensors.update({SHARED_K: shared_k})), capsys)
    assert status == 0
    assert any(SHARED_K in line and "NaN in row 0 (unused)" in line for line in lines)
    assert "so a run can measure them" in verdict
