"""Seeded mutations of a file's bytes, of what a JSON holds, and of a text."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import struct
from collections.abc import Sequence
from typing import Any

# What breaks readers: no value, another type, numbers at the ends of their ranges, and text that is no name.
HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    " ",
    "x" * 300,
    "\ud800",
    "\x00",
    "../../x",
    "bf16",
    "int4-g128",
    [],
    {},
    [[]],
    [0] * 100,
    {"": None},
)
_HOSTILE_BYTES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"-",
    b"9" * 40,
    b'"',
    b"{",
    b"[" * 2000,
    b"1e999",
    b"\\u",
)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three damages: flipped bits, a piece cut out, doubled or moved, the end cut off, hostile bytes put in."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        match rng.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at:end]
            case 2:
                content[at:at] = content[at:end]
            case 3:
                piece = content[at:end]
                del content[at:end]
                there = rng.randrange(len(content) + 1)
                content[there:there] = piece
            case 4:
                del content[at:]
            case _:
                content[at:at] = rng.choice(_HOSTILE_BYTES)
    return bytes(content)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three of its nodes replaced by a hostile value, left out, renamed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = [node for node in _nodes(value) if isinstance(node, dict | list) and node]
        if not holders:
            return value
        holder = rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key, other = rng.choice(keys), rng.choice(keys)
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
            case 3:
                del holder[key]
            case 4:
                holder[key], holder[other] = holder[other], holder[key]
            case _:
                if isinstance(holder, dict):
                    holder[rng.choice((f"{key}x", "", "__metadata__", str(key).upper()))] = holder[key]
                else:
                    holder.append(copy.deepcopy(holder[key]))
    return value


def mutated_text(text: str, rng: random.Random, words: Sequence[str]) -> str:
    """A text with one or two of its words or signs taken out, doubled, replaced by one of `words`, or spoilt."""
    pieces = re.findall(r"\w+|\W", text)
    for _ in range(rng.choice((1, 1, 1, 2))):
        at = rng.randrange(len(pieces))
        match rng.randrange(8):
            case 0:
                pieces[at] = ""
            case 1:
                pieces[at] *= 2
            case 2:
                pieces[at] = rng.choice(("99999999999", "-1", "@", "=", "\n", "ä", "٣", "1_0", " ", '"', "x" * 300))
            case 3:
                pieces.insert(at, rng.choice(pieces))
            case _:
                named = [index for index, piece in enumerate(pieces) if piece.isalnum()]
                pieces[rng.choice(named or [at])] = rng.choice(words)
    return "".join(pieces)


def with_header(header: Any, data: bytes) -> bytes:
    """A .safetensors file of a header, which need not fit, and the bytes after it."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _nodes(value: Any) -> list[Any]:
    found = [value]
    for node in found:
        if isinstance(node, dict):
            found += node.values()
        elif isinstance(node, list):
            found += node
    return found
