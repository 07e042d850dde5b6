"""The command lines that use prices: `recipe` and `predict`."""

import json

import numpy as np
import pytest

from epic_quant import predict
from epic_quant.recipe.__main__ import main
from epic_quant.results.prices import prices_path, read_prices
from epic_quant.spec import PolicySpec

from .conftest import BITS, NUMEL, PARTS, make_prices, quality_entry

NUMEL_BYTES = 2 * sum(NUMEL.values())


def test_a_recipe_keeps_to_its_budget_and_is_predicted_as_predict_does(data, write, capsys):
    path, budget = write(data), sum(PARTS.values()) // 3
    assert main([str(path), "--budget", str(budget)]) == 0
    text, _, name, predicted, *_ = capsys.readouterr().out.splitlines()
    policy = PolicySpec.parse(text)
    assert name.startswith("recipe, ")
    assert policy.ple.residency == "lru"
    assert policy.ple.capacity_rows == 5000
    divergence = read_prices(prices_path(path)).predict(policy).kl_divergence
    assert f"predicted divergence: {divergence:.4g} ± " in predicted
    assert predict.main([str(path), "--policy", text]) == 0
    assert predicted in capsys.readouterr().out


def test_a_policy_goes_through_a_file(data, write, tmp_path, capsys):
    path, file = write(data), tmp_path / "small.policy"
    assert main([str(path), "--bits", "4", "--out", str(file)]) == 0
    capsys.readouterr()
    for form in (["--policy", f"@{file}"], [f"--policy=@{file}"]):
        assert predict.main([str(path), *form]) == 0
        assert capsys.readouterr().out.startswith("small\n")


def test_measured_stands_beside_predicted_where_the_run_has_it(data, write, capsys):
    data["benchmarks"].append(quality_entry("mine", "mlp=int4-g128,kv=bf16,ple=static:5000", 0.5, 0.01))
    path = write(data)
    assert predict.main([str(path), "--policy", "mlp=int4-g128", "--policy", "mlp=int8-g128"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert "measured divergence:  0.5 ± 0.01 nats a token" in first
    assert "measured divergence:  none in this JSON" in second


@pytest.mark.parametrize("by", ["tensor", "layer", "kind", "class"])
def test_coarser_units_never_have_less_alone(by, data, write, capsys):
    path = write(data)
    assert main([str(path), "--bits", "4", "--by", by]) == 0
    finest = main([str(path), "--bits", "4"])
    assert finest == 0
    coarse, fine = (
        float(line.split(":")[1].split(",")[0])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("without cross terms")
    )
    assert fine <= coarse * (1 + 1e-6)


GGML = {"q8_0": 8.5, "q4_k": 4.5, "tq2_0": 2.0625}


@pytest.mark.parametrize("budget", [["--bits", "4"], ["--budget", str(NUMEL_BYTES // 4)]])
@pytest.mark.parametrize("fitted", ["int5-g32+gptq", "q5_k+imatrix"])
def test_a_recipe_for_gguf_has_ggmls_types_alone_and_leaves_k_and_v(budget, fitted, data, write, tmp_path, capsys):
    ggml = GGML | {fitted: 5.5}
    path, file = write(data, make_prices(bits=BITS | ggml)), tmp_path / "small.policy"
    assert main([str(path), *budget, "--format", "gguf", "--out", str(file)]) == 0
    policy = PolicySpec.parse(file.read_text(encoding="utf-8").strip())
    assert {str(spec) for spec in policy.weight_specs} <= {*ggml, "bf16"}
    assert policy.kv.is_plain
    last = capsys.readouterr().out.splitlines()[-1]
    command = f"python -m epic_quant.export 'some model' --policy=@{file} --format gguf small.gguf"
    assert policy.needs_hessians
    hessians = "hessians.safetensors" if fitted.endswith("gptq") else prices_path(path)
    assert last == f"GGUF: {command} --hessians {hessians}"


BAD = {
    "budget": (["--budget", "1kB"], "a budget of 1,000 bytes is too small: these specs need"),
    "bits": (["--bits", "1"], "1 bits a weight are too few: these specs need 1.75 at least"),
    "types": (["--bits", "4", "--format", "gguf"], "no prices of ggml's types; make them with: pytest benchmarks/"),
    "keep": (["--bits", "4", "--keep", "mpl"], "unknown tensor class to keep 'mpl'; did you mean mlp"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_one_line_and_status_2(options, message, data, write, capsys):
    assert main([str(write(data)), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("mlp=int5-g128", "no price of int5-g128; priced: int8-g128, int4-g128, ternary-g128"),
        ("mpl=int4", "unknown tensor class 'mpl'"),
        ("@none.policy", "none.policy"),
    ],
)
def test_a_policy_that_cannot_be_predicted_is_one_line(policy, message, data, write, capsys):
    assert predict.main([str(write(data)), "--policy", policy]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_prices_of_another_checkpoint_or_none_are_refused(data, write, capsys):
    path = write(data)
    data["epic_quant"]["checkpoint"]["fingerprint"] = "another"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert main([str(path), "--bits", "4"]) == 2
    assert "prices of checkpoint 0123456789abcdef, but this run measured another" in capsys.readouterr().err
    prices_path(path).unlink()
    assert main([str(path), "--bits", "4"]) == 2
    assert "out.prices.safetensors: no such file" in capsys.readouterr().err


def test_the_prediction_is_half_the_mean_square_of_all_derivatives():
    prices = make_prices()
    policy = PolicySpec.parse("mlp=int4-g128,embedding=int8-g128,kv=int4")
    total = sum(one.derivatives[one.candidates.index(spec)].astype(float) for one, spec in prices.stored(policy))
    expected = 0.5 * np.square(total).sum() / prices.num_predicted
    found = prices.predict(policy)
    assert found.kl_divergence == pytest.approx(expected)
    alone = [prices.price(one, spec)[0] for one, spec in prices.stored(policy)]
    assert found.alone == pytest.approx(sum(alone))
