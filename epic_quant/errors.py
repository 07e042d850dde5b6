"""Every exception a user can meet. Each carries one line that names the thing and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 40


class EpicQuantError(Exception):
    """The base of all of them; a command line prints its text and exits with status 2."""


class CheckpointError(EpicQuantError):
    """A checkpoint that is not there, is damaged, or lacks a tensor."""


class ConfigError(EpicQuantError):
    """A config that is not Gemma 4's, or that disagrees with the shapes in the file."""


class SpecError(EpicQuantError):
    """An unknown policy, tensor class, scheme or option of one."""


class QuantizationError(EpicQuantError):
    """A weight that cannot be quantized as asked: NaN, infinity, or a group or block that does not divide the row."""


class TokenError(EpicQuantError):
    """Token ids that are out of range or no integers, a text too short, or a tokenizer that does not fit."""


class CacheError(EpicQuantError):
    """K or V that a cache cannot take, or a layer of it that holds none."""


class ReportError(EpicQuantError):
    """A JSON file that is no run of ours, is of a newer schema, or holds nothing to report."""


class KernelError(EpicQuantError):
    """Buffers that a kernel cannot take, or an instruction set that this machine lacks."""


class GateError(EpicQuantError):
    """A limit that cannot be read, selects nothing, or is relative to nothing."""


class RecipeError(EpicQuantError):
    """A recipe that cannot be made: no sensitivities to make it of, or a budget below the smallest possible."""


class ExportError(EpicQuantError):
    """A policy or model that a file format or its engine cannot hold, or a file that cannot be written."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line: `name` is no known `kind`, with similar names, or without any with all or the first few known names."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    listed = choices if len(choices) <= _MOST_LISTED else [*choices[:_MOST_LISTED], "…"]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(listed)}"
    return f"unknown {kind} {name!r}; {hint}"
