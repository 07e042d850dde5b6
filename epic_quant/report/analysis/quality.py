"""Whether cheaper errors sort policies as the divergence does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from epic_quant.records.subjects import EVALUATION, BlockRecord, LadderRecord, SensitivityRecord, WeightsRecord
from epic_quant.report.analysis.correlation import spearman
from epic_quant.report.analysis.policies import quantized
from epic_quant.results.run import Run

# A relation this strong or stronger sorts policies nearly as the divergence does.
STRONG = 0.9


@dataclass(frozen=True)
class Proxy:
    """A cheaper error of policies or single classes: (series, error, divergence) where both were measured."""

    name: str
    of: str
    points: tuple[tuple[str, float, float], ...]

    @property
    def correlation(self) -> float | None:
        """Spearman's, of error and divergence."""
        return spearman([(error, divergence) for _, error, divergence in self.points])


def proxies(run: Run) -> list[Proxy]:
    """Errors of weights and blocks over policies, and of weights and outputs over single classes."""
    measured = {one.policy: one.kl_divergence for one in quantized(run) if one.kl_divergence is not None}
    by_policy = (("relative L2 of weights", _weight_error), ("error of a block", _block_error))
    found = [
        Proxy(
            name,
            "policies",
            tuple(
                ("policies", error, divergence)
                for policy, divergence in measured.items()
                if (error := of(run, policy)) is not None
            ),
        )
        for name, of in by_policy
    ]
    alone = [
        one for one in run.of(SensitivityRecord, text=EVALUATION) if one.layer is None and one.kl_divergence is not None
    ]
    ladder: dict[tuple[str, object], LadderRecord] = {(one.tensor_class, one.spec): one for one in run.of(LadderRecord)}
    for name, metric in (("relative L2 of weights", "rel_l2"), ("relative L2 of outputs", "output_rel_l2")):
        points = tuple(
            (one.tensor_class, error, one.kl_divergence)
            for one in alone
            if one.kl_divergence is not None
            and (rung := ladder.get((one.tensor_class, one.storage))) is not None
            and (error := getattr(rung, metric)) is not None
        )
        found.append(Proxy(name, "single classes", points))
    return [proxy for proxy in found if proxy.points]


def _weight_error(run: Run, policy: str) -> float | None:
    """Root mean square of the classes' relative L2, each by its number of weights; None where one is not known."""
    squares = weights = 0.0
    for record in {one.tensor_class: one for one in run.of(WeightsRecord, policy=policy)}.values():
        if record.rel_l2 is None or record.nbytes is None or not record.bits_per_weight:
            return None
        number = 8 * record.nbytes / record.bits_per_weight
        squares, weights = squares + number * record.rel_l2**2, weights + number
    return math.sqrt(squares / weights) if weights else None


def _block_error(run: Run, policy: str) -> float | None:
    errors = [record.added_rel_l2 for record in run.of(BlockRecord, policy=policy)]
    return max((error for error in errors if error is not None), default=None)
