"""The state of a run in a file: written after every layer, so that a stopped run resumes there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from epic_quant import __version__
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, SpecError, TokenError
from epic_quant.files import atomic
from epic_quant.gemma4.config import TextConfig
from epic_quant.quality.measures import TokenMeasures
from epic_quant.quality.stream import State, WindowsKV
from epic_quant.quality.variants import Variant
from epic_quant.quant import Hessian

_KEY = "epic_quant_quality_state"
_MEASURES = ("log_prob", "reference_log_prob", "kl", "same_top")


@dataclass(frozen=True)
class Identity:
    """The run that a state belongs to. The state of another run is refused."""

    checkpoint: str
    windows: str
    variants: Mapping[str, str]
    hessians: str
    version: str = __version__

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, variants: Mapping[str, Variant], windows: Tensor, hessians: Mapping[str, Hessian]
    ) -> Identity:
        """Of hessians the first in order stand for all."""
        first = next(iter(hessians), None)
        return cls(
            checkpoint=checkpoint.fingerprint,
            windows=_sha256(windows),
            variants={name: str(variant) for name, variant in variants.items()},
            hessians="none" if first is None else _sha256(hessians[first].read()),
        )

    def check(self, path: Path, found: Identity) -> None:
        """Raise CheckpointError, SpecError or TokenError, one line, where `found` in a file is another's."""
        state = f"{path}: the state of a run"
        if found.checkpoint != self.checkpoint:
            raise CheckpointError(f"{state} on checkpoint {found.checkpoint}, but this one is {self.checkpoint}")
        if found.variants != self.variants:
            both = found.variants.items() & self.variants.items()
            other = sorted(dict((found.variants.items() | self.variants.items()) - both))
            raise SpecError(f"{state} with other policies, which differ in {', '.join(other)}")
        if found.windows != self.windows:
            raise TokenError(f"{state} on other windows or another text")
        if found.hessians != self.hessians:
            raise SpecError(f"{state} that was fitted with other Hessians")
        if found.version != self.version:
            raise SpecError(f"{state} of epic_quant {found.version}, but this is {self.version}")


@dataclass
class Progress:
    """The position of a run, its pass and the layers done, and its results so far."""

    batches: Sequence[tuple[str, ...]]
    index: int = 0  # of the pass; as many as there are passes once all is done
    layers: int = 0
    states: list[State] = field(default_factory=list)
    done: dict[str, TokenMeasures] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.index == len(self.batches):
            return "the end"
        return f"layer {self.layers} of pass {self.index + 1} of {len(self.batches)}"


def save(path: Path, identity: Identity, progress: Progress) -> None:
    """Write it, whole or not at all. Raises CheckpointError where that cannot be done."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def put(tensor: Tensor) -> str:
        """The name that the tensor bears in the file; what several states hold is written once."""
        if id(tensor) not in names:
            names[id(tensor)] = name = str(len(tensors))
            tensors[name] = tensor.contiguous()
        return names[id(tensor)]

    content = {
        "identity": {**vars(identity), "variants": dict(identity.variants)},
        "batches": progress.batches,
        "index": progress.index,
        "layers": progress.layers,
        "states": [
            {
                "members": state.members,
                "hidden": put(state.hidden),
                "kv": [{source: [put(k), put(v)] for source, (k, v) in kv.shared.items()} for kv in state.kv],
            }
            for state in progress.states
        ],
        "done": {
            name: [put(getattr(measures, part)) for part in _MEASURES] for name, measures in progress.done.items()
        },
    }
    try:
        with atomic(path) as unfinished:
            save_file(tensors, unfinished, {_KEY: json.dumps(content)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the state of the run cannot be written: {error}") from error


def load(path: Path, identity: Identity, config: TextConfig) -> Progress | None:
    """What a file holds; None where there is none yet.

    Raises CheckpointError where it is no such file, and as `Identity.check` where it is of another run.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            # Copies: the file is replaced after the next layer.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found = Identity(**content["identity"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the state of an evaluation; delete it to begin anew") from error
    identity.check(path, found)

    def batch_kv(shared: Mapping[str, Sequence[str]]) -> WindowsKV:
        kv = WindowsKV(config)
        kv.shared.update({int(source): (tensors[k], tensors[v]) for source, (k, v) in shared.items()})
        return kv

    return Progress(
        batches=[tuple(batch) for batch in content["batches"]],
        index=content["index"],
        layers=content["layers"],
        states=[
            State(tuple(state["members"]), tensors[state["hidden"]], [batch_kv(kv) for kv in state["kv"]])
            for state in content["states"]
        ],
        done={name: TokenMeasures(*(tensors[part] for part in parts)) for name, parts in content["done"].items()},
    )


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
    digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
