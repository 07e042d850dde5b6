"""A policy in the specs that a file format has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from epic_quant.errors import ExportError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.spec import PolicySpec, Target, WeightSpec

# The specs that a format has for a tensor, by preference; `spec` is what the policy asks for, for options to keep.
Candidates = Callable[[TextTensor, WeightSpec], Sequence[WeightSpec]]


def held(
    policy: PolicySpec, config: TextConfig, file_format: str, candidates: Candidates, take_nearest: bool
) -> PolicySpec:
    """The policy's weights with every spec that the format lacks replaced by the nearest that it has.

    Raises ExportError where there is one to replace, and `take_nearest` is not set.
    """
    found: dict[Target, WeightSpec] = {}
    others: list[str] = []
    for tensor in expected_tensors(config):
        if tensor.target is None or tensor.unused:
            continue
        spec = policy.spec_of(tensor.target)
        fitting = [one for one in candidates(tensor, spec) if one.fits(tensor.shape[1])]
        found[tensor.target] = spec if spec in fitting else _nearest(spec, fitting)
        if spec not in fitting:
            others.append(
                f"{tensor.name}: {file_format} cannot hold {spec}; the nearest it has is {found[tensor.target]}"
            )
    if others and not take_nearest:
        also = f" ({len(others) - 1} other tensors are alike)" if len(others) > 1 else ""
        raise ExportError(f"{others[0]}{also}; change the policy, or let --nearest do so")
    if not others:
        return PolicySpec(policy.name, policy.weights)
    # Wide targets get what most of their tensors have: a policy keeps only those of the narrow ones that differ.
    wide = {
        target: Counter(found[one] for one in found if target in one.covering).most_common(1)[0][0]
        for target, _ in policy.weights
        if any(target in one.covering for one in found)
    }
    return PolicySpec(policy.name, tuple((wide | found).items()))


def _nearest(spec: WeightSpec, candidates: Sequence[WeightSpec]) -> WeightSpec:
    """That with the nearest number of levels; of those as near the one with more, and then with fewer bytes."""

    def distance(other: WeightSpec) -> tuple[float, int, float]:
        levels = abs(math.log2(other.info.num_levels) - math.log2(spec.info.num_levels))
        return levels, -other.info.num_levels, other.info.block_nbytes / other.info.block_size

    return min(candidates, key=distance)
