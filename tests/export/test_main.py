"""The command line: what it refuses and says, and that nothing is left of what it refuses."""

import math
import shutil
import signal
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from epic_quant.errors import ExportError
from epic_quant.export.__main__ import _FORMATS, main
from epic_quant.export.holding import held
from epic_quant.policy import check
from epic_quant.spec import FORMATS, PolicySpec, WeightSpec

from .conftest import MINI

BAD = {
    "policy": (
        ["--policy", "mlp=int4-g128,full_attention=q4_k", "--format", "gguf"],
        "layers.0.mlp.gate_proj.weight: gguf cannot hold int4-g128; the nearest it has is q4_k (53 other tensors",
    ),
    "ggml": (
        ["--policy", "mlp.up_proj@3=q3_k", "--format", "gemma"],
        "layers.3.mlp.up_proj.weight: gemma cannot hold q3_k; the nearest it has is int4; change the policy",
    ),
    "rotation": (
        ["--policy", "mlp.up_proj@3=int8-g64+had64", "--format", "compressed-tensors"],
        "compressed-tensors cannot hold int8-g64+had64; the nearest it has is int8-g64; ",
    ),
    "table": (
        ["--policy", "embedding=int8", "--format", "compressed-tensors"],
        "embed_tokens.weight: compressed-tensors cannot hold int8; the nearest it has is bf16; ",
    ),
    "misfit": (["--policy", "ple_projections=q4_k", "--format", "gguf"], "q4_k: rows of 32 weights are no multiple"),
    "hessians": (["--policy", "mlp=int4-g64+gptq", "--format", "compressed-tensors"], "needs --hessians"),
    "unknown": (["--policy", "mpl=q4_k", "--format", "gguf"], "unknown tensor class 'mpl'; did you mean ple or mlp"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(options, message, tmp_path, capsys):
    assert main([str(MINI), *options, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def mini_with_nan(tmp_path_factory):
    """The small model with one NaN, in row 3 of layer 1's up projection."""
    folder = shutil.copytree(MINI, tmp_path_factory.mktemp("nan") / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("file_format", _FORMATS)
def test_a_failure_midway_leaves_nothing(file_format, mini_with_nan, tmp_path, capsys):
    policy = {"gguf": "mlp=q4_0"}.get(file_format, "mlp=int8")
    assert main([str(mini_with_nan), "--policy", policy, "--format", file_format, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: layers.1.mlp.up_proj.weight[0:512]: NaN or infinity in row 3"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide_ple", "a PLE table with a row for every token; this one has 150 rows, the embedding 120"),
        ("one_layer", "two layers or more that have K and V of their own"),
        ("all_full", "no tokenizer.json"),
        ("other_rope", "no tokenizer.json"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, message, toy, tmp_path, capsys):
    assert main([str(toy(name)), "--policy", "bf16", "--format", "gguf", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file_format", "place", "message"),
    [
        ("gguf", "none/out", "cannot be written: No such file or directory"),
        ("gemma", "none/out", "cannot be written: No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_one_line(file_format, place, message, tmp_path, capsys):
    assert main([str(MINI), "--policy", "bf16", "--format", file_format, str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_is_written_and_said_with_what_does_not_travel(tmp_path, capsys):
    policy = "mlp=int4-g128,mlp.up_proj@3=ternary,kv=k=int8/v=int4,ple=lru:100"
    assert main([str(MINI), "--policy", policy, "--format", "gguf", str(tmp_path / "out"), "--nearest"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: {(tmp_path / 'out').stat().st_size:,} bytes",
        "written as: mlp=q4_k,mlp.up_proj@3=tq1_0,kv=bf16,ple=all",
        "not in the file: kv=k=int8/v=int4,ple=lru:100",
        "K and V, the nearest in llama.cpp: --flash-attn on --cache-type-k q8_0 --cache-type-v q4_0",
        "PLE rows: llama.cpp maps the file, so that the rows used last stay in RAM while there is room",
    ]


E4B_SPECS = st.builds(
    WeightSpec,
    st.sampled_from([name for name, info in FORMATS.items() if info.has_groups]),
    st.sampled_from([None, 32, 64, 256]),
    st.sampled_from([0, 256]),
) | st.sampled_from([WeightSpec(name) for name, info in FORMATS.items() if not info.has_groups])


@settings(max_examples=40)
@given(st.sampled_from(sorted(_FORMATS)), E4B_SPECS)
def test_the_nearest_can_be_held_and_is_held_as_it_is(e4b, file_format, spec):
    candidates = _FORMATS[file_format].candidates
    policy = PolicySpec.of("any", dict.fromkeys(["sliding_attention", "mlp", "ple_table", "embedding"], spec))
    found = held(policy, e4b, file_format, candidates, take_nearest=True)
    check(found, e4b)
    assert held(found, e4b, file_format, candidates, take_nearest=False) == found
    if found != policy:
        with pytest.raises(ExportError, match="the nearest it has is"):
            held(policy, e4b, file_format, candidates, take_nearest=False)


@pytest.mark.parametrize("file_format", _FORMATS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "other.gguf", "", "dangling"])
def test_nothing_that_exists_is_replaced(name, file_format, tmp_path, capsys):
    folder = shutil.copytree(MINI, tmp_path / "model")
    (folder / "other.gguf").write_bytes(b"GGUF")
    (folder / "dangling").symlink_to("nowhere")
    before = {path.name: path.exists() and path.read_bytes() for path in folder.iterdir() if not path.is_dir()}
    assert main([str(folder), "--policy", "bf16", "--format", file_format, str(folder / name)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {folder / name}: exists already; expected the name of a file or folder to make\n"
    )
    assert {path.name: path.exists() and path.read_bytes() for path in folder.iterdir() if not path.is_dir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("file_format", _FORMATS)
def test_a_published_file_as_policy_is_refused(file_format, tmp_path, capsys):
    policy = ["--policy", f"theirs=file:{tmp_path / 'model.gguf'}", "--format", file_format]
    assert main([str(MINI), *policy, str(tmp_path / "out")]) == 2
    assert "is quantized already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a program without its knowing")
@pytest.mark.parametrize(("file_format", "name"), [("gguf", "SIGINT"), ("gguf", "SIGTERM"), ("gemma", "SIGHUP")])
def test_a_signal_midway_leaves_nothing(file_format, name, tmp_path, run_python):
    number = signal.Signals[name]
    program = f"""
import os
from epic_quant import command_line
from epic_quant.export import __main__, folder, gguf

def interrupted(_):
    assert os.listdir({str(tmp_path)!r})
    os.kill(os.getpid(), {number.value})

folder.raw = gguf.raw = interrupted
command_line.leave(__main__.main)
"""
    options = [MINI, "--policy", "mlp=int8" if file_format == "gemma" else "mlp=q8_0", "--format", file_format]
    status, printed = run_python("-c", program, *options, tmp_path / "out")
    assert (status, "Traceback" in printed) == (128 + number, False)
    assert list(tmp_path.iterdir()) == []
