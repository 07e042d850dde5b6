"""`python -m epic_quant.export SOURCE --policy P --format gguf OUT`: hand over what was chosen."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from epic_quant import command_line
from epic_quant.calibration import Hessians
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import ExportError, SpecError
from epic_quant.export import gguf
from epic_quant.export.compressed_tensors import CompressedTensors
from epic_quant.export.gemma import Gemma
from epic_quant.export.holding import held
from epic_quant.files import user_path
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor
from epic_quant.policy import PolicyWeights, check
from epic_quant.spec import FORMATS, KVSpec, KVStorageSpec, PLESpec, PolicySpec, WeightSpec


class _Format(Protocol):
    def candidates(self, tensor: TextTensor, spec: WeightSpec) -> Sequence[WeightSpec]: ...
    def write(self, checkpoint: Checkpoint, weights: PolicyWeights, policy: PolicySpec, out: Path) -> None: ...


_FORMATS: Mapping[str, _Format] = {"gguf": gguf, "compressed-tensors": CompressedTensors(), "gemma": Gemma()}


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; 0, or 2 with one line on stderr where that cannot be."""
    options = _parser().parse_args(arguments)
    file_format = _FORMATS[options.format]
    policy = command_line.policy_of(options.policy)
    if policy.file is not None:
        raise SpecError(f"{policy.name}: file:{policy.file} is quantized already; expected a policy of formats")
    if os.path.lexists(options.out):
        raise ExportError(f"{options.out}: exists already; expected the name of a file or folder to make")
    with Checkpoint.open(options.source, config=options.config, tokenizer=options.tokenizer) as checkpoint:
        config = TextConfig.read(checkpoint)
        check(policy, config)
        written = held(policy, config, options.format, file_format.candidates, options.nearest)
        if written.needs_hessians and options.hessians is None:
            raise SpecError(f"{policy.name}: needs --hessians; make them with: python -m epic_quant.calibration")
        hessians = Hessians(options.hessians, checkpoint) if options.hessians else None
        if hessians is not None:
            hessians.check(written.weight_specs)
        weights = PolicyWeights(checkpoint, written, hessians)
        try:
            file_format.write(checkpoint, weights, written, options.out)
        except OSError as error:
            raise ExportError(f"{options.out}: cannot be written: {error.strerror or error}") from error
    print(f"{options.out}: {_nbytes(options.out):,} bytes")
    for line in _notes(policy, written, options.format):
        print(line)
    return 0


def _nbytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _notes(policy: PolicySpec, written: PolicySpec, file_format: str) -> Iterator[str]:
    """What was changed, and what of the policy no file of weights holds."""
    if written.weights != policy.weights:
        yield f"written as: {written}"
    left = PolicySpec(policy.name, kv=policy.kv, ple=policy.ple, kv_layers=policy.kv_layers)
    if left != PolicySpec(policy.name):
        yield f"not in the file: {left}"
    if not all(kv.is_plain for kv in _kv_specs(policy)):
        yield f"K and V, the nearest in {_cache_option(policy, file_format)}"
    if policy.ple != PLESpec():
        yield f"PLE rows: {_PLE[file_format]}"


def _kv_specs(policy: PolicySpec) -> list[KVSpec]:
    return [policy.kv, *(kv for _, kv in policy.kv_layers)]


def _cache_option(policy: PolicySpec, file_format: str) -> str:
    """What to pass to the engine."""
    if file_format != "gguf":
        return _CACHE[file_format]
    layers = [layer for kv in _kv_specs(policy) for layer in (kv.full, kv.sliding)]
    k = _cache_type([storage for layer in layers for storage in layer.k])
    v = _cache_type([storage for layer in layers for storage in layer.v])
    return f"llama.cpp: --flash-attn on --cache-type-k {k} --cache-type-v {v}"


def _cache_type(storages: Sequence[KVStorageSpec]) -> str:
    """llama.cpp's type with the nearest number of levels to those of the storage that has the most."""
    if any(storage.is_plain for storage in storages):
        return "f16"
    levels = max(storage.quantizer.info.num_levels for storage in storages)
    return min(_CACHE_TYPES, key=lambda name: abs(math.log2(FORMATS[name].num_levels / levels)))


_CACHE_TYPES = ("q8_0", "q5_0", "q4_0")
_CACHE = {
    "compressed-tensors": "vLLM: --kv-cache-dtype fp8",
    "gemma": 'transformers: generate(cache_implementation="quantized", cache_config={"nbits": 4})',
}
_PLE = {
    "gguf": "llama.cpp maps the file, so that the rows used last stay in RAM while there is room",
    "compressed-tensors": "the engine holds all of them",
    "gemma": "transformers holds all of them",
}


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        "export",
        "Write a checkpoint's weights under a policy as a file that engines load.",
        [
            "python -m epic_quant.recipe out.json --bits 4.5 --format gguf --out small.policy",
            "python -m epic_quant.export path/to/gemma-4-E4B --policy @small.policy --format gguf small.gguf",
        ],
        "0; 2 on bad input, or where the format cannot hold the policy: nothing is written.",
    )
    command_line.add_checkpoint(parser, "config", "tokenizer")
    parser.add_argument("--policy", required=True, metavar="NAME|STRING|@FILE", help="what each tensor is stored in")
    parser.add_argument(
        "--format",
        required=True,
        choices=_FORMATS,
        help="gguf: one file, for llama.cpp; compressed-tensors: a folder for vLLM and transformers, int4 and int8; "
        "gemma: a folder for transformers, int2, int4 and int8 with a scale for each row",
    )
    parser.add_argument(
        "out", type=user_path, metavar="OUT", help="the file or folder to make; nothing may have its name yet"
    )
    parser.add_argument(
        "--hessians",
        type=user_path,
        metavar="FILE",
        help="Hessians of the checkpoint, for +gptq, +yaqa and +imatrix; for +imatrix alone a run's prices too",
    )
    parser.add_argument("--nearest", action="store_true", help="take the nearest spec for those that the format lacks")
    return parser


if __name__ == "__main__":
    command_line.leave(main)
