import re
import xml.etree.ElementTree as ElementTree

import pytest

from epic_quant.report import plots, svg
from epic_quant.report.plots import Axis, Point, Scatter

POINTS = [Point("a", "x", 2.0, 0.25), Point("a", "y", 3.0, 0.5), Point("b", "x", 2.5, 0.1)]


@pytest.fixture(scope="module")
def drawing():
    return plots.scatter_svg(Scatter(Axis("bits", str), Axis("error", str), POINTS))


def ids(root):
    return [element.attrib["id"] for element in root.iter() if "id" in element.attrib]


def references(text):
    return set(re.findall(r"""(?:href="#|url\(#)([^")]+)""", text))


def test_every_reference_is_met_and_nothing_else_has_an_id(drawing):
    assert set(ids(ElementTree.fromstring(drawing))) == references(drawing) != set()


def test_there_are_no_styles_for_a_policy_to_forbid(drawing):
    assert "style" not in drawing
    assert "<metadata" not in drawing


def test_text_is_text(drawing):
    written = ["".join(text.itertext()) for text in ElementTree.fromstring(drawing).findall(".//{*}text")]
    assert {"a", "b", "x", "y", "error"} <= set(written)


def test_inlined_plots_share_no_ids_and_keep_their_references(drawing):
    first, second = (svg.inlined(drawing, prefix, "caption") for prefix in ("one-", "two-"))
    for text in (first, second):
        root = ElementTree.fromstring(text)
        assert set(ids(root)) == references(text)
        assert len(ids(root)) == len(set(ids(root)))
    assert not set(ids(ElementTree.fromstring(first))) & set(ids(ElementTree.fromstring(second)))


def test_inlined_colours_follow_the_page(drawing):
    root = ElementTree.fromstring(svg.inlined(drawing, "one-", "caption"))
    colours = {element.get(name) for element in root.iter() for name in ("fill", "stroke")} - {None, "none"}
    assert colours
    assert all(re.fullmatch(r"var\(--[a-z0-9-]+\)", colour) for colour in colours)


def test_an_inlined_plot_says_what_it_shows_and_so_does_every_point(drawing):
    root = ElementTree.fromstring(svg.inlined(drawing, "one-", "caption"))
    assert (root.attrib["role"], root.attrib["aria-labelledby"]) == ("group", "caption")
    tips = [element for element in root.iter() if element.get("class") == "tip"]
    assert len(tips) == len(POINTS)
    assert all((tip.attrib["role"], tip.attrib["aria-label"]) == ("img", tip.find("{*}title").text) for tip in tips)
