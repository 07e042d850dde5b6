"""The quality benchmarks, run as a user runs them, on a toy checkpoint with a tokenizer of its own."""

import argparse
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from epic_quant import predict
from epic_quant.calibration import Hessians
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.plugin.run import SMALL_MODEL, Run
from epic_quant.prices import price
from epic_quant.quality import evaluate
from epic_quant.recipe.__main__ import main as make_recipe
from epic_quant.records import JSON_KEY, Record
from epic_quant.results.prices import prices_path, read_prices, write_prices
from epic_quant.spec import PolicySpec, TensorClass, WeightSpec
from epic_quant.text import token_windows

MINI = Path(__file__).resolve().parents[2] / SMALL_MODEL

BY_LAYER = "mlp=int4,mlp@0-2+7=int8"
RECIPES = [f"recipe at {policy}, K and V {kv}" for policy in ("mlp=int4", BY_LAYER) for kv in ("in bf16", "chosen")]
AT_BITS = [f"recipe at {bits} bits, K and V in bf16" for bits in (2, 3, 4, 5, 6)]


@pytest.fixture(scope="module")
def options(toy, numbers, tmp_path_factory):
    """A toy checkpoint that knows every token of its small vocabulary by its number, and two texts."""
    folder = shutil.copytree(toy("e4b"), tmp_path_factory.mktemp("model") / "toy")
    numbers.save(str(folder / "tokenizer.json"))
    for name, step in (("evaluation", 1), ("calibration", 7)):
        text = " ".join(str(4 + number * step % 100) for number in range(60))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    texts = ["--text", folder / "evaluation.txt", "--calibration-text", folder / "calibration.txt"]
    policies = ["--policy", "mlp=int4", "--policy", BY_LAYER, "--kv-policy", "int4", "--context", "100"]
    return ["--checkpoint", folder, *texts, *policies, "--windows", "2", "--window-tokens", "12"]


@pytest.fixture(scope="module")
def pytest_run(run_pytest):
    """The exit status and what was printed, of `pytest benchmarks/test_quality.py` in the repository."""
    return partial(run_pytest, "benchmarks/test_quality.py")


@pytest.fixture(scope="module")
def finished(options, pytest_run, tmp_path_factory):
    """What was printed, the records, and the folder of states."""
    folder = tmp_path_factory.mktemp("run")
    out = folder / "out.json"
    status, printed = pytest_run(*options, "--memory", "1GB", "--resume", folder / "states", "--benchmark-json", out)
    assert status == 0, printed
    entries = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    return printed, [Record.from_json(entry["extra_info"][JSON_KEY]) for entry in entries], folder / "states"


def test_every_policy_and_the_noise_floor_are_recorded(finished):
    records = {record.labels["policy"]: record for record in finished[1] if record.subject == "quality"}
    assert set(records) == {"bf16", "mlp=int4", BY_LAYER, "bf16-compute", *RECIPES, *AT_BITS}
    assert records["bf16"].metrics["kl_divergence"] == 0
    assert records["mlp=int4"].metrics["kl_divergence"] > records["bf16-compute"].metrics["kl_divergence"] > 0
    order = ["mlp=int4", BY_LAYER, "bf16"]
    assert order == sorted(order, key=lambda name: records[name].metrics["nbytes"])
    assert order == sorted(order, key=lambda name: -records[name].metrics["kl_divergence"])
    for record in records.values():
        assert record.metrics["resident_nbytes"] == sum(record.details["parts"].values())
        assert record.details["num_tokens"] == 2 * 11
        assert all(math.isfinite(value) for value in record.metrics.values())


def test_recipes_keep_to_the_bytes_of_the_policy_they_stand_beside(finished):
    """And keep as many PLE rows as bf16, with K and V in bf16 or chosen; what is predicted stands beside."""
    records = {record.labels["policy"]: record for record in finished[1] if record.subject == "quality"}
    for name in RECIPES:
        record = records[name]
        at = records[record.details["recipe_at"]]
        assert name.startswith(f"recipe at {at.labels['policy']}, ")
        assert record.metrics["resident_nbytes"] <= at.metrics["resident_nbytes"]
        recipe = PolicySpec.parse(record.details["spec"])
        assert str(recipe.kv) in (("bf16",) if name.endswith("bf16") else ("bf16", "int4"))
        assert str(recipe.ple) == "lru:5000", "as many rows as bf16 keeps"
        assert record.metrics["predicted_kl_divergence"] > 0


def test_every_figure_of_quality_has_its_prediction_beside_it(finished):
    """Of the checkpoint's own weights it is 0; of the noise floor, which quantizes nothing, there is none."""
    for record in finished[1]:
        if record.subject in ("quality", "sensitivity") and record.labels.get("policy") != "bf16-compute":
            predicted, measured = (record.metrics[name] for name in ("predicted_kl_divergence", "kl_divergence"))
            assert (predicted == 0) == (measured == 0)


def test_prices_lie_beside_the_json_and_recipes_come_of_them(finished):
    """Every matrix in use is priced; the file gives what the record says; the frontier goes from few bytes to many."""
    record = next(record for record in finished[1] if record.subject == "prices")
    prices = read_prices(finished[2].parent / record.details["file"])
    assert {one.name for one in prices.tensors} == set(record.details["tensors"])
    for one in prices.tensors:
        for spec, (divergence, error, nbytes) in record.details["tensors"][one.name]["specs"].items():
            assert prices.price(one, spec) == (pytest.approx(divergence), pytest.approx(error))
            assert one.nbytes[one.index(spec)] == nbytes
    nbytes = [point["resident_nbytes"] for point in record.details["frontier"]]
    assert nbytes == sorted(nbytes)
    for at in record.details["by"]:
        assert set(at["predicted"]) == {"tensor", "layer", "kind", "class"}


def test_recipes_alone_can_be_made(options, pytest_run, tmp_path):
    """Their prices and qualities are measured for them."""
    status, printed = pytest_run(*options, "-k", "test_recipe", "--benchmark-json", tmp_path / "out.json")
    assert status == 0, printed
    assert "9 passed" in printed


def test_every_ablation_is_recorded_on_the_evaluation_text(finished):
    records = [record for record in finished[1] if record.subject == "sensitivity"]
    assert {record.labels["text"] for record in records} == {"evaluation"}
    assert {record.labels["tensor_class"] for record in records} == {*TensorClass, "kv_cache"}
    assert len(records) == 7 * 6 + 1
    for record in records:
        saved = record.metrics["saved_nbytes"]
        assert record.metrics["kl_per_mb"] == pytest.approx(record.metrics["kl_divergence"] / (saved / 1e6))
        assert "layer" not in record.labels
    kv = next(record for record in records if record.labels["tensor_class"] == "kv_cache")
    assert kv.details["kv"] == "int4"
    # Six kv_sources, five of them sliding with a window of 6 tokens and heads of 16, the other with heads of 32.
    assert kv.details["nbytes"] + kv.metrics["saved_nbytes"] == 2 * 2 * 2 * (5 * 6 * 16 + 100 * 32)


def test_the_plan_is_printed_and_states_are_kept(finished):
    assert "quality, 4 policies with the reference on 2 windows of 12 tokens: 1 pass" in finished[0]
    assert "sensitivity, 44 policies with the reference on 2 windows of 12 tokens: 1 pass" in finished[0]
    names = ["quality.safetensors", "recipe.safetensors", "sensitivity.safetensors"]
    assert sorted(path.name for path in finished[2].iterdir()) == names


def test_a_plan_alone_counts_layers_where_they_are_asked_for(options, pytest_run):
    status, printed = pytest_run(*options, "--by-layer", "--plan")
    assert status == 0, printed
    # 43 of all layers; 10 + 2 attention layers, and 12 of the MLP and the PLE projections, by six; six KV sources.
    assert f"sensitivity, {1 + 43 + 6 * (10 + 2 + 12 + 12) + 6} policies" in printed
    assert "up to 9 more policies" in printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--windows", "9"], "60 tokens, but 9 windows of 12 need 99"),
        (["--memory", "1kB"], "are allowed; take fewer windows or more memory"),
        (["--policy", "mlp@12=int4"], "mlp@12=int4: this model of 12 layers has no such tensor"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(wrong, message, options, pytest_run, tmp_path):
    """However many measurements rest on it."""
    status, printed = pytest_run(*options, *wrong, "-q", "--benchmark-json", tmp_path / "out.json")
    assert status == 2
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 40


def test_the_state_of_other_policies_ends_the_run(options, pytest_run, finished):
    status, printed = pytest_run(
        *options, "--policy", "mlp=int3", "--resume", finished[2], "-k", "test_quality and bf16"
    )
    assert status == 2
    assert "the state of a run with other policies, which differ in mlp=int3" in printed


def test_an_invalid_size_is_refused(options, pytest_run):
    status, printed = pytest_run(*options, "--memory", "many")
    assert status == 4
    assert "--memory" in printed


def test_importance_of_prices_measures_a_policy_and_again_from_their_file(run_pytest, tmp_path, capsys):
    """No Hessians are gathered for `+imatrix` alone; later the file of prices takes their place.

    What recipes are made of is in the JSON of the prices, whatever else ran; a published file is refused in one line.
    """
    policy, out = "embedding=q4_0+imatrix", tmp_path / "out.json"
    chosen = ["--policy", policy, "--price", "q8_0", "--windows", "1", "--window-tokens", "12", "--no-check"]
    tests = [f"benchmarks/test_quality.py::{name}" for name in ("test_quality", "test_prices")]
    status, printed = run_pytest(*tests, *chosen, "-k", "embedding or test_prices", "--benchmark-json", out)
    assert status == 0, printed
    entries = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    records = {record.subject: record for record in (Record.from_json(e["extra_info"][JSON_KEY]) for e in entries)}
    assert set(records) == {"quality", "prices"}
    measured = records["quality"].metrics["kl_divergence"]
    with Checkpoint.open(MINI) as checkpoint:
        windows = token_windows(checkpoint, MINI / "eval.txt", 1, 12)
        importance = Hessians(prices_path(out), checkpoint)
        found = evaluate(checkpoint, {policy: PolicySpec.parse(policy)}, windows, hessians=importance)
    assert found[policy].kl_divergence == pytest.approx(measured, rel=1e-3)
    assert make_recipe([str(out), "--bits", "9"]) == 0
    assert predict.main([str(out), "--policy", policy]) == 0
    assert f"measured divergence:  {measured:.4g} ± " in capsys.readouterr().out
    assert predict.main([str(out), "--policy", policy, "--policy", "theirs=file:a model.gguf"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "theirs: a published file's weights have no prices; to measure it: pytest benchmarks/" in printed.err
    assert printed.err.endswith(" --policy 'theirs=file:a model.gguf'\n")


def test_a_policy_that_importance_is_not_enough_for_ends_the_run_at_once(toy_checkpoint, pytestconfig, tmp_path):
    path = tmp_path / "out.prices.safetensors"
    write_prices(price(toy_checkpoint, torch.ones(1, 4), [WeightSpec("int8")], facts={"text_sha256": "some"}), path)
    given = {"checkpoint": str(toy_checkpoint.source), "policy": ["mlp=int4+gptq"], "hessians": path}
    run = Run(argparse.Namespace(**(vars(pytestconfig.option) | given)), pytestconfig.rootpath)
    with run.checkpoint, pytest.raises(CheckpointError, match=r"int4\+gptq needs Hessians, but .* has prices"):
        run.check_inputs(())


def test_trellises_of_a_large_checkpoint_are_measured_on_demand(toy_checkpoint, pytestconfig, monkeypatch):
    """They take long to encode, which is said."""

    def run(**given):
        given = {"checkpoint": str(toy_checkpoint.source), "policy": [], "price": [], "hessians": None} | given
        return Run(argparse.Namespace(**(vars(pytestconfig.option) | given)), pytestconfig.rootpath)

    def names(run):
        run.checkpoint.close()
        return set(run.policies), {str(spec) for spec in run.priced_specs}

    policies, priced = names(run())
    assert {"trellis2", "trellis3", "trellis4"} < policies
    assert "trellis3+had256" in priced
    monkeypatch.setattr("epic_quant.plugin.run.LARGE_CHECKPOINT_NBYTES", 0)
    policies, priced = names(large := run())
    assert not [name for name in policies | priced if "trellis" in name]
    assert "takes long to encode: --policy trellis3 measures it" in large.left_out["trellis3"]
    policies, priced = names(run(policy=["trellis3"], price=["trellis2"]))
    assert policies == {"bf16", "trellis3"}
    assert {"trellis2", "trellis3+had256"} < priced
