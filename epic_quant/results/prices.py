"""The price of every tensor under every spec, and the predictions for any policy from them: without model or torch.

For a small error of the weights KL divergence is quadratic, ½ dᵀF d with F the Fisher information. With labels drawn
from the model's own distribution, the derivative of a token's loss in the direction of an error, s = δᵀ ΔW x with δ the
gradient at a linear layer's output and x its input, has ½ mean s² as its divergence; derivatives of several tensors add
up before they are squared, which gives the cross terms of a whole policy.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from epic_quant.errors import ReportError, SpecError
from epic_quant.spec import BF16, PolicySpec, Target, TensorClass

SCHEMA_VERSION = 1
_KEY = "epic_quant_prices"
SUFFIX = ".prices.safetensors"
# What stands before a tensor's name where the file has the importance of its columns.
IMPORTANCE = "importance."

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Priced:
    """The candidates of one tensor, or of one layer's K and V: bytes and derivatives under each.

    `derivatives` [candidates, tokens] are fp32. `diagonal` is ½ Σ G² d² / tokens with G the summed gradient: it prices
    plain rounding alone, and is kept as a check; None for K and V.
    """

    name: str  # the tensor's canonical name, or `kv.LAYER`
    target: Target | None  # what a policy knows the tensor by; None for K and V
    layer: int | None
    numel: int  # weights; 0 for K and V
    candidates: tuple[str, ...]
    nbytes: tuple[int, ...]
    derivatives: Floats
    diagonal: tuple[float, ...] | None = None

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the tensor in bf16."""
        return 2 * self.numel

    def index(self, candidate: str) -> int:
        """The index of a candidate. Raises SpecError where it was not priced, with the priced ones."""
        if candidate not in self.candidates:
            raise SpecError(f"{self.name}: no price of {candidate}; priced: {', '.join(self.candidates) or 'nothing'}")
        return self.candidates.index(candidate)


@dataclass(frozen=True)
class Prediction:
    """A policy's predicted divergence in nats a token, with its standard error over tokens.

    `alone` is the sum of what each tensor costs alone: without the cross terms.
    """

    kl_divergence: float
    standard_error: float
    alone: float


@dataclass(frozen=True)
class Prices:
    """All prices of a run. `num_predicted` is the tokens that divergences are means over, samples of labels counted.

    `importance` has, by the names of tensors that multiply something, the mean square of their inputs in each column.
    """

    tensors: tuple[Priced, ...]
    kv: tuple[Priced, ...]
    num_predicted: int
    facts: Mapping[str, Any] = field(default_factory=dict)  # checkpoint, text_sha256, windows, samples, seed, …
    importance: Mapping[str, Floats] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, Priced]:
        """All of them by name."""
        return {priced.name: priced for priced in (*self.tensors, *self.kv)}

    def cost(self, derivatives: NDArray[Any]) -> tuple[float, float]:
        """½ mean s² of [tokens] derivatives, in nats a token, and its standard error as if tokens were independent."""
        shares = 0.5 * np.square(derivatives, dtype=np.float64)
        scale = shares.size / self.num_predicted
        error = float(shares.std(ddof=1)) / math.sqrt(shares.size) if shares.size > 1 else math.nan
        return float(shares.mean()) * scale, error * scale

    def price(self, priced: Priced, candidate: str) -> tuple[float, float]:
        """What one tensor alone costs under a candidate: divergence and its standard error."""
        return self.cost(priced.derivatives[priced.index(candidate)])

    def predict(self, policy: PolicySpec) -> Prediction:
        """What a policy does to the predictions.

        Raises SpecError as `stored`, and where it has a spec that was not priced.
        """
        total = np.zeros(self._num_tokens, dtype=np.float64)
        alone = 0.0
        for priced, candidate in self.stored(policy):
            derivatives = priced.derivatives[priced.index(candidate)]
            total += derivatives
            alone += self.cost(derivatives)[0]
        divergence, error = self.cost(total)
        return Prediction(divergence, error, alone)

    def stored(self, policy: PolicySpec) -> Iterator[tuple[Priced, str]]:
        """The tensors, and the layers' K and V, that a policy does not store in bf16, each with its candidate.

        Raises SpecError for a published file, whose weights have no prices.
        """
        if policy.file is not None:
            option = shlex.quote(f"{policy.name}=file:{policy.file}")
            raise SpecError(
                f"{policy.name}: a published file's weights have no prices; to measure it: "
                f"pytest benchmarks/test_quality.py --policy {option}"
            )
        for priced in self.tensors:
            assert priced.target is not None
            if (spec := policy.spec_of(priced.target)) != BF16:
                yield priced, str(spec)
        for priced in self.kv:
            assert priced.layer is not None
            if not (kv := policy.kv_of(priced.layer)).is_plain:
                yield priced, str(kv)

    def nbytes(self, policy: PolicySpec) -> int:
        """Bytes of all matrices as a policy stores them, whole tables included. Raises SpecError as `predict`."""
        return sum(self.nbytes_by_tensor(policy).values())

    def nbytes_by_tensor(self, policy: PolicySpec) -> dict[str, int]:
        """Those of each by its name. Raises SpecError as `predict`."""
        stored = {priced.name: priced.nbytes[priced.index(spec)] for priced, spec in self.stored(policy)}
        return {priced.name: stored.get(priced.name, priced.whole_nbytes) for priced in self.tensors}

    @property
    def numel(self) -> int:
        """Weights of all matrices."""
        return sum(priced.numel for priced in self.tensors)

    @property
    def _num_tokens(self) -> int:
        priced = next(iter((*self.tensors, *self.kv)), None)
        return 0 if priced is None else priced.derivatives.shape[1]


def prices_path(json_path: Path) -> Path:
    """Where the prices of a run lie: beside its JSON, `out.prices.safetensors` for `out.json`."""
    return json_path.with_name(json_path.name.removesuffix(".json") + SUFFIX)


def write_prices(prices: Prices, path: Path) -> None:
    """Write them to a file that `read_prices` reads, and `calibration.Hessians`; the caller makes that atomic."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "num_predicted": prices.num_predicted,
        "facts": dict(prices.facts),
        "priced": [
            {
                "name": priced.name,
                "target": None if priced.target is None else list(priced.target),
                "layer": priced.layer,
                "numel": priced.numel,
                "candidates": list(priced.candidates),
                "nbytes": list(priced.nbytes),
                "diagonal": None if priced.diagonal is None else list(priced.diagonal),
            }
            for priced in (*prices.tensors, *prices.kv)
        ],
    }
    arrays = {priced.name: np.ascontiguousarray(priced.derivatives) for priced in (*prices.tensors, *prices.kv)}
    arrays |= {IMPORTANCE + name: importance for name, importance in prices.importance.items()}
    save_file(arrays, path, {name: str(value) for name, value in prices.facts.items()} | {_KEY: json.dumps(content)})


def read_prices(path: Path, fingerprint: str | None = None) -> Prices:
    """What `write_prices` wrote.

    Raises ReportError where the file cannot be read, is none of prices, is of a newer schema or is damaged; and, with a
    `fingerprint`, where it is of another checkpoint than that one.
    """
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ReportError(f"{path}: not a file of prices")
            content = json.loads(text)
            version = content["schema_version"]
            if version > SCHEMA_VERSION:
                raise ReportError(f"{path}: prices of schema version {version}, newer than {SCHEMA_VERSION}")
            priced = [_priced(entry, file.get_tensor(entry["name"])) for entry in content["priced"]]
            if len({one.derivatives.shape[1] for one in priced}) != 1:
                raise ValueError("the derivatives are not of the same tokens")
            found = Prices(
                tuple(one for one in priced if one.target is not None),
                tuple(one for one in priced if one.target is None),
                int(content["num_predicted"]),
                dict(content["facts"]),
                {
                    name.removeprefix(IMPORTANCE): file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118 - the file itself is no mapping
                    if name.startswith(IMPORTANCE)
                },
            )
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; the benchmarks write it beside their JSON") from None
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: not a file of prices, or damaged: {error}") from error
    theirs = found.facts.get("checkpoint")
    if fingerprint is not None and theirs != fingerprint:
        raise ReportError(f"{path}: prices of checkpoint {theirs}, but this run measured {fingerprint}")
    return found


def _priced(entry: Mapping[str, Any], derivatives: Floats) -> Priced:
    candidates, nbytes = tuple(map(str, entry["candidates"])), tuple(map(int, entry["nbytes"]))
    if derivatives.ndim != 2 or not len(derivatives) == len(candidates) == len(nbytes):
        raise ValueError(f"{entry['name']} has {len(candidates)} candidates and {list(derivatives.shape)} derivatives")
    target = entry["target"]
    return Priced(
        name=str(entry["name"]),
        target=None if target is None else Target(TensorClass(target[0]), target[1], target[2]),
        layer=entry["layer"],
        numel=int(entry["numel"]),
        candidates=candidates,
        nbytes=nbytes,
        derivatives=derivatives,
        diagonal=None if entry["diagonal"] is None else tuple(map(float, entry["diagonal"])),
    )
