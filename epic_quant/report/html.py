"""Blocks to one self-contained page of HTML: style, script and plots are in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING

from epic_quant.errors import ReportError
from epic_quant.report.blocks import Block, Figure, Heading, Slider
from epic_quant.report.formatting import MISSING
from epic_quant.report.palette import DARK, LIGHT
from epic_quant.report.svg import inlined

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_WHOLE = 24

_PAGE = files("epic_quant.report") / "page"


@dataclass
class Group:
    """What is under one heading, which the page's contents link to by `id`: blocks, and the groups below it."""

    title: str
    id: str
    blocks: list[Block] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)


def render(blocks: Sequence[Block]) -> str:
    """The whole page. Raises ReportError without Jinja2."""
    environment = _environment()
    style, script = _style(), _read("page.js")
    return environment.get_template("page.html.j2").render(
        root=grouped(blocks),
        style=environment.filters["verbatim"](style),
        script=environment.filters["verbatim"](script),
        policy=f"default-src 'none'; style-src {_hashed(style)}; script-src {_hashed(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    )


def grouped(blocks: Sequence[Block]) -> Group:
    """The blocks as a tree by the level of their headings; the root is the report itself."""
    root = Group("", "top")
    path = [root]
    taken: dict[str, int] = {}
    for block in blocks:
        if not isinstance(block, Heading):
            path[-1].blocks.append(block)
        elif block.level == 1:
            root.title = block.text
        else:
            del path[block.level - 1 :]
            name = "-".join([*(group.id for group in path[1:]), _slug(block.text)])
            taken[name] = taken.get(name, 0) + 1
            group = Group(block.text, name if taken[name] == 1 else f"{name}-{taken[name]}")
            path[-1].groups.append(group)
            path.append(group)
    return root


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup, escape
    except ImportError as error:
        raise ReportError("an HTML report needs Jinja2: pip install 'epic-quant[report]'") from error

    def code(text: str) -> Markup:
        """A name stays in one piece, but where it is longer than a line of a telephone can be."""
        return Markup('<code class="wrap">{}</code>' if len(text) > _WHOLE else "<code>{}</code>").format(text)

    def rich(text: str) -> Markup:
        """Text with `code` between backticks; all else is text, whatever it holds."""
        parts = re.split(r"`([^`]*)`", text)
        return Markup("").join(code(part) if index % 2 else escape(part) for index, part in enumerate(parts))

    def cell(text: str) -> Markup:
        """A cell's text, with its verdict, where it has one, in colour as well as in its sign."""
        marked = rich(text)
        for sign, kind in (("✓", "good"), ("✗", "bad")):
            marked = marked.replace(sign, Markup('<span class="{}">{}</span>').format(kind, sign))
        return Markup('<span class="none">—</span>') if text == MISSING else marked

    def data(slider: Slider) -> Markup:
        return Markup(_data(slider))

    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"rich": rich, "cell": cell, "verbatim": Markup, "kind": lambda block: type(block).__name__}
    environment.filters |= {"drawn": lambda figure: Markup(_drawn(figure)), "figure_id": _figure_id}
    environment.filters |= {"data": data, "slug": _slug}
    return environment


def _figure_id(figure: Figure) -> str:
    return f"figure-{_slug(figure.file_name.removesuffix('.svg'))}"


def _drawn(figure: Figure) -> str:
    return inlined(figure.svg, f"{_figure_id(figure)}-", _figure_id(figure))


def _data(slider: Slider) -> str:
    """What the page's script reads of a slider, as JSON that no text in it can end the element of."""
    table = slider.table
    found = json.dumps({"columns": table.columns, "rows": table.rows, "texts": slider.texts}, separators=(",", ":"))
    return found.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _style() -> str:
    """The style sheet with both palettes: light, and dark on a screen where the system or the reader wants it."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        f"@media screen {{\n:root[data-theme=dark] {{ color-scheme: dark; {dark} }}\n"
        "@media (prefers-color-scheme: dark) {\n"
        f":root:not([data-theme=light]) {{ color-scheme: dark; {dark} }}\n}}\n}}\n" + _read("page.css")
    )


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hashed(text: str) -> str:
    """What a content security policy names an inline text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
