"""The page in a real browser: what it does, that it asks for nothing, and that neither mouse nor sight is needed."""

import json
import re
from itertools import pairwise

import pytest

from epic_quant.records import JSON_KEY, Record
from epic_quant.report.__main__ import main
from epic_quant.report.palette import ON_DARK, ON_PALE

from .browser import chromium

pytestmark = pytest.mark.browser

HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'

# Contrast as WCAG 2.2 defines it, of every text that is shown against the nearest ground below it.
FAINT = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.getClientRects().length || element.closest("title, script, style")) continue;
    const style = getComputedStyle(element), colour = rgb(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(ground(element))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    count += 1;
    if (ratio < 4.5) found.push([node.data.trim(), style.fill, ratio]);
  }
  return [count, found];
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(run_json, tmp_path_factory):
    """The page of a run with every subject, in which one policy's name tries to break out."""
    data = run_json()
    metrics = {"kl_divergence": 0.1, "resident_nbytes": 26_000_000}
    record = Record("quality", {"policy": HOSTILE}, metrics, {"spec": "kv=bf16"})
    data["benchmarks"].append({"name": HOSTILE, "extra_info": {JSON_KEY: record.to_json()}})
    data[JSON_KEY]["checkpoint"]["source"] = HOSTILE
    folder = tmp_path_factory.mktemp("page")
    (folder / "out.json").write_text(json.dumps(data), encoding="utf-8")
    assert main([str(folder / "out.json"), "--out", str(folder), "--format", "html"]) == 0
    return folder / "index.html"


@pytest.fixture
def opened(browser, report):
    """`opened(...)`: the page in a context of these settings, which in the end messages and asked for nothing."""
    contexts, messages, asked = [], [], []

    def open_page(**settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda entry: messages.append(entry.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}


def cells(page, title, column):
    """The texts of a column of the first table of a section, from top to bottom."""
    section = page.locator("section", has=page.locator("h2", has_text=re.compile(f"^{title}$")))
    return section.locator(f"table >> nth=0 >> tbody tr > :nth-child({column})").all_inner_texts()


def header(page, title, column):
    section = page.locator("section", has=page.locator("h2", has_text=re.compile(f"^{title}$")))
    return section.locator(f"table >> nth=0 >> thead th:nth-child({column})")


def in_order(texts, falling=False):
    """Numbers by size, what is missing last; after Python's own reading of them."""
    missing = [text for text in texts if text == "—"]
    numbers = [text for text in texts if text != "—"]
    return sorted(numbers, key=lambda text: float(text.split()[0].replace(",", "")), reverse=falling) + missing


@pytest.mark.parametrize(("column", "name"), [(2, "resident, MB"), (9, "perplexity")])
def test_a_click_sorts_by_number_then_the_other_way_then_as_it_was(column, name, opened):
    page = opened()
    original = cells(page, "Quality", column)
    head = header(page, "Quality", column)
    assert head.inner_text().strip() == name
    assert "—" in original
    expected = [(in_order(original), "ascending"), (in_order(original, True), "descending"), (original, None)]
    for texts, order in expected:
        head.get_by_role("button").click()
        assert cells(page, "Quality", column) == texts
        assert head.get_attribute("aria-sort") == order
    assert in_order(original) != original


def test_names_sort_as_text_and_only_one_column_is_sorted_at_once(opened):
    page = opened()
    header(page, "Quality", 4).get_by_role("button").click()
    header(page, "Quality", 1).get_by_role("button").click()
    names = cells(page, "Quality", 1)
    assert names.index("bf16") < names.index("int4-g128") < names.index("original-1.58")
    assert page.locator("[aria-sort]").count() == 1


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts(key, opened):
    page = opened()
    original = cells(page, "Quality", 4)
    header(page, "Quality", 3).get_by_role("button").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('th').textContent.trim()") == "KL divergence"
    page.keyboard.press(key)
    assert cells(page, "Quality", 4) == in_order(original)


def test_a_points_tooltip_names_its_policy(opened):
    page = opened()
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator(".tip[aria-label^='int4-g128']").first.hover()
    assert tip.inner_text() == "int4-g128: 26.7 MB, 0.0200 nats a token"
    box, window = tip.bounding_box(), page.viewport_size
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= window["width"]
    page.locator("h1").hover()
    assert tip.is_hidden()


def test_the_keyboard_goes_from_point_to_point(opened):
    page = opened()
    plot = page.locator("figure svg").first
    # The plot is one stop of the Tab key, after the last header of the table before it.
    page.locator("main table").first.get_by_role("button").last.focus()
    page.keyboard.press("Tab")
    tips = []
    for _ in range(plot.locator(".tip").count()):
        tips.append(page.locator("#tip").inner_text())
        page.keyboard.press("ArrowRight")
    assert len(set(tips)) == len(tips)
    assert {"original-1.58", "int4-g128", HOSTILE} <= {text.rpartition(": ")[0] for text in tips}
    sizes = [float(re.search(r": ([\d.,]+) MB", text)[1]) for text in tips]
    assert sizes == sorted(sizes)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_is_the_systems_choice_until_the_readers_own_which_is_kept(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    grounds = (ground(light), ground(dark))
    assert grounds == ("rgb(255, 255, 255)", "rgb(18, 21, 26)")
    light.locator("#theme").click()
    assert ground(light) == grounds[1]
    # What a page keeps reaches the browser's other processes a moment later.
    light.wait_for_timeout(1000)
    light.reload()
    assert ground(light) == grounds[1]
    light.locator("#theme").click()
    assert ground(light) == grounds[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(scheme, opened):
    page = opened(color_scheme=scheme)
    page.locator("#unfold").click()
    count, faint = page.evaluate(FAINT)
    # Numbers of a heat map stand on a cell, and have a test of their own.
    own = {f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})" for colour in (ON_PALE, ON_DARK)}
    assert [text for text, fill, _ in faint if fill not in own] == []
    assert count > 1000


def test_it_prints_light_with_every_table(opened):
    page = opened(color_scheme="dark")
    page.evaluate(
        "addEventListener('beforeprint', () => {"
        " window.folded = document.querySelectorAll('main details:not([open])').length; })"
    )
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert page.evaluate("window.folded") == 0
    assert page.locator("main details[open]").count() == 0, "folded again"
    page.emulate_media(media="print")
    assert ground(page) == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()


def test_nothing_is_wider_than_a_telephone(opened):
    page = opened(viewport={"width": 390, "height": 844})
    page.locator("#unfold").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_contents_lead_to_their_sections(opened):
    page = opened()
    for link in page.locator("nav a").all():
        link.click()
        title = page.locator(f"h2[id='{link.get_attribute('href')[1:]}']")
        assert title.inner_text() == link.inner_text()


def test_a_link_to_a_folded_table_unfolds_it(opened):
    page = opened()
    fold = page.locator("main details").first
    name = fold.locator("h3").get_attribute("id")
    assert not fold.locator("table").is_visible()
    page.evaluate("name => { location.hash = name; }", name)
    fold.locator("table").wait_for(state="visible")


def test_the_first_stop_of_the_keyboard_skips_to_the_report(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_what_a_screen_reader_needs_is_there(opened):
    page = opened()
    count = page.locator
    assert page.evaluate("document.documentElement.lang") == "en"
    assert [count(name).count() for name in ("h1", "main", "nav[aria-label]", "header")] == [1, 1, 1, 1]
    tables = count("table").count()
    assert tables > 20
    assert count("table > caption").count() == tables
    assert "" not in [text.strip() for text in count("caption").all_text_contents()]
    assert count("thead th:not([scope=col])").count() == count("tbody th:not([scope=row])").count() == 0
    assert count("tbody tr").count() == count("tbody tr > th:first-child").count()
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    titles = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((title) => Number(title.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(titles))
    for plot in count("figure svg").all():
        label = page.locator(f"[id='{plot.get_attribute('aria-labelledby')}']").text_content()
        assert len(label) > 40
    assert count(".tip:not([aria-label]), .tip:not([role=img])").count() == 0
    names = [button.text_content().strip() or button.get_attribute("aria-label") for button in count("button").all()]
    assert all(names)
    # Chromium's own reading of it: every control has a name, and plots and points have theirs.
    assert page.get_by_role("button", name="Dark colours").count() == 1
    assert page.get_by_role("img", name=re.compile("^int4-g128: 26.7 MB")).count() == 1


def test_names_from_outside_are_text(opened):
    page = opened()
    assert page.locator("img").count() == 0
    assert page.locator("script:not([type='application/json'])").count() == 1
    assert HOSTILE in cells(page, "Quality", 1)


def test_the_keyboard_chooses_a_recipe_and_copies_its_policy(opened, run_json):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    recipes = [
        recipe
        for entry in run_json("prices")["benchmarks"]
        if JSON_KEY in entry["extra_info"]
        for recipe in entry["extra_info"][JSON_KEY]["details"]["frontier"]
    ]
    slider = page.get_by_role("slider", name="Recipe by resident MB")
    slider.focus()
    for key, index in (("Home", 0), ("ArrowRight", 1), ("End", len(recipes) - 1), ("ArrowLeft", len(recipes) - 2)):
        page.keyboard.press(key)
        megabytes, predicted = (float(text) for text in page.locator(".slider .main").all_inner_texts())
        assert megabytes == pytest.approx(recipes[index]["resident_nbytes"] / 1e6, abs=0.051)
        assert predicted == pytest.approx(recipes[index]["predicted"], rel=0.01)
        assert slider.get_attribute("aria-valuetext").startswith(f"{megabytes}; predicted")
        assert page.get_by_label("policy", exact=True).input_value() == recipes[index]["policy"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == recipes[-2]["policy"]


def test_a_slider_prints_as_its_table_and_one_row(opened):
    page = opened()
    page.locator("#unfold").click()
    page.emulate_media(media="print")
    assert page.locator(".slider input").is_hidden()
    assert page.locator(".slider textarea").is_hidden()
    assert page.locator(".slider dl").is_visible()
    assert page.locator(".slider + details tbody tr").count() == 10
    assert page.locator(".slider + details table").is_visible()
