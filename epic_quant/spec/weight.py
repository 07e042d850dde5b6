"""`WeightSpec`: the format that a matrix is stored in, and its options."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from epic_quant.errors import SpecError, unknown
from epic_quant.spec.formats import FORMATS, PUBLISHED, FormatInfo

MAX_HADAMARD_BLOCK = 4096

# ggml's types that are integers with a scale for 32 weights, and nothing else.
_GGML_INTEGERS = {"int4": "q4_0", "int5": "q5_0", "int8": "q8_0"}
_GGML_GROUP = 32

_NUMBER = "[1-9][0-9]{0,8}"


@dataclass(frozen=True)
class WeightSpec:
    """`FORMAT[-lSTATE][-gGROUP][+hadBLOCK][+gptq|+yaqa]`, or `FORMAT[+imatrix]` of blocks: a format and its options.

    `group_size` is how many weights of a row share a scale; None is one scale a row. `hadamard_block` is the block of
    the Hadamard transform that rotates rows before they are quantized; 0 is no rotation. `gptq` compensates the error
    of a column in the columns that follow, and `yaqa` that of a row in the rows that follow as well. `imatrix` is for
    formats of blocks, which are ggml's types: squared errors count as much as the inputs of their columns do, an
    importance matrix. `state_bits` are those of a trellis, whose values each depend on so many bits of its row; None is
    the default, 12. bf16 has no options.

    Raises SpecError for an unknown format and for options that it cannot have.
    """

    format: str
    group_size: int | None = None
    hadamard_block: int = 0
    gptq: bool = False
    imatrix: bool = False
    yaqa: bool = False
    state_bits: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS and self.format not in PUBLISHED:
            raise SpecError(unknown("format", self.format, FORMATS))
        if not self.info.has_groups and (self.group_size is not None or self.hadamard_block or self.compensated):
            how = "values as they are" if self.info.is_plain else f"blocks of {self.info.block_size} weights"
            raise SpecError(f"{self.format} stores {how}: it takes no group, Hadamard block, gptq or yaqa")
        if self.gptq and self.yaqa:
            raise SpecError("yaqa compensates errors as gptq does, and more: a spec has one of them")
        if self.imatrix and not self.info.block_nbytes:
            raise SpecError(f"{self.format} has no blocks, which alone are fitted with an importance matrix (+imatrix)")
        if self.state_bits is not None and self.state_bits not in self.info.state_bits:
            known = " or ".join(map(str, self.info.state_bits)) or "none, as it is no trellis"
            raise SpecError(f"{self.format} has {self.state_bits} state bits; expected {known}")
        if self.info.state_bits and self.state_bits == self.info.state_bits[0]:
            object.__setattr__(self, "state_bits", None)  # one spelling of the default
        if self.group_size is not None and self.group_size < 1:
            raise SpecError(f"the group size is {self.group_size}; expected 1 or more")
        if self.hadamard_block.bit_count() > 1 or not 0 <= self.hadamard_block <= MAX_HADAMARD_BLOCK:
            raise SpecError(
                f"the Hadamard block is {self.hadamard_block}; expected a power of two up to {MAX_HADAMARD_BLOCK}"
            )

    @classmethod
    def parse(cls, text: str) -> WeightSpec:
        """Read a spec; `str` is the inverse. Raises SpecError for any other text, with the near names."""
        head, *stages = text.split("+")
        published = head.partition("-")[0] in PUBLISHED
        format_name, options = split_format(head, PUBLISHED if published else FORMATS)
        state = take(options, f"l({_NUMBER})")
        group = take(options, f"g({_NUMBER})")
        block = take(stages, f"had({_NUMBER})")
        gptq = take(stages, "(gptq)")
        imatrix = take(stages, "(imatrix)")
        yaqa = take(stages, "(yaqa)")
        is_trellis = format_name in FORMATS and FORMATS[format_name].state_bits
        known = ["lSTATE", "gGROUP"] if is_trellis else ["gGROUP"]
        refuse_rest(text, format_name, options, known, stages, ["hadBLOCK", "gptq", "imatrix", "yaqa"])
        sizes = int(group) if group else None, int(block) if block else 0
        stages_taken = gptq is not None, imatrix is not None, yaqa is not None
        return cls(format_name, *sizes, *stages_taken, state_bits=int(state) if state else None)

    def __str__(self) -> str:
        state = "" if self.state_bits is None else f"-l{self.state_bits}"
        group = "" if self.group_size is None else f"-g{self.group_size}"
        rotated = f"+had{self.hadamard_block}" if self.hadamard_block else ""
        stages = "+gptq" * self.gptq + "+imatrix" * self.imatrix + "+yaqa" * self.yaqa
        return self.format + state + group + rotated + stages

    @property
    def info(self) -> FormatInfo:
        """The format's row in the table."""
        return FORMATS.get(self.format) or PUBLISHED[self.format]

    @property
    def ggml_type(self) -> str | None:
        """The type of ggml whose blocks hold the same codes and scales, in rows of whole blocks; None without one."""
        if self.info.block_nbytes:
            return self.format
        is_plain_group = self.group_size == _GGML_GROUP and not self.hadamard_block
        return _GGML_INTEGERS.get(self.format) if is_plain_group else None

    @property
    def compensated(self) -> bool:
        """Whether weights that are still to be rounded make up for the errors of others."""
        return self.gptq or self.yaqa

    @property
    def needs_hessian(self) -> bool:
        """Whether it is fitted to the inputs of the layer, for which it needs their Hessian."""
        return self.compensated or self.imatrix

    @property
    def without_hessian(self) -> WeightSpec:
        """The same storage, rounded plainly: as many bytes, and no Hessian needed."""
        return replace(self, gptq=False, imatrix=False, yaqa=False)

    @property
    def without_group(self) -> WeightSpec:
        """The same with one scale a row: to compare specs whose groups depend on the rows' lengths."""
        return replace(self, group_size=None)

    def group_of(self, num_cols: int) -> int:
        """Weights that share a scale in rows of `num_cols`; a row shorter than the group is one."""
        return min(self.group_size or num_cols, num_cols)

    def misfit(self, num_cols: int) -> str | None:
        """Why rows of `num_cols` weights do not fall into whole groups or blocks; None where they do."""
        if num_cols % self.info.block_size:
            return f"rows of {num_cols} weights are no multiple of {self.info.block_size}"
        if num_cols % self.group_of(num_cols):
            return f"a group of {self.group_size} does not divide rows of {num_cols} weights"
        return None

    def fits(self, num_cols: int) -> bool:
        """Whether rows of `num_cols` weights fall into whole groups or blocks."""
        return self.misfit(num_cols) is None

    def with_dividing_group(self, num_cols: Iterable[int]) -> WeightSpec | None:
        """Itself with the group halved until it divides rows of all these lengths; None where it never does."""
        rows, spec = tuple(num_cols), self
        while not all(map(spec.fits, rows)):
            if spec.group_size is None or spec.group_size % 2:
                return None
            spec = replace(spec, group_size=spec.group_size // 2)
        return spec


BF16 = WeightSpec("bf16")


def split_format(head: str, names: Collection[str]) -> tuple[str, list[str]]:
    """A format's name and its options: the longest name that begins `head`, since a name may hold a dash itself.

    Raises SpecError where there is none.
    """
    found = [name for name in names if head == name or head.startswith(f"{name}-")]
    if not found:
        raise SpecError(unknown("format", re.sub(f"-[a-z]{_NUMBER}$", "", head), names))
    name = max(found, key=len)
    return name, head[len(name) :].split("-")[1:]


def take(words: list[str], pattern: str) -> str | None:
    """What the first word holds of `pattern`, and takes it off the list; None where it does not match."""
    match = re.fullmatch(pattern, words[0]) if words else None
    if match is None:
        return None
    words.pop(0)
    return match[1]


def refuse_rest(
    text: str, format_name: str, options: list[str], known: list[str], stages: list[str], known_stages: list[str]
) -> None:
    """Raise SpecError where options or stages are left over that nothing took."""
    if options:
        raise SpecError(f"{unknown(f'option of {format_name}', options[0], known)} (in {text!r})")
    if stages:
        message = unknown("stage", stages[0], known_stages)
        raise SpecError(f"{message}; stages stand in that order, each at most once (in {text!r})")
