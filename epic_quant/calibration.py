"""Hessians of every linear layer's inputs, gathered in one streamed pass over a text and kept in a file.

They are what error compensation (`+gptq`) and importance (`+imatrix`) fit a weight to; gathered on the evaluation text
they give, exactly, the output error that a quantized weight makes on it. Of the head there is the diagonal alone, which
is its importance: it is the embedding too, for whose rows error compensation does nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from epic_quant import command_line
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, SpecError
from epic_quant.files import read_text, safetensors_writer, user_path
from epic_quant.gemma4.block import plain_linear, rms_norm
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.model import begin
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.quant import Hessian, Weight
from epic_quant.results.prices import IMPORTANCE
from epic_quant.spec import PolicySpec
from epic_quant.text import token_windows

# Weights that multiply the same input: the Hessians stand in the file once, under the second name.
_SHARED_INPUTS = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
_MODEL_PROJECTION, _EMBEDDING = "per_layer_model_projection.weight", "embed_tokens.weight"


class Hessians(Mapping[str, Hessian]):
    """A file of Hessians: canonical tensor name to fp32 [cols, cols], the mean of x xᵀ over the inputs x.

    Or a file of prices, which has their diagonals alone: the importance of columns, [cols]. Read lazily. Weights with
    one input have one, and what was made of those of a layer is kept until another layer's are read. Raises
    CheckpointError where the file is missing, is no file of Hessians, or is of another checkpoint.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a file of Hessians: {error}") from error
        facts = self._file.metadata() or {}
        if "text_sha256" not in facts or "checkpoint" not in facts:
            raise CheckpointError(f"{path}: not a file of Hessians: it names no checkpoint and no text")
        if facts["checkpoint"] != checkpoint.fingerprint:
            raise CheckpointError(
                f"{path}: hessians of checkpoint {facts['checkpoint']}, "
                f"but {checkpoint.source} is {checkpoint.fingerprint}"
            )
        self.text_sha256 = facts["text_sha256"]
        self.num_tokens = int(facts["num_tokens"])
        names = set(self._file.keys())
        importance = {name.removeprefix(IMPORTANCE): name for name in names if name.startswith(IMPORTANCE)}
        self._path, self.are_whole = path, not importance
        self._stored = importance or {name: name for name in names}
        self._kept: dict[str, Hessian] = {}

    def __getitem__(self, name: str) -> Hessian:
        stored = _stored_name(name)
        if stored not in self._stored:
            raise KeyError(name)
        layer = stored.split(".")[:2]
        self._kept = {kept: hessian for kept, hessian in self._kept.items() if kept.split(".")[:2] == layer}
        return self._kept.setdefault(stored, Hessian(partial(self._file.get_tensor, self._stored[stored])))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _stored_name(name) in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._stored))

    def __len__(self) -> int:
        return len(self._stored)

    def check(self, policy: PolicySpec) -> None:
        """Raise SpecError where a policy compensates errors, for which the importance in prices is not enough."""
        if not self.are_whole and any(spec.gptq for spec in policy.weight_specs):
            raise SpecError(
                f"{policy.name}: +gptq needs Hessians, but {self._path} has prices, which are enough for "
                "+imatrix alone; make Hessians with: python -m epic_quant.calibration"
            )


def gather(checkpoint: Checkpoint, text: Path, windows: Tensor, path: Path, *, progress: bool = False) -> Hessians:
    """Run `windows` [n, tokens] of `text` through the checkpoint in fp32, a layer at a time, and write their Hessians.

    Only one layer's Hessians are held at a time. The file takes 4 bytes times the square of the columns of each
    distinct input: 21 GB for E4B's shapes. It is written whole or not at all.
    """
    weights = CheckpointWeights(checkpoint)
    shapes = _stored_shapes(weights)
    facts = {
        "checkpoint": checkpoint.fingerprint,
        "text_sha256": text_sha256(text),
        "num_tokens": str(windows.numel()),
    }
    try:
        with safetensors_writer(path, {name: ("F32", shape) for name, shape in shapes.items()}, facts) as write:
            for hessian in tqdm(_streamed(weights, windows), total=len(shapes), unit="tensor", disable=not progress):
                write(hessian.numpy().data)
    except OSError as error:
        raise CheckpointError(f"{path}: the Hessians cannot be written: {error}") from error
    return Hessians(path, checkpoint)


def text_sha256(path: Path) -> str:
    """The hex digest that identifies a text, to check that fitting and evaluation do not share one.

    A byte-order mark and the kind of line breaks do not count. Raises OSError and ValueError as `files.open_text`.
    """
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def _stored_name(name: str) -> str:
    for own, shared in _SHARED_INPUTS.items():
        name = name.replace(own, shared)
    return name


def _stored_shapes(weights: CheckpointWeights) -> dict[str, tuple[int, ...]]:
    """The file's tensors in their order, with their shapes: the model projection, layer by layer, the head."""
    matrices = [t for t in weights.tensors.values() if len(t.shape) == 2 and not t.unused]
    layers = {t.name: 2 * t.shape[1:] for t in matrices if t.layer is not None and _stored_name(t.name) == t.name}
    globals_ = {t.name: 2 * t.shape[1:] for t in matrices if t.name == _MODEL_PROJECTION}
    return globals_ | layers | {_EMBEDDING: weights.tensors[_EMBEDDING].shape[1:]}


@torch.inference_mode()
def _streamed(weights: CheckpointWeights, windows: Tensor) -> Iterator[Tensor]:
    """The Hessians in the order of `_stored_shapes`, each fp32 of that shape."""
    runs = [begin(weights, window[None]) for window in windows]
    hidden, forwards = [run[0] for run in runs], [run[1] for run in runs]
    tokens = windows.numel()
    if weights.config.ple_dim:
        yield sum(_outer(x) for x in hidden) / tokens  # type: ignore[misc]
    names = list(_stored_shapes(weights))
    for spec in weights.config.layers:
        layer = weights.layer(spec.index)
        sums: dict[str, Tensor] = {}

        def observe(
            x: Tensor, weight: Weight, name: str, index: int = spec.index, sums: dict[str, Tensor] = sums
        ) -> Tensor:
            full_name = f"layers.{index}.{name}"
            if _stored_name(full_name) == full_name:
                sums[full_name] = sums[full_name] + _outer(x) if full_name in sums else _outer(x)
            return plain_linear(x, weight)

        hidden = [forward.layer(x, layer, spec, observe) for x, forward in zip(hidden, forwards, strict=True)]
        for name in names:
            if name in sums:
                yield sums[name] / tokens
    norm, eps = weights.get("norm.weight"), weights.config.rms_norm_eps
    yield sum(rms_norm(x, norm, eps).square().sum((0, 1)) for x in hidden) / tokens  # type: ignore[misc]


def _outer(x: Tensor) -> Tensor:
    """The sum of x xᵀ over all but the last dim: [..., cols] -> [cols, cols]."""
    flat = x.flatten(0, -2)
    return flat.T @ flat


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_line.parser(
        "calibration",
        "Gather the Hessians of every linear layer's inputs, for specs with +gptq and +imatrix.",
        [
            "python -m epic_quant.calibration path/to/gemma-4-E4B --text calibration.txt --out hessians.safetensors",
            "pytest benchmarks --checkpoint path/to/gemma-4-E4B --hessians hessians.safetensors --benchmark-json "
            "out.json",
        ],
        "0; 2 if the checkpoint or the text cannot be read, or the Hessians cannot be written.",
    )
    command_line.add_checkpoint(parser, "config", "tokenizer")
    parser.add_argument(
        "--text", type=user_path, required=True, metavar="FILE", help="calibration text, never the evaluation text"
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="FILE", help="the file of Hessians to write")
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="windows of the text (32)")
    parser.add_argument("--window-tokens", type=int, default=512, metavar="N", help="tokens of each (512)")
    options = parser.parse_args(arguments)
    with Checkpoint.open(options.source, config=options.config, tokenizer=options.tokenizer) as checkpoint:
        windows = token_windows(checkpoint, options.text, options.windows, options.window_tokens)
        nbytes = 4 * sum(map(math.prod, _stored_shapes(CheckpointWeights(checkpoint)).values()))
        layers = TextConfig.read(checkpoint).num_layers
        print(f"{windows.numel():,} tokens through {layers} layers; {options.out} takes {nbytes / 1e9:,.2f} GB")
        gather(checkpoint, options.text, windows, options.out, progress=True)
    return 0


if __name__ == "__main__":
    command_line.leave(main)
