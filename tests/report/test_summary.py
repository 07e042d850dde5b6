"""Which policy for how many MB, and the findings below it."""

import pytest

from epic_quant.records import JSON_KEY, Record
from epic_quant.report.blocks import Figure, Findings, Heading, Table
from epic_quant.report.sections import summary
from epic_quant.results.reading import read_run


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What would be drawn."""
    found = []
    monkeypatch.setattr(summary.plots, "quality_over_bytes", lambda *given: found.append(given) or "<svg/>")
    return found


@pytest.fixture
def blocks(write_json):
    return lambda data: summary.blocks(read_run(write_json(data)))


def rows(blocks):
    table = next(block for block in blocks if isinstance(block, Table))
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def quality(data, policies):
    """The run with these policies alone: {name: (MB, divergence)}."""
    data["benchmarks"] = [
        {"name": name, "extra_info": {JSON_KEY: Record("quality", {"policy": name}, metrics).to_json()}}
        for name, (size, divergence) in policies.items()
        for metrics in [{"resident_nbytes": size * 1e6, "kl_divergence": divergence, "kl_se": 0.01}]
    ]
    return data


def test_every_size_has_the_least_error_that_fits_in_it(run_json, blocks):
    policies = {"big": (40, 0.1), "small": (10, 1.0), "worse": (20, 1.5), "middle": (15, 0.5), "off": (50, 0.2)}
    found = rows(blocks(quality(run_json(), policies)))
    assert [(row["resident MB you have"], row["choose"]) for row in found] == [
        ("10.0 to 15.0", "`small`"),
        ("15.0 to 40.0", "`middle`"),
        ("40.0 or more", "`big`"),
    ]
    # The same said by trying: at any size, nothing that fits has less.
    for mb in range(10, 60):
        fitting = {name: divergence for name, (size, divergence) in policies.items() if size <= mb}
        chosen = [row for row in found if float(row["resident MB you have"].split()[0]) <= mb][-1]["choose"]
        assert chosen == f"`{min(fitting, key=fitting.get)}`"


def test_the_reason_is_the_gain_over_the_next_smaller_and_what_is_beaten(run_json, blocks):
    policies = {"small": (10, 1.0), "worse": (20, 1.5), "middle": (15, 0.5), "exact": (30, 0.0)}
    said = [row["why"] for row in rows(blocks(quality(run_json(), policies)))]
    assert said == [
        "the smallest that was measured",
        "2.00× less error for 5.0 MB more than the next smaller; better than `worse` (3.00× the error), no smaller",
        "no error for 15.0 MB more than the next smaller",
    ]


def test_a_gain_within_the_noise_is_not_worth_its_bytes(run_json, blocks):
    policies = {"small": (10, 0.51), "big": (20, 0.5), "bigger": (30, 0.4), "bf16-compute": (20, 0.6)}
    found = rows(blocks(quality(run_json(), policies)))
    assert [(row["choose"], row["resident MB you have"]) for row in found] == [
        ("`small`", "10.0 to 30.0"),
        ("`bigger`", "30.0 or more"),
    ]
    assert found[1]["why"] == (
        "1.27× less error for 20.0 MB more than the next smaller; no more than computing in bf16 changes"
    )


def test_what_is_passed_over_is_told_by_its_name_best_first_and_no_more_than_two(run_json, blocks):
    policies = {"mlp=int4,kv=bf16,ple=all": (12, 0.6), "chosen": (10, 0.5)}
    policies |= {name: (11, error) for name, error in (("c", 3.0), ("a", 1.0), ("b", 2.0))}
    (row,) = rows(blocks(quality(run_json(), policies)))
    assert row["why"].endswith("better than `a` (2.00× the error), `b` (4.00× the error) and 2 more, no smaller")


def test_a_recipe_has_the_string_that_can_be_given_as_a_policy(run_json, blocks):
    data = quality(run_json(), {"int4-g128": (26, 0.1), "mlp=int4,kv=bf16,ple=all": (25, 0.2)})
    details = {"recipe_at": "int4-g128", "kv": "in bf16", "policy": "mlp=int3,kv=bf16,ple=all"}
    metrics = {"resident_nbytes": 24e6, "kl_divergence": 0.3}
    record = Record("quality", {"policy": "recipe at int4-g128"}, metrics, details)
    data["benchmarks"].append({"name": "t", "extra_info": {JSON_KEY: record.to_json()}})
    choice, strings = (block for block in blocks(data) if isinstance(block, Table))
    assert [row[1] for row in choice.rows] == ["`recipe at int4-g128`", "`recipe 1`", "`int4-g128`"]
    assert strings.rows == (
        ("`recipe at int4-g128`", "`mlp=int3,kv=bf16,ple=all`"),
        ("`recipe 1`", "`mlp=int4,kv=bf16,ple=all`"),
    )


def test_a_users_checkpoint_is_not_held_beside_e4b(run_json, blocks):
    assert "E4B's resident MB" in rows(blocks(run_json()))[0]
    assert "E4B's resident MB" not in rows(blocks(run_json(kind="user")))[0]


def test_without_quality_a_block_judges(run_json, blocks):
    found = blocks(run_json("footprint", "block"))
    assert [row["choose"] for row in rows(found)] == ["`original-1.58`", "`int4-g128`", "`bf16`"]
    assert "error of a block" in rows(found)[0]
    assert not any(isinstance(block, Figure) for block in found)


@pytest.mark.parametrize("subject", ["ladder", "block", "footprint"])
def test_without_a_size_or_an_error_the_command_is_told(subject, run_json, blocks):
    heading, paragraph = blocks(run_json(subject, kind="user"))
    assert heading.text == "Which policy for how many MB"
    assert paragraph.text == (
        "Nothing was run that tells. To run it: `pytest benchmarks/test_quality.py --checkpoint benchmarks/mini_gemma4 "
        "--benchmark-json out.json`"
    )


def test_the_findings_that_a_choice_rests_on(run_json, blocks):
    found = blocks(run_json())
    assert [block.text for block in found if isinstance(block, Heading)] == [
        "Which policy for how many MB",
        "The recipes among these",
        "What else to know",
    ]
    (findings,) = [block for block in found if isinstance(block, Findings)]
    thresholds, sensitivity, rows_of, kv, *_ = findings.items
    assert thresholds.startswith(
        "Smallest policy within a KL divergence, in nats a token, of 0.1: `recipe 1` (26.5 MB)"
    )
    assert ", of 0.01: `bf16` (42.9 MB)" in thresholds
    assert sensitivity.startswith("Largest KL divergence for each MB saved: sliding_attention")
    # 500 rows have 60%, 5,000 have 80% and 50,000 have 95%: 90% lie two thirds of the way, by the logarithm.
    assert rows_of == (
        "Resident PLE rows that answer so many lookups of Zipf 1.0: 90% 23,208 rows (499.1 MB, lru), "
        "95% 50,000 rows (1,075.2 MB, lru)."
    )
    assert kv.startswith("Least KL divergence within each size of the KV cache")


def test_the_plot_names_what_its_points_are(run_json, blocks, drawn):
    (figure,) = [block for block in blocks(run_json()) if isinstance(block, Figure)]
    ((points, front, floor),) = drawn
    assert {point.name for point in points} == {"original-1.58", "int4-g128"} | {
        point.name for point in points if "=" in point.name
    }
    assert "through original-1.58 25.8 MB 0.500, recipe 1 26.5 MB 0.0300, int4-g128 26.7 MB 0.0200" in figure.alt
    assert [point.series for point in front] == ["original-1.58", "recipe 1", "int4-g128"]
    assert floor == 2e-5
