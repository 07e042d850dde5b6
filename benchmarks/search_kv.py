"""Find the KV policies `p-rope` and `p-rope-4`: the least error of the attention output within a budget of bytes.

    python benchmarks/search_kv.py [--checkpoint SOURCE]

It looks at calibration text alone; what is reported of the policies found comes from evaluation text. Errors of parts
of K and of V that are small and stored apart add up in squares, nearly: so every part is tried by itself, all sums are
ranked, and the best of them are tried whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import EpicQuantError
from epic_quant.gemma4.config import FULL, SLIDING, TextConfig
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.kv import nbytes
from epic_quant.kv.attention_error import AttentionError, capture
from epic_quant.spec import FORMATS, NAMED_KV, KVSpec, KVStorageSpec, LayerKVSpec, PCASpec
from epic_quant.spec.kv import BF16_STORAGE
from epic_quant.text import token_windows

HERE = Path(__file__).parent
E4B = TextConfig.from_json(json.loads((HERE / "facts" / "gemma-4-E4B.config.json").read_text(encoding="utf-8")))
WHERE = {FULL: "full", SLIDING: "sliding"}

# Bytes are counted on the texts themselves, and on E4B where the most tokens wait for their block to fill: before the
# last one of a power of two.
E4B_TOKENS = 8191
MAX_BITS = 4.25
# 4 bits and more may cost a tenth more than the codes.
MAX_OVERHEAD = 1.1

SYMMETRIC = [*(f"int{bits}" for bits in (2, 3, 4, 5, 6)), *(f"codebook{bits}" for bits in (2, 3, 4))]
AFFINE = [f"affine{bits}" for bits in (2, 3, 4, 5)]
# Formats along the principal directions, their number, and formats of the rest. The rest keeps 2 bits and more, and the
# directions are few: heads of 128 dims made of 256 do not show how much of a larger model's K and V lies along them.
DIRECTIONS = (8, 12, 16)
ALONG = {"codebook2": ("codebook4", "int5"), "codebook3": ("int5", "int6"), "codebook4": ("int6", "int8")}
PCA = [
    KVStorageSpec(name, center_tokens=128, pca=PCASpec(directions, along))
    for name, several in ALONG.items()
    for along in several
    for directions in DIRECTIONS
]
BY_TOKEN = [
    *(
        KVStorageSpec(name, hadamard_block=rotated, center_tokens=center, unbiased=unbiased)
        for name in SYMMETRIC
        for rotated in (0, 512)
        for center, unbiased in ((None, False), (32, False), (32, True), (128, True))
    ),
    *(replace(pca, hadamard_block=512, unbiased=True) for pca in PCA),
    *map(KVStorageSpec, AFFINE),
]
# A channel that has a zero point needs no center. What stands out in few levels costs the others much.
BY_CHANNEL = [
    *(KVStorageSpec(name, block_tokens=64) for name in SYMMETRIC),
    *(
        KVStorageSpec(name, block_tokens=block, hadamard_block=rotated)
        for name in AFFINE
        for rotated in (0, 512)
        for block in (32, 64, 128)
    ),
    *(
        KVStorageSpec(name, block_tokens=block, hadamard_block=rotated, clip_percent=percent)
        for name in AFFINE[:2]
        for rotated in (0, 512)
        for percent in (5, 10, 12, 15)
        for block in (64, 128)
    ),
    *(replace(pca, block_tokens=block) for pca in PCA for block in (64, 128)),
]
STORAGES = [*BY_TOKEN, *BY_CHANNEL]
# What is left unquantized. The first tokens draw much attention, whatever they are, and cost next to nothing; the
# newest are looked at most.
KEPT = {
    FULL: [
        LayerKVSpec(attention_sinks=sinks, residual_window=window)
        for sinks, window in ((1, 0), (2, 0), (4, 0), (4, 16), (4, 32))
    ],
    SLIDING: [LayerKVSpec(residual_window=window) for window in (0, 16)],
}


@dataclass(frozen=True)
class Trial:
    """How K and V of one layer type were stored, and the resulting error and bits."""

    parts: Mapping[str, KVStorageSpec]  # by place, such as `k.rotated`
    kept: LayerKVSpec
    squared_error: float  # of the attention output, relative
    bits: tuple[float, ...]  # a value, in each of the search's places
    code_bits: float  # of them those of the codes themselves, on E4B


class Budget(NamedTuple):
    """Bits a value in each place, and the most that they may be on E4B in units of those of the codes."""

    bits: tuple[float, ...]
    overhead: float = math.inf

    def holds(self, one: Trial) -> bool:
        """Whether the trial keeps to it."""
        within = all(bits <= most + 1e-9 for bits, most in zip(one.bits, self.bits, strict=True))
        return within and one.bits[-1] <= self.overhead * one.code_bits


class Search:
    """Trials on the layers of one type; bytes must fit in all `places`, a config and a number of tokens each."""

    def __init__(self, errors: AttentionError, layer_type: str, places: list[tuple[TextConfig, int]]) -> None:
        self.errors, self.layer_type, self.where = errors, layer_type, WHERE[layer_type]
        self.places = [
            (replace(config, layers=tuple(spec for spec in config.layers if spec.layer_type == layer_type)), tokens)
            for config, tokens in places
        ]
        self._errors: dict[KVSpec, float] = {}

    def policy(self, parts: Mapping[str, KVStorageSpec], kept: LayerKVSpec) -> KVSpec:
        """The policy that stores these parts so and leaves all else, the other layer type included, in bf16."""
        rotated, unrotated, values = (parts.get(part, BF16_STORAGE) for part in ("k.rotated", "k.unrotated", "v"))
        keys = (parts["k"],) if "k" in parts else (rotated, unrotated)
        return replace(KVSpec(), **{self.where: replace(kept, k=keys, v=(values,))}, name="")

    def bits(self, policy: KVSpec) -> tuple[float, ...]:
        """Bits a value of K or V in each place."""
        return tuple(
            16 * nbytes(policy, config, tokens) / nbytes(NAMED_KV["bf16"], config, tokens)
            for config, tokens in self.places
        )

    def trial(self, parts: Mapping[str, KVStorageSpec], kept: LayerKVSpec) -> Trial:
        """Measure it."""
        policy = self.policy(parts, kept)
        code_bits = sum(self._share(part)[-1] * _code_bits(spec) for part, spec in parts.items())
        if policy not in self._errors:
            self._errors[policy] = self.errors.of(policy).attention_rel_l2 ** 2
        return Trial(parts, kept, self._errors[policy], self.bits(policy), code_bits)

    def options(self, part: str, kept: LayerKVSpec) -> list[Trial]:
        """Every storage of one part alone, without those that another is not larger and not worse than.

        Bits are those that the part adds to a cache without it; the error, in which it differs little, is that with
        the least kept.
        """
        share = self._share(part)
        tried = []
        for spec in STORAGES:
            trial = self.trial({part: spec}, KEPT[self.layer_type][0])
            bits = self.bits(self.policy(trial.parts, kept))
            added = tuple(all_bits - 16 * (1 - its) for all_bits, its in zip(bits, share, strict=True))
            tried.append(replace(trial, kept=kept, bits=added))
        return [one for one in tried if not any(_beats(other, one) for other in tried)]

    def _share(self, part: str) -> tuple[float, ...]:
        """What part of all values it is, in each place: found by storing it in twice the bits."""
        return tuple(bits / 16 - 1 for bits in self.bits(self.policy({part: KVStorageSpec("fp32")}, LayerKVSpec())))

    def sums(self) -> Iterator[Trial]:
        """All ways to store K, whole or its rotated and other dims apart, with all to store V; errors are sums."""
        for kept in KEPT[self.layer_type]:
            whole = [(trial,) for trial in self.options("k", kept)]
            apart: list[tuple[Trial, ...]] = []
            if self.layer_type == FULL:
                apart = list(itertools.product(self.options("k.rotated", kept), self.options("k.unrotated", kept)))
            for keys, values in itertools.product([*whole, *apart], self.options("v", kept)):
                trials = (*keys, values)
                yield Trial(
                    {part: spec for trial in trials for part, spec in trial.parts.items()},
                    kept,
                    sum(trial.squared_error for trial in trials),
                    tuple(sum(bits) for bits in zip(*(trial.bits for trial in trials), strict=True)),
                    sum(trial.code_bits for trial in trials),
                )

    def best(self, sums: list[Trial], budget: Budget, tried: int) -> list[Trial]:
        """The best sums within the budget, measured whole, those that then keep to it, the best first."""
        within = sorted((one for one in sums if budget.holds(one)), key=_error)
        whole = (self.trial(one.parts, one.kept) for one in within[:tried])
        return sorted((one for one in whole if budget.holds(one)), key=_error)


def _code_bits(spec: KVStorageSpec) -> float:
    """Bits of a code of its format."""
    return math.log2(FORMATS[spec.format].num_levels)


def _error(one: Trial) -> float:
    return one.squared_error


def _beats(other: Trial, one: Trial) -> bool:
    """Whether the other is no larger anywhere and less wrong."""
    return other.squared_error < one.squared_error and all(a <= b for a, b in zip(other.bits, one.bits, strict=True))


def search(checkpoint: Checkpoint, text: Path, num_windows: int, window_tokens: int, tried: int) -> None:
    """Print, for each layer type and budget, the best policies with their errors, and both whole policies."""
    weights = CheckpointWeights(checkpoint)
    config = weights.config
    window_tokens = min(window_tokens, config.max_position_embeddings)
    texts = [capture(weights, window) for window in token_windows(checkpoint, text, num_windows, window_tokens)]
    found = {"p-rope": KVSpec(), "p-rope-4": KVSpec()}
    for layer_type in (FULL, SLIDING):
        one = Search(AttentionError(texts, layer_type), layer_type, [(config, window_tokens), (E4B, E4B_TOKENS)])
        sums = list(one.sums())
        budgets = {"p-rope": Budget(one.bits(NAMED_KV["original"])), "p-rope-4": Budget((MAX_BITS,) * 2, MAX_OVERHEAD)}
        print(f"\n{layer_type}: {len(sums):,} combinations")
        for name in ("original", "original+ls", "original-inverted", "int4", "int4+had", "per-channel-k"):
            print(_line(name, one.errors.of(NAMED_KV[name]).attention_rel_l2, one.bits(NAMED_KV[name])))
        for name, budget in budgets.items():
            print(f"  {name}, at most {_bits(budget.bits)}:")
            best = one.best(sums, budget, tried)
            for trial in best[:5]:
                print(_line(str(one.policy(trial.parts, trial.kept)), trial.squared_error**0.5, trial.bits))
            if best:
                layers = getattr(one.policy(best[0].parts, best[0].kept), one.where)
                found[name] = replace(found[name], **{one.where: layers}, name="")
    print()
    for name, policy in found.items():
        print(f"{name}: {'nothing fits' if policy.is_plain else policy}")


def _bits(bits: tuple[float, ...]) -> str:
    own, e4b = bits
    return f"{own:.3f} bits a value here, {e4b:.3f} on E4B"


def _line(name: str, error: float, bits: tuple[float, ...]) -> str:
    return f"    {error:.4f}  {_bits(bits)}  {name}"


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=HERE / "mini_gemma4", metavar="SOURCE", help="file, folder or hub id")
    parser.add_argument("--text", type=Path, default=HERE / "mini_gemma4" / "calibration.txt", metavar="FILE")
    parser.add_argument("--windows", type=int, default=2, metavar="N", help="windows of the text (2)")
    parser.add_argument("--window-tokens", type=int, default=2048, metavar="N", help="tokens of each (2048)")
    parser.add_argument("--tried", type=int, default=24, metavar="N", help="combinations measured whole (24)")
    options = parser.parse_args()
    try:
        with Checkpoint.open(options.checkpoint) as checkpoint:
            search(checkpoint, options.text, options.windows, options.window_tokens, options.tried)
    except EpicQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
