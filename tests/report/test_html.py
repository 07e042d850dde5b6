"""The page as text; what it does in a browser is in `test_browser.py`."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from epic_quant.errors import ReportError
from epic_quant.records import JSON_KEY
from epic_quant.report import html
from epic_quant.report.blocks import Bullets, Figure, Findings, Heading, Paragraph, Slider, Table, code
from epic_quant.report.sections import comparison
from epic_quant.results.reading import read_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><path d="M 0 0" fill="#ffffff" /></svg>'


class Page(HTMLParser):
    """What is in a page: elements as (tag, attributes), and the text of each tag's elements."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [data for path, data in self.texts if tag in path and data.strip()]


@pytest.fixture(scope="module")
def everything(run_json, tmp_path_factory):
    """The blocks of a run of everything."""
    path = tmp_path_factory.mktemp("run") / "out.json"
    path.write_text(json.dumps(run_json()), encoding="utf-8")
    return comparison(read_run(path))


@pytest.fixture(scope="module")
def whole(everything):
    """The page of them, as text."""
    return html.render(everything)


def test_it_names_nothing_outside_itself(whole):
    page = Page(whole)
    addresses = {
        attributes[name] for _, attributes in page.elements for name in ("href", "src", "action") if name in attributes
    }
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert set(re.findall(r"https?://[^\"' <]+", whole)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in whole
    assert "url(" not in "".join(page.text("style"))


def test_its_policy_forbids_the_network_and_allows_its_own_style_and_script(whole):
    page = Page(whole)
    (policy,) = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.pop("default-src") == "'none'"
    for kind in ("style", "script"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", whole, re.DOTALL)
        digest = hashlib.sha256(text.encode()).digest()
        assert allowed.pop(f"{kind}-src") == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert allowed == {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert not any("style" in attributes for _, attributes in page.elements)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_contents_name_every_section_and_ids_are_unique(whole):
    page = Page(whole)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in page.of("a")]
    assert {link[1:] for link in links} <= set(ids)
    assert [link[1:] for link in links[1:]] == [title["id"] for title in page.of("h2")]


def test_it_is_small_however_many_policies_are_measured(whole, run_json, write_json):
    assert len(whole.encode()) < 500_000
    data = run_json()
    for entry in list(data["benchmarks"]):
        record = entry["extra_info"].get(JSON_KEY)
        if record and "policy" in record["labels"]:
            for index in range(10):
                name = f"{record['labels']['policy']}-{index}"
                again = {**record, "labels": {**record["labels"], "policy": name}}
                data["benchmarks"].append({**entry, "extra_info": {JSON_KEY: again}})
    assert len(html.render(comparison(read_run(write_json(data)))).encode()) < 1_000_000


def test_names_from_outside_are_text_wherever_they_stand():
    blocks = [
        Heading(1, HOSTILE),
        Paragraph(f"{HOSTILE} {code(HOSTILE)}"),
        Bullets((HOSTILE,)),
        Findings((HOSTILE,)),
        Heading(2, HOSTILE),
        Table((HOSTILE, "b"), ((HOSTILE, code(HOSTILE)),), caption=HOSTILE),
        Figure(f"{HOSTILE}.svg", HOSTILE, SVG),
        Heading(3, HOSTILE),
    ]
    page = Page(html.render(blocks))
    assert not page.of("img")
    assert len(page.of("script")) == 1
    assert "alert" not in "".join(page.text("script"))
    seen = "".join(data for _, data in page.texts)
    # The report's title and the section's stand twice each, in the tab and in the contents.
    assert seen.count(HOSTILE) == 14


def test_a_sliders_data_cannot_leave_its_element_and_reads_back_whole():
    rows = ((HOSTILE, "0.1", "1"), ("2", "0.05", "<!-- & --> \u2028"))
    slider = Slider(HOSTILE, Table(("MB", HOSTILE, "bits"), rows), (HOSTILE, "mlp=int4"), "policy")
    page = Page(html.render([Heading(2, "S"), slider]))
    assert not page.of("img")
    assert [attributes.get("type") for attributes in page.of("script")] == ["application/json", None]
    data = json.loads(page.text("script")[0])
    assert data == {
        "columns": ["MB", HOSTILE, "bits"],
        "rows": [list(row) for row in rows],
        "texts": [HOSTILE, "mlp=int4"],
    }
    (given,) = (one for one in page.of("input") if one["type"] == "range")
    assert (given["min"], given["max"], given["step"]) == ("0", "1", "1")
    assert given["id"] in [label["for"] for label in page.of("label")]


@pytest.mark.parametrize(("count", "most"), [(1, 10), (2, 10), (10, 10), (11, 10), (40, 10), (40, 2)])
def test_elsewhere_a_slider_is_a_few_of_its_rows_with_both_ends(count, most):
    table = Table(("x", "y"), tuple((str(index), "y") for index in range(count)))
    shown = [int(row[0]) for row in Slider("x", table, ("",) * count, "y", most).few.rows]
    assert len(shown) == min(count, most)
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, count - 1)


def test_what_is_in_the_cells_is_in_the_page_in_order(whole, everything):
    tables = [block.few if isinstance(block, Slider) else block for block in everything]
    expected = [
        cell.replace("`", "") for block in tables if isinstance(block, Table) for row in block.rows for cell in row
    ]
    body = re.findall(r"<t[hd](?: scope=\"row\")?(?: class=\"[a-z ]+\")?>(.*?)</t[hd]>", whole)
    assert ["".join(data for _, data in Page(cell).texts) for cell in body] == expected


def test_a_verdict_has_a_colour_beside_its_sign():
    text = html.render([Table(("a", "b"), (("x", "1.0 ✓"), ("y", "✗ `z`"), ("w", "—")))])
    assert '1.0 <span class="good">✓</span>' in text
    assert '<span class="bad">✗</span> <code>z</code>' in text
    assert '<span class="none">—</span>' in text


def test_short_names_stay_in_one_piece_and_long_ones_wrap():
    text = html.render([Paragraph(f"`int4-g128` and `{'mlp=int4-g128,' * 3}`")])
    assert "<code>int4-g128</code>" in text
    assert f'<code class="wrap">{"mlp=int4-g128," * 3}</code>' in text


def test_tables_have_captions_scopes_and_text_on_the_left():
    page = Page(
        html.render([Heading(2, "S"), Heading(3, "T"), Table(("a", "b", "c"), (("x", "1", "z"),), 1, "", True)])
    )
    assert page.text("caption") == ["S: T"]
    heads = page.of("th")
    assert [head.get("scope") for head in heads] == ["col", "col", "col", "row"]
    assert [head.get("class", "").strip() for head in heads] == ["text", "", "text", "text"]
    assert [cell.get("class") for cell in page.of("td")] == [None, "text"]


def test_sections_of_one_name_are_two():
    root = html.grouped([Heading(1, "R"), Heading(2, "A"), Heading(3, "x"), Heading(2, "A"), Heading(3, "x")])
    assert [(group.id, [below.id for below in group.groups]) for group in root.groups] == [
        ("a", ["a-x"]),
        ("a-2", ["a-2-x"]),
    ]


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ReportError, match=r"epic-quant\[report\]"):
        html.render([])
