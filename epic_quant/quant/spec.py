"""Specs, the short texts that name a quantizer wholly: `SCHEME[-gGROUP][+hadBLOCK][+gptq]`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from epic_quant.errors import SpecError, unknown
from epic_quant.quant import absmax, affine, bf16, codebook, integer, ternary
from epic_quant.quant.base import Quantizer
from epic_quant.quant.scheme import Scheme

SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme for module in (bf16, absmax, ternary, integer, affine, codebook) for scheme in module.SCHEMES
}

_NUMBER = "[1-9][0-9]*"


def quantizer(spec: str) -> Quantizer:
    """The quantizer that `spec` names; `quantizer(spec).spec == spec`. Raises SpecError for any other text."""
    head, *stages = spec.split("+")
    scheme = _scheme(head)
    options = head[len(scheme.name) :].split("-")[1:]
    group = _take(options, f"g({_NUMBER})")
    block = _take(stages, f"had({_NUMBER})")
    gptq = _take(stages, "(gptq)")
    if options:
        raise SpecError(f"{unknown(f'option of {scheme.name}', options[0], ['gGROUP'])} (in {spec!r})")
    if stages:
        said = unknown("stage", stages[0], ["hadBLOCK", "gptq"])
        raise SpecError(f"{said}; hadBLOCK comes before gptq, each at most once (in {spec!r})")
    return Quantizer(scheme, int(group) if group else None, int(block) if block else 0, gptq is not None)


def _scheme(head: str) -> Scheme:
    """The scheme with the longest name that begins `head`, since a scheme's own name may hold a dash."""
    names = [name for name in SCHEMES if head == name or head.startswith(f"{name}-")]
    if not names:
        raise SpecError(unknown("scheme", re.sub(f"-g{_NUMBER}$", "", head), SCHEMES))
    return SCHEMES[max(names, key=len)]


def _take(words: list[str], pattern: str) -> str | None:
    """What the first word holds of `pattern`, and takes it off the list; None where it does not match."""
    match = re.fullmatch(pattern, words[0]) if words else None
    if match is None:
        return None
    words.pop(0)
    return match[1]
