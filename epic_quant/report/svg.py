"""Postprocessing of matplotlib's SVG: smaller, with a text for every point, and fit to be inlined in a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from epic_quant.report.palette import LIGHT

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"

# An element of this id is the place of a point, and what follows the text that it shows when it is pointed at.
TIP = "tip:"
_TIP_RADIUS = "9"

_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"#([^)\"']+)")
# Characters that XML 1.0 forbids.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_COLOURS = {colour: name for name, colour in LIGHT.items()}


def trimmed(svg: str) -> str:
    """The same picture in a third of the bytes, its tips as invisible circles, each with its title.

    Styles become attributes, since a page that forbids inline styles would drop them.
    """
    root = ElementTree.fromstring(_UNPRINTABLE.sub("�", svg))
    _drop(root, "metadata")
    _drop(root, "style")
    root.set("stroke-linejoin", "round")
    root.set("font-family", "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif")
    for element in root.iter():
        _style_to_attributes(element)
        for name in ("d", "x", "y", "width", "height", "transform", "points"):
            if name in element.attrib and element is not root:
                element.set(name, _NUMBER.sub(_rounded, " ".join(element.attrib[name].split())))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        element.text = None if not element.text or element.text.isspace() else element.text
        element.tail = None
    _make_tips(root)
    named = {name for element in root.iter() for name in _references(element)}
    for element in root.iter():
        if "id" in element.attrib and element.attrib["id"] not in named:
            del element.attrib["id"]
    _unwrap(root)
    return _text(root)


def inlined(svg: str, prefix: str, label_id: str) -> str:
    """An SVG of `trimmed` to stand in a page: its ids begin with `prefix`, and colours are the page's variables.

    The page's element `label_id` describes it.
    """
    root = ElementTree.fromstring(svg)
    # The ground is the page's own.
    root.remove(next(iter(root)))
    _, _, width, height = root.attrib["viewBox"].split()
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name in ("fill", "stroke") and value in _COLOURS:
                element.set(name, f"var(--{_COLOURS[value]})")
            elif name == "id":
                element.set(name, prefix + value)
            elif name == _LINK:
                del element.attrib[name]
                element.set("href", f"#{prefix}{value[1:]}")
            elif name == "clip-path":
                element.set(name, value.replace("#", f"#{prefix}"))
        if element.get("class") == "tip":
            # The page shows the title itself, as soon as a point is reached.
            element.set("role", "img")
            element.set("aria-label", element.findtext(f"{{{_SVG}}}title", ""))
    for name in ("font-family", "version"):
        root.attrib.pop(name, None)
    # Points of a printer's page are small on a screen.
    size = {"width": f"{1.3 * float(width):.0f}", "height": f"{1.3 * float(height):.0f}"}
    root.attrib |= size | {"fill": "var(--ink)", "role": "group", "aria-labelledby": label_id}
    return _text(root)


def _drop(root: ElementTree.Element, tag: str) -> None:
    for parent in root.iter():
        for child in parent.findall(f"{{{_SVG}}}{tag}"):
            parent.remove(child)


def _style_to_attributes(element: ElementTree.Element) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name and name != "font-family":
            element.set(name, value)


def _rounded(number: re.Match[str]) -> str:
    """At most two decimals: a hundredth of a point is less than any screen shows."""
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _make_tips(root: ElementTree.Element) -> None:
    """Turn the invisible markers of points into circles; they come last, above all else."""
    for parent in list(root.iter()):
        for group in [child for child in parent if child.get("id", "").startswith(TIP)]:
            parent.remove(group)
            place = next((element for element in group.iter(f"{{{_SVG}}}use")), None)
            # A point outside the canvas has no circle.
            if place is not None:
                where = {"cx": place.attrib["x"], "cy": place.attrib["y"], "r": _TIP_RADIUS}
                circle = ElementTree.SubElement(
                    root, f"{{{_SVG}}}circle", {"class": "tip", **where, "fill": "none", "pointer-events": "all"}
                )
                ElementTree.SubElement(circle, f"{{{_SVG}}}title").text = group.attrib["id"].removeprefix(TIP)


def _references(element: ElementTree.Element) -> Iterator[str]:
    for name in (_LINK, "clip-path"):
        yield from _REFERENCE.findall(element.get(name, ""))


def _unwrap(element: ElementTree.Element) -> None:
    """Put what groups without attributes hold in their place, and drop definitions of nothing."""
    children: list[ElementTree.Element] = []
    for child in element:
        _unwrap(child)
        children += list(child) if child.tag == f"{{{_SVG}}}g" and not child.attrib else [child]
    element[:] = [child for child in children if child.tag != f"{{{_SVG}}}defs" or len(child)]


def _text(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    ElementTree.indent(root, space="")
    return ElementTree.tostring(root, encoding="unicode") + "\n"
