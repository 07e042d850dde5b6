"""Mutated inputs: whatever is read answers with one line and leaves nothing behind, soon and in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from epic_quant import inspection, predict
from epic_quant.calibration import Hessians, gather
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import EpicQuantError
from epic_quant.export.__main__ import main as export
from epic_quant.gemma4.gguf_names import gguf_name
from epic_quant.gemma4.weights import CheckpointWeights, Weights
from epic_quant.ple.traces import load_ids
from epic_quant.plugin.run import SMALL_MODEL
from epic_quant.published import PublishedWeights, open_published
from epic_quant.published.source import differences
from epic_quant.recipe.__main__ import main as recipe
from epic_quant.report.__main__ import main as report
from epic_quant.results.gate import Condition
from epic_quant.results.prices import prices_path
from epic_quant.spec import KVSpec, PLESpec, PolicySpec, WeightSpec
from epic_quant.text import token_windows

from .mutations import mutated_bytes, mutated_json, mutated_text, with_header

# Mutations of every target in the ordinary run, and in .ci/run, where all together are 20,000 or more.
FEW, MANY = 15, 2_000
MOST_NBYTES = 1_500_000_000
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_POLICIES = ("mlp=int4,mlp.down_proj@3+7-9=int8,kv=int8,ple=lru:50", "embedding=ternary,ple_table=int8,mlp@3=int4")
_SPECS = (
    (WeightSpec, "int4-g128+had256+gptq"),
    (WeightSpec, "affine3-g64"),
    (WeightSpec, "q4_k+imatrix"),
    (PLESpec, "static+lru:500"),
    (KVSpec, "k=int4-b64/v=int4"),
    (KVSpec, "int4/full.k.unrotated=int3-b64+center32+pca8-int5+unbiased/residual=32/full.sinks=4"),
)
_LIMITS = ("kl_divergence[subject=quality]:+5%", 'kl_divergence[policy="mlp=int4,kv=int8"]:0.1', "nbytes:3.5GB")
# A command line's status, and what a target gives back of it.
REFUSED = 2
# Words of the grammars, one of which stands where another was.
_WORDS = (
    *("int2", "int8", "ternary", "affine3", "codebook2", "bf16", "absmax4", "absmax3-packed", "gptq", "had32", "had3"),
    *("q4_k", "imatrix"),
    *("center8", "pca4-int4", "clip10", "unbiased", "residual=4", "sinks=1", "full.", "sliding.", "rotated", "k", "v"),
    *("mlp", "embedding", "ple_table", "kv", "ple", "lru:5", "static:0", "w-lrfu:9", "all", "g64", "b32"),
    *("0", "1", "3-1", "11", "42", "128", "nbytes", "subject", "policy", "+5%", "1e999", "nan", "2ms", "-1"),
)


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote: `read(rng, folder)` mutates, writes into `folder` and reads."""

    name: str
    read: Callable[[random.Random, Path], object]
    share: float = 1.0  # of the mutations, where one takes long


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    """The toy as one file and in two shards, and its Hessians."""
    root = tmp_path_factory.mktemp("seeds")
    sharded = root / "sharded"
    sharded.mkdir()
    tensors = load_file(model / "model.safetensors")
    weight_map = {}
    for shard, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, sharded / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (sharded / _INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    shutil.copy(model / _CONFIG, sharded)
    with Checkpoint.open(model) as checkpoint:
        text = model / "calibration.txt"
        gather(checkpoint, text, token_windows(checkpoint, text, 2, 16), root / "hessians.safetensors")
        published = {"GGUF": _gguf(CheckpointWeights(checkpoint), root / "model.gguf")}
        published["MLX"] = _mlx(CheckpointWeights(checkpoint), model, root / "MLX")
    for kind, policy in (("compressed-tensors", "mlp=int4-g16"), ("gemma", "mlp=int4,ple_table=int8")):
        published[kind] = root / kind
        assert export([str(model), "--policy", policy, "--format", kind, str(published[kind])]) == 0
    return {"whole": model, "sharded": sharded, "hessians": root / "hessians.safetensors"} | published


_TOKENIZER_CONFIG = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": "{{ messages }}"}


@cache
def _like_gemmas() -> dict[str, Any]:
    """The small model's tokenizer, cut to the toy's vocabulary."""
    content = json.loads((Path(__file__).parents[2] / SMALL_MODEL / "tokenizer.json").read_bytes())
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < 117}
    content["model"] |= {"vocab": vocab | {"a": 117, "b": 118, "ab": 119}, "merges": [["a", "b"]]}
    return content


def _gguf(weights: Weights, path: Path) -> Path:
    """The weights as gguf-py writes them, in q8_0 where whole blocks hold a row."""
    writer = GGUFWriter(path, "gemma4")
    writer.add_block_count(weights.config.num_layers)
    writer.add_sliding_window_pattern([True] * weights.config.num_layers)
    writer.add_token_list([str(number) for number in range(weights.config.vocab_size)])
    for name, tensor in weights.tensors.items():
        values = weights.get(name).float().numpy()
        kind = GGMLQuantizationType.Q8_0 if values.ndim == 2 and values.shape[1] % 32 == 0 else None
        writer.add_tensor(gguf_name(tensor), values if kind is None else quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _mlx(weights: Weights, model: Path, folder: Path) -> Path:
    """The weights, the first layer's gate projection in codes of 8 bits with groups of 16."""
    folder.mkdir()
    stored = {f"model.{name}": weights.get(name) for name in weights.tensors}
    gate = "model.layers.0.mlp.gate_proj"
    rows, cols = stored.pop(f"{gate}.weight").shape
    stored[f"{gate}.weight"] = torch.zeros(rows, cols // 4, dtype=torch.uint32)
    stored |= {f"{gate}.{part}": torch.ones(rows, cols // 16) for part in ("scales", "biases")}
    save_file(stored, folder / "model.safetensors")
    options = {"bits": 8, "group_size": 16, gate: {"bits": 8, "mode": "affine"}}
    config = json.loads((model / _CONFIG).read_bytes()) | {"quantization": options}
    (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def targets(folders, run_of_model) -> list[Target]:
    """Every kind of input, each with how it is mutated and what reads it."""
    model, sharded = folders["whole"], folders["sharded"]
    file = (model / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:header_end])
    config = json.loads((model / _CONFIG).read_bytes())
    index = json.loads((sharded / _INDEX).read_bytes())
    tokenizer = json.loads((model / "tokenizer.json").read_bytes())
    run, prices = run_of_model.read_bytes(), prices_path(run_of_model).read_bytes()
    run_json = json.loads(run)
    prices_end = 8 + int.from_bytes(prices[:8], "little")
    hessians = folders["hessians"].read_bytes()
    hessians_end = 8 + int.from_bytes(hessians[:8], "little")
    trace = io.BytesIO()
    np.save(trace, np.arange(100, dtype=np.int32))

    def dumped(value: object) -> bytes:
        return json.dumps(value).encode("utf-8", "surrogatepass")

    def either(rng: random.Random, value: object) -> bytes:
        """JSON with its content mutated, or its bytes."""
        return dumped(mutated_json(value, rng)) if rng.random() < 0.7 else mutated_bytes(dumped(value), rng)

    def read_header(rng: random.Random, folder: Path) -> object:
        if rng.random() < 0.7:
            content = with_header(mutated_json(header, rng), file[header_end:])
        else:
            content = mutated_bytes(file[:header_end], rng) + file[header_end:]
        path = _written(folder / "model.safetensors", content)
        return inspection.main([str(path), "--config", str(model / _CONFIG), "--tensors"])

    def read_index(rng: random.Random, folder: Path) -> object:
        for shard in sharded.glob("*.safetensors"):
            (folder / shard.name).symlink_to(shard)
        _written(folder / _INDEX, either(rng, index))
        return inspection.main([str(folder), "--config", str(sharded / _CONFIG)])

    def read_config(rng: random.Random, folder: Path) -> object:
        path = _written(folder / _CONFIG, either(rng, config))
        return inspection.main([str(model), "--config", str(path)])

    def windows(folder: Path, *, tokenizer: Path | None = None, text: Path = model / "text.txt") -> object:
        with Checkpoint.open(model, tokenizer=tokenizer) as checkpoint:
            return token_windows(checkpoint, text, 2, 16).tolist()

    def read_tokenizer(rng: random.Random, folder: Path) -> object:
        return windows(folder, tokenizer=_written(folder / "tokenizer.json", either(rng, tokenizer)))

    def read_text(rng: random.Random, folder: Path) -> object:
        text = mutated_bytes((model / "text.txt").read_bytes()[:400], rng)
        return windows(folder, text=_written(folder / "text.txt", text))

    def read_hessians(rng: random.Random, folder: Path) -> object:
        path = _written(folder / "hessians.safetensors", damaged(rng, hessians, hessians_end))
        with Checkpoint.open(model) as checkpoint:
            return [hessian.read().shape for hessian in Hessians(path, checkpoint).values()]

    def damaged(rng: random.Random, content: bytes, end: int) -> bytes:
        if rng.random() < 0.5:
            return with_header(mutated_json(json.loads(content[8:end]), rng), content[end:])
        return mutated_bytes(content[:end], rng) + content[end:]

    def read_prices(rng: random.Random, folder: Path) -> object:
        _written(folder / "out.json", run)
        _written(folder / prices_path(run_of_model).name, damaged(rng, prices, prices_end))
        return tell(rng, folder)

    def tell(rng: random.Random, folder: Path) -> object:
        path = str(folder / "out.json")
        if rng.random() < 0.5:
            return predict.main([path, "--policy", "int4"])
        return recipe([path, "--bits", "4"])

    def read_run(rng: random.Random, folder: Path) -> object:
        _written(folder / "out.json", either(rng, run_json))
        _written(folder / prices_path(run_of_model).name, prices)
        if rng.random() < 0.5:
            return tell(rng, folder)
        return report([str(folder / "out.json"), "--format", "csv", "--out", "-"])

    def read_reported(rng: random.Random, folder: Path) -> object:
        path = _written(folder / "out.json", dumped(mutated_json(run_json, rng)))
        return report([str(path), "--format", "md", "--out", "-"])

    def read_partial(rng: random.Random, folder: Path) -> object:
        facts = next(key for key in run_json if key.startswith("epic"))
        names = [entry["name"] for entry in run_json["benchmarks"]][:12]
        lines: list[object] = [{facts: run_json[facts], "planned": names, "datetime": run_json["datetime"]}]
        for entry in run_json["benchmarks"][:12]:
            lines.append({"test": entry["name"], "record": entry["extra_info"][facts]})
            lines.append({"test": entry["name"], "outcome": "passed", "median": 0.5})
        if rng.random() < 0.7:
            lines = mutated_json(lines, rng)
        content = b"".join(dumped(line) + b"\n" for line in lines)
        if rng.random() < 0.3:
            content = mutated_bytes(content, rng)
        path = _written(folder / "out.partial.jsonl", content)
        return report([str(path), "--format", "csv", "--out", "-"])

    def read_trace(rng: random.Random, folder: Path) -> object:
        return load_ids(_written(folder / "trace.npy", mutated_bytes(trace.getvalue(), rng)), 120).tolist()

    def read_policy(rng: random.Random, folder: Path) -> object:
        text = mutated_text(rng.choice(_POLICIES), rng, _WORDS)
        policy = PolicySpec.parse(text)
        assert PolicySpec.parse(str(policy)) == policy
        return predict.main([str(run_of_model), "--policy", text])

    def read_spec(rng: random.Random, folder: Path) -> object:
        kind, text = rng.choice(_SPECS)
        text = mutated_text(text, rng, _WORDS)
        spec = kind.parse(text)
        assert kind.parse(str(spec)) == spec
        return spec

    def read_limit(rng: random.Random, folder: Path) -> object:
        return Condition.parse(mutated_text(rng.choice(_LIMITS), rng, _WORDS))

    def opened(path: Path) -> object:
        """Headers, what differs from the checkpoint, and every weight decoded."""
        with Checkpoint.open(model) as checkpoint:
            plain = CheckpointWeights(checkpoint)
            weights = PublishedWeights(open_published(str(path)), plain.config)
            for tensor in weights.tensors.values():
                weight = weights.get(tensor.name)
                assert weight.shape == tensor.shape
                assert isinstance(weight, Tensor) or weight.dequantize().isfinite().all()
            return differences(weights, plain), weights.file.specs(plain.config), weights.file.fingerprint

    gguf = folders["GGUF"].read_bytes()
    gguf_end = GGUFReader(folders["GGUF"]).data_offset

    def read_gguf(rng: random.Random, folder: Path) -> object:
        head = bytearray(gguf[:gguf_end])
        if rng.random() < 0.5:
            at = rng.randrange(4, gguf_end - 8)
            head[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        else:
            head[:] = mutated_bytes(bytes(head), rng)
        content = bytes(head) + gguf[gguf_end:]
        return opened(_written(folder / "model.gguf", content[: rng.choice((None, None, rng.randrange(len(gguf))))]))

    def read_folder(kind: str, rng: random.Random, folder: Path) -> object:
        config = json.loads((folders[kind] / _CONFIG).read_bytes())
        content = (folders[kind] / "model.safetensors").read_bytes()
        match rng.randrange(3):
            case 0:
                content = damaged(rng, content, 8 + int.from_bytes(content[:8], "little"))
            case 1:
                key = "quantization" if kind == "MLX" else "quantization_config"
                config[key] = mutated_json(config[key], rng)
            case _:
                config = mutated_json(config, rng)
        _written(folder / _CONFIG, dumped(config))
        _written(folder / "model.safetensors", content)
        return opened(folder)

    def read_exported(rng: random.Random, folder: Path) -> object:
        (folder / "model.safetensors").symlink_to(model / "model.safetensors")
        beside = {_CONFIG: config, "tokenizer.json": _like_gemmas(), "tokenizer_config.json": _TOKENIZER_CONFIG}
        mutated = rng.choice(list(beside))
        for name, content in beside.items():
            _written(folder / name, either(rng, content) if name == mutated else dumped(content))
        policy, kind = rng.choice((("bf16", "gguf"), ("mlp=int8", "compressed-tensors"), ("mlp=int4", "gemma")))
        status = export([str(folder), "--policy", policy, "--format", kind, "--nearest", str(folder / "out")])
        if status == 0:
            (folder / "out").unlink() if kind == "gguf" else shutil.rmtree(folder / "out")
        return status

    return [
        Target("GGUF", read_gguf),
        *(Target(kind, partial(read_folder, kind), share=0.5) for kind in ("compressed-tensors", "gemma", "MLX")),
        Target("export", read_exported, share=0.5),
        Target("header", read_header),
        Target("index", read_index),
        Target("config", read_config),
        Target("tokenizer", read_tokenizer),
        Target("text", read_text),
        Target("hessians", read_hessians),
        Target("prices", read_prices, share=0.5),
        Target("run's JSON", read_run, share=0.04),
        Target("partial file", read_partial, share=0.04),
        Target("report", read_reported, share=0.01),
        Target("trace", read_trace),
        Target("policy", read_policy),
        Target("spec", read_spec),
        Target("limit", read_limit),
    ]


@pytest.mark.parametrize("each", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutated_inputs_are_read_or_refused_in_one_line(targets, each, tmp_path, watched, capsys):
    """Refused means an exception of ours with one line, or status 2 with one line on stderr."""
    begun, memory, lines, faults, total = time.perf_counter(), _peak_nbytes(), [], {}, 0
    for target in targets:
        count = max(3, round(each * target.share))
        total += count
        outcomes, slowest_s, first = Counter(), 0.0, time.perf_counter()
        for number in range(count):
            folder = tmp_path / "one"
            folder.mkdir()
            what = f"{target.name}, seed {zlib.crc32(f'{target.name} {number}'.encode())}"
            started = time.perf_counter()
            with watched(what):
                outcome, fault = _read(target, what, folder)
            slowest_s = max(slowest_s, time.perf_counter() - started)
            outcomes[outcome] += 1
            if fault:
                faults.setdefault((target.name, fault), what)
            shutil.rmtree(folder)
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
        taken_s = time.perf_counter() - first
        lines.append(f"{target.name}: {counts}; {taken_s:.1f} s, the slowest {slowest_s:.2f} s")
    grown = _peak_nbytes() - memory
    lines.append(f"{total:,} mutations in {time.perf_counter() - begun:.0f} s; memory grew by {grown / 1e6:.0f} MB")
    with capsys.disabled():
        print("", *lines, sep="\n  ")
    assert not faults, "\n".join(f"{what}: {fault}" for (_, fault), what in faults.items())
    assert each < MANY or total >= 20_000
    assert grown < MOST_NBYTES


def _read(target: Target, what: str, folder: Path) -> tuple[str, str | None]:
    """What became of one mutation, and what is wrong with that."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            refused = target.read(random.Random(int(what.split()[-1])), folder) == REFUSED
        said = err.getvalue()
    except EpicQuantError as error:
        refused, said = True, " ".join(str(error).split())  # as a command line prints it
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A panic of a library in Rust is no Exception.
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error!s:.300}"
    fault = None
    if refused and len(said.strip().splitlines()) != 1:
        fault = f"expected one line, found {said[:500]!r}"
    elif refused and out.getvalue():
        fault = f"printed before it was refused: {out.getvalue()[:100]!r}"
    elif left := {path.name for path in folder.iterdir()} - _WRITTEN:
        fault = f"left {sorted(left)}"
    return "refused" if refused else "read", fault


_WRITTEN: set[str] = {"0.safetensors", "1.safetensors", "model.safetensors"}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    _WRITTEN.add(path.name)
    return path


def _peak_nbytes() -> int:
    """The most memory that the process has had; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
