"""What `python -m epic_quant.inspection` prints."""

import json
import shutil

import pytest
from transformers import Gemma4ForCausalLM

from epic_quant.checkpoint import Checkpoint
from epic_quant.inspection import describe, main


def page(path, capsys, *options):
    assert main([str(path), *options]) == 0
    return capsys.readouterr().out


def row(text, part):
    """The table's row of a part: tensors, bytes, share."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{part}  ")]
    tensors, nbytes, share, *_ = line[len(part) :].split()
    return int(tensors.replace(",", "")), int(nbytes.replace(",", "")), share


def test_e4b_from_its_real_header(e4b_sparse_file, capsys):
    """The sums are those of the model's published shapes."""
    text = page(e4b_sparse_file, capsys)
    assert "2130 tensors" in text
    assert row(text, "ple_table") == (1, 262_144 * 10_752 * 2, "35.2%")
    assert row(text, "unused") == (54, 110_111_232, "0.7%")
    # Of the text model 17 tensors a layer and 5 globals; the rest are the towers and what projects their output.
    assert row(text, "not text")[0] == 2130 - (42 * 17 + 5)
    assert "full_attention: 7 layers, 8 query and 2 KV heads of 512" in text
    assert "sliding_attention: 35 layers, 8 query and 2 KV heads of 256, window 512" in text
    assert "KV source layers 5, 11, 17, 23" in text
    assert "layers 29, 35, 41 share the K and V of layer 23" in text
    assert "share the K and V of layer 22" in text


def test_the_parts_add_up_to_the_file(e4b_sparse_file):
    with Checkpoint.open(e4b_sparse_file) as checkpoint:
        text = "\n".join(describe(checkpoint))
        total = sum(map(checkpoint.nbytes, checkpoint.names))
    parts = [line.split("  ")[0] for line in text.split("---\n", 1)[1].split("\n\n")[0].splitlines()]
    assert len(parts) == 10
    assert sum(row(text, part)[1] for part in parts) == total


def test_classes_hold_what_the_other_implementation_has(toy, capsys):
    text = page(toy("e4b"), capsys)
    model = Gemma4ForCausalLM.from_pretrained(toy("e4b"))
    mlp = [p for name, p in model.named_parameters() if ".mlp." in name]
    assert row(text, "mlp")[:2] == (len(mlp), 2 * sum(p.numel() for p in mlp))


def test_tensors_lists_each(toy, capsys):
    folder = toy("e4b")
    text = page(folder, capsys, "--tensors")
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.names:
            (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
            assert "x".join(map(str, checkpoint.shape(name))) in line.split()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "not a Gemma 4 config"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"), "truncated"),
        (lambda folder: shutil.rmtree(folder), "no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(toy, tmp_path, capsys, damage, message):
    folder = shutil.copytree(toy("e4b"), tmp_path / "model")
    damage(folder)
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_config_that_disagrees_with_the_shapes_is_refused(toy, tmp_path, capsys):
    folder = shutil.copytree(toy("e4b"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}), encoding="utf-8")
    assert main([str(folder)]) == 2
    assert "but the config makes it" in capsys.readouterr().err
