"""Odd inputs, made by code, as public bug reports describe them: each is measured right, or refused by name.

`pytest -v tests/hostile/test_corpus.py` prints a line of verdict for each.
"""

from __future__ import annotations

import codecs
import json
import math
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import EpicQuantError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import text_tensors
from epic_quant.policy import check
from epic_quant.quality import measure
from epic_quant.spec import PolicySpec
from epic_quant.text import token_windows
from epic_quant.values import check_values

WEIGHTS, INDEX, CONFIG, TOKENIZER, TEXT = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "text.txt",
)
EMBEDDING, TABLE = "model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"
MATRIX = "model.layers.1.mlp.up_proj.weight"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What is done to a copy of the toy's folder, and what the answer must hold; None where it must not matter."""

    name: str
    spoil: Callable[[Path], object]
    refused: str | None = None
    policy: str = "bf16"


def tensors(change: Callable[[Tensors], object], *, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    """The weights after a change in place."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def renamed(prefix: Callable[[str], str]) -> Callable[[Path], None]:
    """Every tensor under another name."""

    def change(found: Tensors) -> None:
        for name in list(found):
            found[prefix(name)] = found.pop(name)

    return tensors(change)


def with_tensors(**more: Callable[[Tensors], Tensor]) -> Callable[[Path], None]:
    """Tensors more than a text model has; `__` stands for a dot."""

    def change(found: Tensors) -> None:
        found |= {name.replace("__", "."): make(found).clone() for name, make in more.items()}

    return tensors(change)


def other_head(found: Tensors) -> Tensor:
    """The embedding but for its last weight."""
    head = found[EMBEDDING].clone()
    head[-1, -1] += 1
    return head


def all_as(dtype: torch.dtype, factor: float = 1.0) -> Callable[[Path], None]:
    """All tensors in a dtype that holds what bf16 holds here, times a factor."""

    def change(found: Tensors) -> None:
        found |= {name: tensor.to(dtype) * factor for name, tensor in found.items()}

    return tensors(change)


def element(value: float, name: str = MATRIX) -> Callable[[Path], None]:
    """One weight in row 3 set to a value."""

    def change(found: Tensors) -> None:
        found[name][3, 5] = value

    return tensors(change)


def stored_as(name: str, dtype: torch.dtype, **companions: Tensor) -> Callable[[Path], None]:
    """A matrix as codes of another dtype, with what else such a format stores beside it."""

    def change(found: Tensors) -> None:
        found[name] = found[name].mul(10).to(dtype) if dtype != torch.bool else found[name] > 0
        found |= {f"{name.removesuffix('.weight')}.{key}": value for key, value in companions.items()}

    return tensors(change)


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A JSON file after a change in place."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return spoil


def config(**values: object) -> Callable[[Path], None]:
    """The config with some fields set."""
    return json_file(CONFIG, lambda content: content.update(values))


def without(*fields: str) -> Callable[[Path], None]:
    """The config without some fields."""
    return json_file(CONFIG, lambda content: [content.pop(name) for name in fields])


def text(content: bytes) -> Callable[[Path], None]:
    """Another evaluation text."""
    return lambda folder: (folder / TEXT).write_bytes(content)


def sharded(promised: Callable[[dict[str, str]], object] = lambda _: None, *, twice: str | None = None) -> Any:
    """The weights in two shards with an index, which may promise something else; one tensor may be in both."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        names = sorted(found)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        weight_map = {name: shard for shard, inside in shards.items() for name in inside}
        for shard, inside in shards.items():
            content = {name: found[name] for name in inside}
            if twice is not None and twice not in inside:
                content[twice] = torch.zeros_like(found[twice])
            save_file(content, folder / shard)
        promised(weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        (folder / WEIGHTS).unlink()

    return spoil


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A file's bytes changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def tokenizer(**values: object) -> Callable[[Path], None]:
    """The tokenizer with some fields set."""
    return json_file(TOKENIZER, lambda content: content.update(values))


def vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Path], None]:
    """The tokenizer's vocabulary after a change in place."""
    return json_file(TOKENIZER, lambda content: change(content["model"]["vocab"]))


def five_words(vocab: dict[str, int]) -> None:
    vocab.clear()
    vocab |= {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "the": 4}


def without_bos(vocab: dict[str, int]) -> None:
    vocab["x"] = vocab.pop("<bos>")


_CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
_PADDED = {
    "strategy": {"Fixed": 4096},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
_WORDS = " ".join(str(4 + number % 100) for number in range(2_000)).encode()

CASES = (
    Case("as it is", lambda folder: None),
    # Weights in other places, under other names and in other dtypes.
    Case("shards", sharded()),
    Case("a tensor in two shards, the index names one", sharded(twice=EMBEDDING)),
    Case(
        "an index that names a shard that is not there",
        sharded(lambda m: m.update({EMBEDDING: "c.safetensors"})),
        "c.safetensors",
    ),
    Case(
        "an index that leaves the folder",
        sharded(lambda m: m.update({EMBEDDING: "../a.safetensors"})),
        "../a.safetensors",
    ),
    Case("names under base_model.model.", renamed(lambda name: f"base_model.model.{name}")),
    Case("names under module.", renamed(lambda name: f"module.{name}")),
    Case("names under _orig_mod.", renamed(lambda name: f"_orig_mod.{name}")),
    Case("names under no prefix", renamed(lambda name: name.removeprefix("model."))),
    Case("names under module._orig_mod.", renamed(lambda name: f"module._orig_mod.{name}")),
    Case("names of compiled layers", renamed(lambda name: name.replace(".mlp.", "._orig_mod.mlp."))),
    Case("names of sharded training", renamed(lambda n: n.replace("model.", "model._fsdp_wrapped_module.", 1))),
    Case("names of the multimodal class", renamed(lambda name: name.replace("model.", "model.language_model.", 1))),
    Case("names of another layout", renamed(lambda name: f"gpt.{name.replace('layers', 'blocks')}"), "gpt."),
    Case("fp32", all_as(torch.float32)),
    Case("fp16", all_as(torch.float16)),
    Case("fp64", all_as(torch.float64)),
    Case("fp32 that rounds to the same bf16", all_as(torch.float32, 1 + 2**-12)),
    Case("fp64 that rounds to the same bf16", all_as(torch.float64, 1 - 2**-12)),
    Case("int8 with a scale", stored_as(MATRIX, torch.int8, weight_scale=torch.ones(1)), "up_proj"),
    Case("int8 without a scale", stored_as(TABLE, torch.int8), "embed_tokens_per_layer"),
    Case(
        "float8 with an inverse scale",
        stored_as(MATRIX, torch.float8_e4m3fn, weight_scale_inv=torch.ones(1)),
        "up_proj",
    ),
    Case("float8 without a scale", stored_as(MATRIX, torch.float8_e5m2), "up_proj"),
    Case("int4 packed under another name", renamed(lambda n: n.replace(MATRIX, f"{MATRIX}_packed")), "up_proj"),
    Case("codes of GPTQ", renamed(lambda n: n.replace(MATRIX, MATRIX.replace("weight", "qweight"))), "up_proj.qweight"),
    Case("layers wrapped for an adapter", renamed(lambda n: n.replace("proj.", "proj.base_layer.")), "base_layer"),
    Case("codes in uint8 with absmax", stored_as(MATRIX, torch.uint8, **{"weight.absmax": torch.ones(4)}), "up_proj"),
    Case("boolean weights", stored_as(MATRIX, torch.bool), "up_proj"),
    Case(
        "scales beside bf16",
        with_tensors(model__layers__1__mlp__up_proj__scales=lambda t: torch.ones(1)),
        "up_proj.scales",
    ),
    Case("a config that says quantized", config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    Case("a config of MLX that says quantized", config(quantization={"group_size": 64, "bits": 4}), "quantization"),
    # Heads and adapters.
    Case("a head equal to the embedding", with_tensors(lm_head__weight=lambda t: t[EMBEDDING])),
    Case("a head that differs in one weight", with_tensors(lm_head__weight=other_head), "lm_head.weight"),
    Case("a head of another shape", with_tensors(lm_head__weight=lambda t: t[EMBEDDING][1:]), "lm_head.weight"),
    Case("a bias", with_tensors(model__layers__1__mlp__up_proj__bias=lambda t: torch.ones(80)), "up_proj.bias"),
    Case("a tower beside", with_tensors(model__vision_tower__layers__0__weight=lambda t: torch.ones(3))),
    Case("a tensor of nothing known", with_tensors(model__value_head__weight=lambda t: torch.ones(3)), "value_head"),
    Case(
        "an adapter", with_tensors(model__layers__1__mlp__up_proj__lora_A__weight=lambda t: torch.ones(2, 48)), "lora_A"
    ),
    # Values.
    Case("a NaN", element(math.nan), "up_proj"),
    Case("an infinity", element(-math.inf), "up_proj"),
    Case("a value beyond fp16's scales", element(3e38), "up_proj"),
    Case("a NaN in a table", element(math.nan, TABLE), "embed_tokens_per_layer"),
    # Damaged files.
    Case("cut off", bytes_of(WEIGHTS, lambda data: data[:-1]), "truncated"),
    Case("overlong", bytes_of(WEIGHTS, lambda data: data + b"\0"), "overlong"),
    Case("empty", bytes_of(WEIGHTS, lambda data: b""), "empty"),
    Case(
        "a pointer of git lfs", bytes_of(WEIGHTS, lambda data: b"version https://git-lfs.github.com/spec/v1\n"), WEIGHTS
    ),
    Case("a page of HTML", bytes_of(WEIGHTS, lambda data: b"<!doctype html><html>not found</html>"), WEIGHTS),
    Case("no weights", lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
    Case("a tensor missing", tensors(lambda found: found.pop(MATRIX)), "up_proj"),
    Case(
        "a shape that the config contradicts",
        tensors(lambda found: found.update({MATRIX: torch.ones(81, 48)})),
        "up_proj",
    ),
    # Configs.
    Case("no config", lambda folder: (folder / CONFIG).unlink(), "config.json"),
    Case("a config with a byte-order mark", bytes_of(CONFIG, lambda data: codecs.BOM_UTF8 + data)),
    Case("another model's config", config(model_type="llama"), "llama"),
    Case("no BOS in the config", without("bos_token_id")),
    Case("no epsilon in the config", without("rms_norm_eps")),
    Case("no longest context in the config", without("max_position_embeddings")),
    Case("layers beyond any memory", config(num_hidden_layers=10**9, layer_types=None), "layers"),
    Case("a hidden size of zero", config(hidden_size=0), "hidden_size"),
    # Tokenizers and texts.
    Case("truncation", tokenizer(truncation=_CUT)),
    Case("padding", tokenizer(padding=_PADDED)),
    Case("a token more than the model", vocabulary(lambda vocab: vocab.update({"extra": 120}))),
    Case("a tokenizer of five words", vocabulary(five_words), TOKENIZER),
    Case("a tokenizer without BOS", vocabulary(without_bos), "BOS"),
    Case("no tokenizer", lambda folder: (folder / TOKENIZER).unlink(), "tokenizer.json"),
    Case("a tokenizer with a byte-order mark", bytes_of(TOKENIZER, lambda data: codecs.BOM_UTF8 + data)),
    Case("a text with a byte-order mark", text(codecs.BOM_UTF8 + _WORDS)),
    Case("a text with the line breaks of Windows", text(_WORDS.replace(b" ", b"\r\n"))),
    Case("a text in UTF-16", text(_WORDS.decode().encode("utf-16")), TEXT),
    Case("a text that is no text", text(bytes(range(256)) * 40), TEXT),
    Case("an empty text", text(b""), TEXT),
    Case("a text of unknown words", text(b"lorem ipsum " * 2000), TEXT),
    Case(
        "a token that the model lacks",
        lambda folder: (vocabulary(lambda v: v.update({"extra": 120}))(folder), text(b"extra " * 2000)(folder)),
        "120",
    ),
    # Policies that do not fit.
    Case("a group that does not divide a row", lambda folder: None, "48", policy="mlp=int4-g32"),
    Case("a layer that is not there", lambda folder: None, "99", policy="mlp@99=int4"),
)


@pytest.fixture(scope="module")
def perplexity(model) -> float:
    """That of the toy as it is."""
    return measured(model, "bf16")


def measured(folder: Path, policy: str) -> float:
    """The perplexity under a policy, as a run of the benchmarks has it."""
    with Checkpoint.open(folder) as checkpoint:
        spec = PolicySpec.parse(policy)
        config = TextConfig.read(checkpoint)
        check(spec, config)
        deque(check_values(checkpoint, text_tensors(checkpoint, config).values()), maxlen=0)
        windows = token_windows(checkpoint, folder / TEXT, 2, 33)
        return measure(checkpoint, {"asked": spec}, windows).tokens["asked"].quality().perplexity


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_odd_input_is_measured_right_or_refused_by_name(case, model, perplexity, tmp_path, record_property, watched):
    """What does not matter changes no number; what does is refused in one line that names it."""
    folder = shutil.copytree(model, tmp_path / "model")
    case.spoil(folder)
    with watched(case.name):
        try:
            found = measured(folder, case.policy)
        except EpicQuantError as error:
            verdict = " ".join(str(error).replace(str(tmp_path), "").split())
            record_property("verdict", f"{case.name}: refused: {verdict}")
            assert case.refused is not None, verdict
            assert case.refused in verdict
            return
    record_property("verdict", f"{case.name}: perplexity {found:.6g}, {perplexity:.6g} as it is")
    assert case.refused is None, f"measured, though {case.refused} is wrong"
    assert found == pytest.approx(perplexity, rel=1e-6)
