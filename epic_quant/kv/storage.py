"""How some dims of a head are stored, and how the K and V of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from epic_quant.errors import SpecError, unknown
from epic_quant.quant import SCHEMES, Quantizer, quantizer
from epic_quant.quant.scheme import Scheme

# Dtypes in which K and V are stored as they are.
PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = sorted({*SCHEMES, *PLAIN})
_COUNT = "[1-9][0-9]{0,8}"
_OPTIONS = re.compile(
    rf"(.*?)(?:\+center({_COUNT}))?(?:\+pca(0|{_COUNT})-([a-z0-9-]+))?(?:\+clip([1-9][0-9]?))?(\+unbiased)?", re.DOTALL
)


class Pca(NamedTuple):
    """Directions of largest variance, and the scheme of the coordinates along them."""

    directions: int
    scheme: Scheme


@dataclass(frozen=True)
class Storage:
    """A plain dtype, or a quantizer, along what its groups run, and what is done to values before and after.

    `SCHEME[-gGROUP][+hadBLOCK][+centerTOKENS][+pcaDIRECTIONS-SCHEME][+clipPERCENT][+unbiased][@BLOCK]`. Without
    `block` every token and head has its own scales, one for every group of dims; with it every channel has one scale
    for `block` tokens. A quantizer's Hadamard turn is over the dims in either case.

    - `center` takes a fixed offset off every head and channel: the mean of so many tokens, rounded up to whole blocks,
      the first that are quantized, which wait until all of them are there.
    - `pca` turns heads towards the so many directions in which the tokens of the center vary most, and stores the
      coordinates along them under a scheme of their own, with scales and turns of their own. K and V vary most in a few
      directions: there bits tell most, and what is left for all others is small.
    - `clip` moves what is in the outer so many percent of the range, at either end, to where they begin.
    - `unbiased`: a scale of least squares shortens what it stores; this lengthens it again, so that products with
      queries are right on average, as RaBitQ does (Gao and Long, 2024).

    Raises SpecError for settings that contradict each other.
    """

    how: Quantizer | torch.dtype
    block: int | None = None
    center: int | None = None
    pca: Pca | None = None
    clip: int | None = None
    unbiased: bool = False

    def __post_init__(self) -> None:
        options = (self.block, self.center, self.pca, self.clip, self.unbiased or None)
        if isinstance(self.how, torch.dtype):
            if self.how not in PLAIN.values() or any(option is not None for option in options):
                raise SpecError(f"{self}: what is not quantized is stored as {' or '.join(PLAIN)}, without options")
            return
        if self.how.gptq:
            raise SpecError(f"{self}: +gptq needs a layer's inputs, which a cache does not see")
        if self.how.scheme.scales_per_group == 0:
            raise SpecError(f"{self}: {self.how.scheme.name} is given as torch.bfloat16")
        if self.block is not None and self.how.group_size is not None:
            raise SpecError(f"{self}: scales are either for groups of dims or for blocks of tokens, not for both")
        # Eight codes of any width are whole bytes.
        if self.block is not None and (self.block < 1 or self.block % 8):
            raise SpecError(f"{self}: a block of tokens must be a multiple of 8")
        if self.center is not None and self.center < 1:
            raise SpecError(f"{self}: a center is the mean of 1 token or more")
        if self.pca is not None and (self.pca.directions < 1 or self.pca.scheme.scales_per_group == 0):
            raise SpecError(f"{self}: +pca is 1 direction or more, stored under a scheme with scales")
        if self.pca is not None and self.center is None:
            raise SpecError(f"{self}: +pca finds its directions in the tokens of a center")
        if self.clip is not None and not 1 <= self.clip < 50:
            raise SpecError(f"{self}: what is clipped at either end must be 1 to 49 percent")
        if (self.pca or self.clip or self.unbiased) and self.how.group_size is not None:
            raise SpecError(f"{self}: +pca, +clip and +unbiased are for a whole row of dims, without groups")
        schemes = [self.how.scheme] if self.pca is None else [self.how.scheme, self.pca.scheme]
        if self.unbiased and any(scheme.scales_per_group != 1 for scheme in schemes):
            raise SpecError(f"{self}: +unbiased is for schemes without a zero point")

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Read `int4-g64+had128`, `int4+center32@64`, `bf16` …; `str` is the inverse.

        Raises SpecError on any other text.
        """
        if text in PLAIN:
            return cls(PLAIN[text])
        if not begins_with_a_scheme(text):
            raise SpecError(unknown("scheme", text, _NAMES))
        if not begins_with_a_scheme(text, SCHEMES.keys() - PLAIN):
            raise SpecError(f"{text}: what is not quantized takes no group, hadamard or block, nor another option")
        spec, at, block = text.partition("@")
        if at and not re.fullmatch(_COUNT, block):
            raise SpecError(f"{text}: {block!r} is not a number of tokens")
        options = _OPTIONS.fullmatch(spec)
        assert options is not None  # it takes any text
        center, directions, clip = (int(number) if number else None for number in options.group(2, 3, 5))
        if directions is not None and options[4] not in SCHEMES:
            raise SpecError(f"{unknown('scheme', options[4], SCHEMES)} (in {text!r})")
        pca = None if directions is None else Pca(directions, SCHEMES[options[4]])
        return cls(quantizer(options[1]), int(block) if at else None, center, pca, clip, options[6] is not None)

    def __str__(self) -> str:
        if isinstance(self.how, torch.dtype):
            spec = next((name for name, dtype in PLAIN.items() if dtype == self.how), str(self.how))
        else:
            spec = self.how.spec
        spec += "" if self.center is None else f"+center{self.center}"
        spec += "" if self.pca is None else f"+pca{self.pca.directions}-{self.pca.scheme.name}"
        spec += "" if self.clip is None else f"+clip{self.clip}"
        spec += "+unbiased" if self.unbiased else ""
        return spec if self.block is None else f"{spec}@{self.block}"


def begins_with_a_scheme(text: str, names: Iterable[str] = _NAMES) -> bool:
    """Whether text is the name of a scheme or dtype, or has options after it."""
    return any(text == name or text.startswith((f"{name}-", f"{name}+", f"{name}@")) for name in names)


BF16 = Storage(torch.bfloat16)

# A head is stored whole, or the dims that turn with position and the others each in a way of their own.
Head = tuple[Storage] | tuple[Storage, Storage]


@dataclass(frozen=True)
class LayerPolicy:
    """How layers of one type store K and V, and how many of the newest and of the first tokens they do not quantize.

    A head given as one storage is stored whole; as two, the dims that RoPE turns and the others apart.
    """

    k: Head = (BF16,)
    v: Head = (BF16,)
    recent: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        if min(self.recent, self.first) < 0:
            raise SpecError(f"{min(self.recent, self.first)} is no number of tokens to leave unquantized")
