"""What every tensor costs: its figures from made-up prices, and its heat map."""

import copy
import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from epic_quant.errors import ReportError
from epic_quant.records.subjects import SensitivityRecord
from epic_quant.report import html, markdown
from epic_quant.report.analysis import prices
from epic_quant.report.blocks import Paragraph, Slider, Table
from epic_quant.report.layer_map import LayerMap, Square, draw_layer_map, layer_map
from epic_quant.report.plots import style
from epic_quant.report.sections import prices as section
from epic_quant.results.reading import parse_run

from .conftest import entry, made, quality, synthetic_prices


@pytest.fixture
def run_of(run_json):
    """A run with these records."""

    def make(*records):
        data = run_json("block")
        data["benchmarks"] += [entry(record) for record in records]
        return parse_run(data, "x")

    return make


def beside(tensor_class, spec, measured, predicted):
    return made(
        SensitivityRecord,
        tensor_class=tensor_class,
        spec=spec,
        text="evaluation",
        kl_divergence=measured,
        predicted_kl_divergence=predicted,
    )


def tables(blocks):
    return [block for block in blocks if isinstance(block, Table)]


def test_tensors_are_compared_at_the_four_bits_that_most_have_whatever_their_group():
    record = synthetic_prices()
    usual, offers = prices.at_equal_bits(prices.tensors(record))
    assert usual == "int4-g128"
    assert len(offers) == len(record.tensors)
    specs = {offer.tensor.kind: offer.price.spec for offer in offers}
    assert specs["per_layer_projection"] == "int4-g64"
    assert {spec for kind, spec in specs.items() if kind != "per_layer_projection"} == {"int4-g128"}


def test_a_spec_that_few_have_is_not_what_all_are_compared_at():
    record = synthetic_prices()
    name = next(iter(record.tensors))
    tensors = copy.deepcopy(dict(record.tensors))
    for one in tensors.values():
        one["specs"] |= {"int4-g128+had256": [1.0, 0.1, one["numel"] // 2]}
    del tensors[name]["specs"]["int4-g128"]
    usual, offers = prices.at_equal_bits(prices.tensors(replace(record, tensors=tensors)))
    assert usual == "int4-g128+had256"
    assert len(offers) == len(tensors)


def test_a_kind_costs_what_its_tensors_cost_at_widths_that_all_of_them_have():
    record = synthetic_prices()
    tensors = copy.deepcopy(dict(record.tensors))
    lacks = next(name for name, one in tensors.items() if one["kind"] == "q_proj")
    del tensors[lacks]["specs"]["int4-g128"]
    found = {kind.name: kind for kind in prices.kinds(prices.tensors(replace(record, tensors=tensors)))}
    down = [one["specs"] for one in tensors.values() if one["kind"] == "down_proj"]
    assert found["mlp.down_proj"].num_tensors == len(down)
    assert found["mlp.down_proj"].prices["int4"] == pytest.approx(sum(specs["int4-g128"][0] for specs in down))
    assert "int4" not in found[f"{tensors[lacks]['tensor_class']}.q_proj"].prices
    assert sum(kind.num_tensors for kind in found.values()) == len(tensors)


def test_costliest_first_by_nats_for_each_mb_saved_from_bf16():
    record = synthetic_prices()
    ranked = prices.by_cost(prices.at_equal_bits(prices.tensors(record))[1])
    costs = {}
    for name, one in record.tensors.items():
        divergence, _, nbytes = one["specs"].get("int4-g128") or one["specs"]["int4-g64"]
        costs[name] = divergence / ((2 * one["numel"] - nbytes) / 1e6)
    assert [offer.tensor.name for offer in ranked] == sorted(costs, key=costs.__getitem__, reverse=True)
    assert ranked[0].kl_per_mb == pytest.approx(max(costs.values()))


def test_the_tables_have_the_ten_costliest_and_the_ten_cheapest_and_the_budgets(run_of):
    costliest, cheapest, budgets = tables(section.blocks(run_of(synthetic_prices())))
    assert len(costliest.rows) == len(cheapest.rows) == 10
    assert float(costliest.rows[0][-1]) > float(cheapest.rows[0][-1])
    assert budgets.rows[0] == ("3.00", "1.2", "0.100", "0.0625 (1.60×)", "0.0500 (2.00×)", "0.0250 (4.00×)")


def test_markdown_has_ten_of_the_recipes(run_of):
    (slider,) = (block for block in section.blocks(run_of(synthetic_prices())) if isinstance(block, Slider))
    assert len(slider.table.rows) == len(slider.texts) == 40
    lines = markdown.render([slider]).splitlines()
    assert len([line for line in lines if line.strip()]) == 2 + 10


def test_a_page_of_42_layers_stays_small(run_of):
    """With policies as long as those of E4B: 20 kB each."""
    record = synthetic_prices(42)
    long = tuple(one | {"policy": "layers.41.down_proj=codebook3-g64+had256+gptq," * 450} for one in record.frontier)
    assert len(html.render(section.blocks(run_of(replace(record, frontier=long)))).encode()) < 1_500_000


def test_policies_and_recipes_have_their_prediction_beside_what_was_measured(run_of):
    run = run_of(synthetic_prices(), quality("int4-g128", 1e7, 0.02, predicted_kl_divergence=0.03))
    (table,) = (block for block in tables(section.blocks(run)) if block.columns[0] == "policy")
    assert table.rows == (("`int4-g128`", "0.0200 ± 0.0010", "0.0300", "1.50 ✗"),)


def test_predictions_out_of_range_are_flagged_with_their_divergence(run_of):
    run = run_of(
        synthetic_prices(),
        beside("mlp", "int8", 0.001, 0.001),
        beside("mlp", "int4-g128", 0.01, 0.0125),
        beside("mlp", "ternary", 2.0, 0.5),
        beside("embedding", "int4-g128", 0.004, 0.006),
    )
    (table,) = (block for block in tables(section.blocks(run)) if block.columns[0] == "quantized alone")
    assert [row[-1] for row in table.rows] == ["1.00 ✓", "1.25 ✓", "0.250 ✗", "1.50 ✗"]
    (text,) = (block.text for block in section.blocks(run) if isinstance(block, Paragraph) and "Out of" in block.text)
    assert "underestimated 1 of 4" in text
    assert "mlp `ternary` (0.250). All have larger divergence than any within range (0.0100 at most)" in text
    assert "overestimated 1 of 4" in text
    assert "embedding `int4-g128` (1.50)" in text


def test_predictions_within_range_are_counted(run_of):
    run = run_of(synthetic_prices(), beside("mlp", "int8", 0.001, 0.00081))
    assert any("All are within range." in block.text for block in section.blocks(run) if isinstance(block, Paragraph))


def test_findings_have_extremes_savings_and_range(run_of):
    records = [beside("mlp", f"int{bits}", 4.0**-bits, 0.9 * 4.0**-bits) for bits in (2, 3, 4, 8)]
    costs, saved, ranged = section.findings(run_of(synthetic_prices(), *records))
    assert costs.startswith("At `int4-g128`, the costliest tensor for each MB saved is `layers.")
    assert "4.00 times less KL divergence than one for each class at equal bytes, at 3.00 to 4.00 bits" in saved
    assert ranged == (
        "Predicted / measured KL divergence of 4 classes and specs: 0.900 to 0.900, median 0.900, 4 of them from 0.8 "
        "to 1.25; Spearman's rank correlation 1.00."
    )


def test_a_record_without_tensors_and_recipes_is_no_error(run_of):
    run = run_of(replace(synthetic_prices(), tensors={}, frontier=(), by=()))
    assert section.findings(run) == []
    assert len(section.blocks(run)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": {"a": {}}},
        {"tensors": {"a": {"tensor_class": "mlp", "kind": None, "layer": None, "numel": 0, "specs": {}}}},
        {"tensors": {"layers.3.x": {"tensor_class": "mlp", "kind": None, "layer": 10**300, "numel": 1, "specs": {}}}},
        {
            "tensors": {
                "a": {"tensor_class": "mlp", "kind": None, "layer": 0, "numel": 1, "specs": {"int99": [1, 1, 1]}}
            }
        },
        {"frontier": ({"resident_nbytes": "x"},)},
        {"by": (3,)},
    ],
)
def test_damage_is_named_in_one_line(damage, run_of):
    with pytest.raises(ReportError, match=r"^damaged record of 'prices': [^\n]+$"):
        section.blocks(run_of(replace(synthetic_prices(), **damage)))


def squares(num_layers, seed=0):
    chosen = random.Random(seed)
    found = [
        Square(kind, layer, 10 ** chosen.uniform(-6, -2), f"{kind} of {layer}")
        for kind in ("q_proj", "down_proj")
        for layer in range(num_layers)
        if kind == "down_proj" or layer != 3
    ]
    return [*found, Square("embed_tokens", None, 1e-3, "embed_tokens")]


@pytest.mark.parametrize("num_layers", [1, 18, 42])
def test_the_map_has_a_column_for_each_layer_marks_and_a_tip_for_each_tensor(num_layers):
    plot = LayerMap("title", "legend", squares(num_layers), {0, 5}, "full attention")
    with style():
        layers, others, legend = draw_layer_map(plot).axes
        assert [text.get_text() for text in layers.get_xticklabels()] == [str(layer) for layer in range(num_layers)]
        assert [text.get_text() for text in layers.get_yticklabels()] == ["q_proj", "down_proj"]
        assert [text.get_text() for text in others.get_yticklabels()] == ["embed_tokens"]
        (mesh,) = layers.collections
        assert mesh.get_array().mask.sum() == (num_layers > 3)
        marks = next(line for line in layers.lines if line.get_marker() == "v")
        assert list(marks.get_xdata()) == [layer + 0.5 for layer in (0, 5) if layer < num_layers]
        assert legend.get_xlabel() == "legend"
    (figure,) = layer_map("map.svg", "Prices", plot)
    tips = [title.text for title in ElementTree.fromstring(figure.svg).iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(tips) == sorted(square.tip for square in plot.squares)


def test_what_has_no_place_on_a_logarithmic_scale_is_left_blank():
    zero = Square("q_proj", 0, 0.0, "nothing")
    assert layer_map("map.svg", "Prices", LayerMap("t", "l", [zero], (), "")) == []
    (figure,) = layer_map("map.svg", "Prices", LayerMap("t", "l", [zero, *squares(2)], (), ""))
    assert "nothing" not in figure.svg
