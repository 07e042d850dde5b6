"""What the report says of quality, of sensitivities and of recipes."""

import pytest

from epic_quant.records import JSON_KEY, Record
from epic_quant.report import plots
from epic_quant.report.blocks import Figure, Findings, Heading, Paragraph, Table
from epic_quant.report.pareto import front
from epic_quant.report.sections import comparison
from epic_quant.results.reading import read_run

RECIPE = "sliding_attention=int3-g128,mlp=int4-g128,kv=bf16,ple=lru:5000"


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What would be drawn, by the name of the plot."""
    found = {}
    for name in ("quality_over_bytes", "divergence_over_errors", "heat_map"):
        monkeypatch.setattr(plots, name, lambda *given, name=name: found.setdefault(name, given) and "<svg/>")
    for name in ("error_over_bits", "time_over_bytes"):
        monkeypatch.setattr(plots, name, lambda *given: "<svg/>")
    return found


@pytest.fixture
def report(write_json):
    return lambda data: comparison(read_run(write_json(data)))


def findings(blocks):
    return "\n".join(item for block in blocks if isinstance(block, Findings) for item in block.items)


def paragraphs(blocks):
    return "\n".join(block.text for block in blocks if isinstance(block, Paragraph))


def table(blocks, title, index=0):
    """A table after a heading, as {first cell: {column: cell}}."""
    start = next(i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.text == title)
    found = [block for block in blocks[start:] if isinstance(block, Table)][index]
    return {row[0].strip("`"): dict(zip(found.columns, row, strict=True)) for row in found.rows}


def change(data, subject, how, **labels):
    """Apply `how` to the records of a subject that bear these labels."""
    for entry in data["benchmarks"]:
        record = entry["extra_info"].get(JSON_KEY)
        if record and record["subject"] == subject and labels.items() <= record["labels"].items():
            how(record)
    return data


def add(data, record):
    data["benchmarks"].append({"name": "t", "extra_info": {JSON_KEY: record.to_json()}})


def test_it_says_how_many_tokens_are_judged(run_json, report):
    data = change(run_json("quality"), "quality", lambda record: record["details"].update(num_tokens=765))
    assert "evaluation text, of which 765 are predicted. `bf16-compute`" in paragraphs(report(data))
    assert "evaluation text. `bf16-compute`" in paragraphs(report(run_json("quality")))


def test_the_quality_table_has_every_measure(run_json, report):
    row = table(report(run_json("quality")), "Quality")["int4-g128"]
    assert list(row.values()) == [
        "`int4-g128`", "26.7", "20.0", "0.0200 ± 0.0010", "0.0100", "0.0600", "0.180", "0.800", "20.40 ± 0.30",
        "97.0", "1.50",
    ]  # fmt: skip


def test_the_front_is_drawn_and_said_without_what_is_beaten(run_json, report, drawn):
    data = run_json("quality")
    add(data, Record("quality", {"policy": "worse"}, {"kl_divergence": 0.6, "resident_nbytes": 26_600_000}))
    said = findings(report(data))
    assert (
        f"`original-1.58` (25.8 MB, 0.500), `{RECIPE}` (26.5 MB, 0.0300), `int4-g128` (26.7 MB, 0.0200), "
        "`bf16` (42.9 MB, 0)."
    ) in said
    points, least, floor = drawn["quality_over_bytes"]
    assert {point.series for point in points} == {"original-1.58", "recipe 1", "int4-g128", "worse"}
    drawn_front = [(point.x, point.y) for point in least]
    assert drawn_front == [(25.8, 0.5), (26.5, 0.03), (26.7, 0.02)], "a divergence of 0 has no place on the axis"
    assert floor == 2e-5


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ([("a", 1, 3), ("b", 2, 2), ("c", 3, 1)], "abc"),
        ([("a", 1, 1), ("b", 2, 2)], "a"),
        ([("a", 1, 2), ("b", 1, 1)], "b"),
        ([("a", 1, 1), ("b", 2, 1)], "a"),
        ([], ""),
    ],
)
def test_a_front_has_what_nothing_as_small_equals(points, names):
    assert "".join(name for name, _, _ in front(points)) == names


def test_policies_within_the_noise_are_named(run_json, report):
    assert "KL divergence of 2.00e-05 nats a token; every quantized policy's is larger" in findings(
        report(run_json("quality"))
    )
    data = change(run_json("quality"), "quality", lambda r: r["metrics"].update(kl_divergence=1e-5), policy="int4-g128")
    assert "those of `int4-g128` are no larger" in findings(report(data))


def test_the_rank_correlation_of_cheaper_errors_is_computed(run_json, report, drawn):
    data = run_json("quality", "weights", "block", "ladder", "sensitivity")
    # A third policy, whose weights are as good as int4-g128's and a little worse.
    metrics = {"rel_l2": 0.3, "nbytes": 1000, "bits_per_weight": 2.0}
    labels = {"policy": RECIPE, "tensor_class": "mlp", "spec": "x", "op": "quantize"}
    add(data, Record("weights", labels, metrics))
    blocks = report(data)
    rows = [block for block in blocks if isinstance(block, Table) and block.columns[-1] == "Spearman's correlation"]
    assert rows[0].rows[0] == ("relative L2 of weights", "policies", "3", "1.00")
    assert ("error of a block", "policies", "2", "—") in rows[0].rows
    assert "relative L2 of weights over 3 policies 1.00 (sorts them nearly as KL divergence does)" in findings(blocks)
    panels = {point.panel for point in drawn["divergence_over_errors"][0]}
    assert "relative L2 of weights, policies" in panels
    assert "relative L2 of weights, single classes" in panels


def test_a_policys_weight_error_weighs_classes_by_their_weights(run_json, report, drawn):
    report(run_json("quality", "weights"))
    (point,) = (
        p for p in drawn["divergence_over_errors"][0] if p.panel == "relative L2 of weights, policies" and p.y == 0.02
    )
    # Both classes have as many bytes and bits, so as many weights.
    assert point.x == pytest.approx(((0.0812**2 + 0.0931**2) / 2) ** 0.5)


def test_the_class_that_costs_most_for_each_mb_is_named(run_json, report, drawn):
    blocks = report(run_json("sensitivity"))
    # 0.01 · 1.7 · 1.1 nats for 5.2 · (1 - 3.125/16) MB.
    cost = 0.0187 / (5.2 * (1 - 3.125 / 16))
    said = findings(blocks)
    assert f"Largest KL divergence for each MB saved: sliding_attention under `int3-g128` ({cost:.5f} nats" in said
    assert "at each width: `int4` sliding_attention, `int3` sliding_attention" in said
    assert "Smallest: mlp under `int4-g128`" in said
    cells = {(cell.row, cell.column): cell.value for cell in drawn["heat_map"][0]}
    assert cells["mlp", "int4"] == pytest.approx(0.0088), "judged on the evaluation text"
    assert (
        table(blocks, "On the calibration text")["sliding_attention `int3-g128"]["KL divergence"] == "0.0170 ± 0.00085"
    )


def test_layers_have_a_panel_for_each_spec(run_json, report, drawn):
    data = run_json("sensitivity")
    labels = {"tensor_class": "mlp", "spec": "int3-g128", "text": "evaluation", "layer": "7"}
    add(data, Record("sensitivity", labels, {"kl_divergence": 0.5, "kl_per_mb": 9.0}))
    blocks = report(data)
    assert plots.Cell("int3-g128", "mlp", "7", 0.5) in drawn["heat_map"][0]
    assert "mlp, layer 7 `int3-g128" in table(blocks, "On the evaluation text")
    assert "9.00" not in findings(blocks), "a layer is no class"


def test_a_recipe_is_held_against_its_prediction_and_named_policies(run_json, report):
    blocks = report(run_json("quality", "sensitivity"))
    # On the calibration text 0.01 · 1.7 of the one class and 0.008 of the other.
    assert table(blocks, "Recipes")[f"recipe 1, `{RECIPE}"] == {
        "policy": f"recipe 1, `{RECIPE}`",
        "resident, MB": "26.5",
        "predicted": "0.0250",
        "measured": "0.0300",
        "measured / predicted": "1.20",
        "against as many bytes": "✓",
    }
    said = findings(blocks)
    assert "measured 0.0300 nats a token, predicted 0.0250, within a factor of 2" in said
    assert "no worse than any of the 1 named policies of as many bytes or fewer" in said


@pytest.mark.parametrize(("divergence", "beaten"), [(0.0299, False), (0.028, True)])
def test_a_better_policy_of_fewer_bytes_is_named_beyond_a_standard_error(divergence, beaten, run_json, report):
    def better(record):
        record["metrics"] |= {"resident_nbytes": 26_500_000, "kl_divergence": divergence, "kl_se": 1e-3}

    data = change(run_json("quality", "sensitivity"), "quality", better, policy="int4-g128")
    change(data, "quality", lambda record: record["metrics"].update(kl_se=1e-3), policy=RECIPE)
    assert ("worse than `int4-g128`" in findings(report(data))) is beaten


def made_recipe(at, kv, divergence, nbytes):
    policy = "sliding_attention=int4-g128,mlp=int4-g128,kv=bf16,ple=lru:5000"
    metrics = {"kl_divergence": divergence, "kl_se": divergence / 20, "resident_nbytes": nbytes}
    return Record(
        "quality", {"policy": f"recipe at {at}, {kv}"}, metrics, {"recipe_at": at, "kv": kv, "policy": policy}
    )


@pytest.fixture
def with_made(run_json):
    """A recipe at each policy's bytes: at the original's far better, at int4-g128's half as good."""
    data = run_json("quality", "sensitivity")
    for at, divergence, nbytes in (("original-1.58", 0.02, 25_700_000), ("int4-g128", 0.04, 26_650_000)):
        add(data, made_recipe(at, "in bf16", divergence, nbytes))
    return data


def test_recipes_stand_beside_the_policy_whose_bytes_they_take(with_made, report):
    blocks = report(with_made)
    row = table(blocks, "Recipes")["original-1.58"]
    assert list(row.values())[1:8] == ["in bf16", "0.500", "25.7", "0.0180", "0.0200", "1.11", "✓"]
    assert row["recipe"].startswith("`sliding_attention=int4-g128,mlp")
    # That it takes a little less than the policy is no excuse.
    assert table(blocks, "Recipes")["int4-g128"]["against as many bytes"] == "✗ `int4-g128`"
    assert f"recipe 1, `{RECIPE}" in table(blocks, "Recipes", 1)


def test_what_recipes_at_the_bytes_of_policies_come_to_is_computed(with_made, report):
    said = findings(report(with_made))
    assert (
        "Recipes at the bytes of named policies, K and V in bf16: 1 of 2 are no worse than any named policy of as many "
        "bytes or fewer, within one standard error; measured / predicted is 1.11 to 2.22, for 1 of 2 within a factor "
        "of 2; KL divergence comes down from 0.500 to 0.0200 at those of `original-1.58`." in said
    )


def test_made_recipes_are_drawn_and_are_on_the_front(with_made, report, drawn):
    add(with_made, made_recipe("original-1.58", "chosen", 0.001, 25_600_000))
    blocks = report(with_made)
    points, least, _ = drawn["quality_over_bytes"]
    assert {point.series for point in points} >= {"recipes, K and V in bf16", "recipes, K and V chosen", "recipe 1"}
    assert (least[0].x, least[0].y) == (25.6, 0.001)
    assert not any(name.startswith("recipe at") for name in table(blocks, "Quality"))


def test_a_prediction_that_is_far_off_is_told(run_json, report):
    data = change(run_json("quality", "sensitivity"), "quality", lambda r: r["metrics"].update(kl_divergence=0.2))
    assert "not within a factor of 2" in findings(report(data))


def test_without_a_recipe_the_command_is_told(run_json, report):
    data = run_json("quality")
    data["benchmarks"] = [
        entry
        for entry in data["benchmarks"]
        if "=" not in entry["extra_info"].get(JSON_KEY, {"labels": {}})["labels"].get("policy", "")
    ]
    blocks = report(data)
    assert any(isinstance(b, Paragraph) and "python -m epic_quant.recipe out.json" in b.text for b in blocks)


def test_every_plot_of_quality_has_a_text(run_json, report):
    blocks = report(run_json("quality", "sensitivity", "weights", "block", "ladder"))
    figures = {block.file_name: block for block in blocks if isinstance(block, Figure)}
    names = {"quality-divergence-over-bytes.svg", "quality-divergence-over-proxies.svg", "sensitivity-heat-map.svg"}
    assert names <= set(figures)
    assert all(len(figures[name].alt) > 40 for name in names)
