"""Hessians of every linear layer's inputs, gathered in one streamed pass over a text and kept in a file.

They are what error compensation (`+gptq`) and importance (`+imatrix`) fit a weight to; gathered on the evaluation text
they give, exactly, the output error that a quantized weight makes on it. Of the head there is the diagonal alone, which
is its importance: it is the embedding too, for whose rows error compensation does nothing. Compensation of rows
(`+yaqa`) takes those of the gradients at the layers' outputs too, which a forward and a backward pass give.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from epic_quant import command_line
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.files import read_text, safetensors_writer, user_path
from epic_quant.gemma4.block import plain_linear, rms_norm
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.model import begin
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.prices.backward import Backward, Linear
from epic_quant.quant import Hessian, OutputHessian, Weight
from epic_quant.results.prices import IMPORTANCE
from epic_quant.spec import WeightSpec
from epic_quant.text import token_windows

# Weights that multiply the same input: the Hessians stand in the file once, under the second name.
_SHARED_INPUTS = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
_MODEL_PROJECTION, _EMBEDDING = "per_layer_model_projection.weight", "embed_tokens.weight"
_OUTPUTS = ".outputs"
# Of the labels that gradients are of.
_LABELS_SEED = 0


class Hessians(Mapping[str, Hessian]):
    """A file of Hessians: canonical tensor name to fp32 [cols, cols], the mean of x xᵀ over the inputs x.

    Or a file of prices, which has their diagonals alone: the importance of columns, [cols]. Read lazily. Weights with
    one input have one, and what was made of those of a layer is kept until another layer's are read. Where the file has
    the outputs' Hessians, each weight's has its own `output`. Raises CheckpointError where the file is missing, is no
    file of Hessians, or is of another checkpoint.
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
        self._stored = importance or {name: name for name in names if not name.endswith(_OUTPUTS)}
        self.has_outputs = any(name.endswith(_OUTPUTS) for name in names)
        self._kept: dict[str, Hessian] = {}

    def __getitem__(self, name: str) -> Hessian:
        stored = _stored_name(name)
        if stored not in self._stored:
            raise KeyError(name)
        layer = stored.split(".")[:2]
        self._kept = {kept: hessian for kept, hessian in self._kept.items() if kept.split(".")[:2] == layer}
        shared = self._kept.setdefault(stored, Hessian(partial(self._file.get_tensor, self._stored[stored])))
        if not self.has_outputs or stored == _EMBEDDING:
            return shared
        output = OutputHessian(partial(self._file.get_tensor, name + _OUTPUTS))
        return self._kept.setdefault(name + _OUTPUTS, shared.with_output(output))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _stored_name(name) in self._stored

    def check(self, specs: Iterable[WeightSpec]) -> None:
        """Raise CheckpointError where one needs what the file lacks."""
        for spec in specs:
            if spec.compensated and not self.are_whole:
                raise CheckpointError(
                    f"{spec} needs Hessians, but {self._path} has prices, which are enough for +imatrix alone; "
                    "make Hessians with: python -m epic_quant.calibration"
                )
            if spec.yaqa and not self.has_outputs:
                raise CheckpointError(
                    f"{self._path}: lacks the Hessians of outputs, which +yaqa needs; make it with: "
                    "python -m epic_quant.calibration --outputs"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._stored))

    def __len__(self) -> int:
        return len(self._stored)


def gather(
    checkpoint: Checkpoint,
    text: Path,
    windows: Tensor,
    path: Path,
    *,
    outputs: bool = False,
    progress: bool = False,
) -> Hessians:
    """Run `windows` [n, tokens] of `text` through the checkpoint in fp32, a layer at a time, and write their Hessians.

    Only one layer's Hessians are held at a time. The file takes 4 bytes times the square of the columns of each
    distinct input: 21 GB for E4B's shapes. It is written whole or not at all. With `outputs` it has those of the
    gradients at the outputs as well, by a backward pass whose hidden states wait in a file beside it.
    """
    weights = CheckpointWeights(checkpoint)
    shapes = _stored_shapes(weights, outputs)
    facts = {
        "checkpoint": checkpoint.fingerprint,
        "text_sha256": text_sha256(text),
        "num_tokens": str(windows.numel()),
    }
    try:
        with safetensors_writer(path, {name: ("F32", shape) for name, shape in shapes.items()}, facts) as write:
            streamed = itertools.chain(
                _streamed(weights, windows), _streamed_outputs(weights, windows, path.parent) if outputs else ()
            )
            for hessian in tqdm(streamed, total=len(shapes), unit="tensor", disable=not progress):
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


def _stored_shapes(weights: CheckpointWeights, outputs: bool) -> dict[str, tuple[int, ...]]:
    """The file's tensors in their order, with their shapes.

    Of inputs the model projection, layer by layer, the head; of outputs the layers from the last, the projection.
    """
    matrices = [t for t in weights.tensors.values() if len(t.shape) == 2 and not t.unused]
    layers = [t for t in matrices if t.layer is not None]
    globals_ = [t for t in matrices if t.name == _MODEL_PROJECTION]
    shapes = {t.name: 2 * t.shape[1:] for t in globals_ + layers if _stored_name(t.name) == t.name}
    backwards = sorted(layers, key=lambda t: t.layer or 0, reverse=True) + globals_ if outputs else []
    of_outputs = {t.name + _OUTPUTS: OutputHessian.shape(t.shape[0]) for t in backwards}
    return shapes | {_EMBEDDING: weights.tensors[_EMBEDDING].shape[1:]} | of_outputs


@torch.inference_mode()
def _streamed(weights: CheckpointWeights, windows: Tensor) -> Iterator[Tensor]:
    """The inputs' Hessians in the order of `_stored_shapes`, each fp32 of that shape."""
    runs = [begin(weights, window[None]) for window in windows]
    hidden, forwards = [run[0] for run in runs], [run[1] for run in runs]
    tokens = windows.numel()
    if weights.config.ple_dim:
        yield sum(_outer(x) for x in hidden) / tokens  # type: ignore[misc]
    names = list(_stored_shapes(weights, outputs=False))
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


def _streamed_outputs(weights: CheckpointWeights, windows: Tensor, folder: Path) -> Iterator[Tensor]:
    """The outputs' Hessians in the order of `_stored_shapes`, each fp32 [blocks, size, size]."""
    shapes = _stored_shapes(weights, outputs=True)
    names = [name for name in shapes if name.endswith(_OUTPUTS)]
    found: dict[str, Tensor] = {}
    for captured in Backward(weights, windows.long(), _LABELS_SEED, folder).run():
        if isinstance(captured, Linear):
            blocks, size, _ = shapes[captured.name + _OUTPUTS]
            gradients = captured.gradient.view(-1, blocks, size).transpose(0, 1)
            found[captured.name + _OUTPUTS] = gradients.mT @ gradients / windows.numel()
        while names and names[0] in found:
            yield found.pop(names.pop(0))


def _outer(x: Tensor) -> Tensor:
    """The sum of x xᵀ over all but the last dim: [..., cols] -> [cols, cols]."""
    flat = x.flatten(0, -2)
    return flat.T @ flat


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_line.parser(
        "calibration",
        "Gather the Hessians of every linear layer's inputs, for specs with +gptq, +imatrix and +yaqa.",
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
    parser.add_argument(
        "--outputs", action="store_true", help="those of the gradients at the outputs too, which +yaqa alone needs"
    )
    parser.add_argument(
        "--windows", type=int, default=32, metavar="N", help="windows of the text (32; better 128 with --outputs)"
    )
    parser.add_argument("--window-tokens", type=int, default=512, metavar="N", help="tokens of each (512)")
    options = parser.parse_args(arguments)
    with Checkpoint.open(options.source, config=options.config, tokenizer=options.tokenizer) as checkpoint:
        windows = token_windows(checkpoint, options.text, options.windows, options.window_tokens)
        shapes = _stored_shapes(CheckpointWeights(checkpoint), options.outputs)
        nbytes = 4 * sum(map(math.prod, shapes.values()))
        layers = TextConfig.read(checkpoint).num_layers
        print(f"{windows.numel():,} tokens through {layers} layers; {options.out} takes {nbytes / 1e9:,.2f} GB")
        gather(checkpoint, options.text, windows, options.out, outputs=options.outputs, progress=True)
    return 0


if __name__ == "__main__":
    command_line.leave(main)
