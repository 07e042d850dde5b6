import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from epic_quant.errors import ReportError, SpecError
from epic_quant.results.prices import Priced, Prices, prices_path, read_prices, write_prices
from epic_quant.spec import KVSpec, PolicySpec, Target, TensorClass

KEY = "epic_quant_prices"
TOKENS, PREDICTED = 60, 58


@pytest.fixture
def prices():
    rng = np.random.default_rng(0)

    def priced(name, target, layer, numel, candidates, diagonal):
        derivatives = rng.normal(size=(len(candidates), TOKENS)).astype(np.float32)
        nbytes = tuple(numel * (8 - index) // 8 for index in range(len(candidates)))
        return Priced(name, target, layer, numel, candidates, nbytes, derivatives, diagonal)

    up = Target(TensorClass.MLP, "up_proj", 3)
    specs = ("int8-g128", "int4-g128")
    return Prices(
        (
            priced("layers.3.mlp.up_proj.weight", up, 3, 800, specs, (0.5, 0.25)),
            priced("embed_tokens.weight", Target(TensorClass.EMBEDDING), None, 1600, specs, (1.0, 2.0)),
        ),
        (priced("kv.3", None, 3, 0, (str(KVSpec.parse("int8")),), None),),
        PREDICTED,
        {"checkpoint": "abc", "samples": 1},
        {"embed_tokens.weight": np.array([0.5, 2.0], dtype=np.float32)},
    )


@pytest.fixture
def path(prices, tmp_path):
    path = tmp_path / "out.prices.safetensors"
    write_prices(prices, path)
    return path


def rewrite(path, change):
    """Change the content of the metadata and the arrays of a file."""
    arrays, content = load_file(path), content_of(path)
    change(content, arrays)
    save_file(arrays, path, {KEY: json.dumps(content)})


def content_of(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"][KEY])


def test_what_is_written_is_read(prices, path):
    found = read_prices(path, "abc")
    assert (found.num_predicted, found.facts) == (prices.num_predicted, prices.facts)
    assert {name: its.tolist() for name, its in found.importance.items()} == {"embed_tokens.weight": [0.5, 2.0]}
    for theirs, ours in zip((*found.tensors, *found.kv), (*prices.tensors, *prices.kv), strict=True):
        assert np.array_equal(theirs.derivatives, ours.derivatives)
        assert theirs.derivatives.dtype == np.float32
        assert replace(theirs, derivatives=ours.derivatives) == ours


def test_prices_lie_beside_the_json(tmp_path):
    assert prices_path(tmp_path / "out.json") == tmp_path / "out.prices.safetensors"


def test_a_prediction_is_half_the_mean_square_of_the_sum(prices):
    """Against the formula, with the standard error of the mean of independent tokens."""
    prediction = prices.predict(PolicySpec.parse("mlp=int4-g128,embedding=int8-g128,kv=int8"))
    parts = [prices.tensors[0].derivatives[1], prices.tensors[1].derivatives[0], prices.kv[0].derivatives[0]]
    shares = 0.5 * np.sum(parts, axis=0, dtype=np.float64) ** 2
    assert prediction.kl_divergence == pytest.approx(shares.sum() / PREDICTED)
    assert prediction.standard_error == pytest.approx(shares.std(ddof=1) * TOKENS**0.5 / PREDICTED)
    own = [0.5 * np.sum(part.astype(np.float64) ** 2) / PREDICTED for part in parts]
    assert prediction.alone == pytest.approx(sum(own))


def test_bf16_costs_nothing(prices):
    prediction = prices.predict(PolicySpec("bf16"))
    assert (prediction.kl_divergence, prediction.standard_error, prediction.alone) == (0, 0, 0)


def test_bytes_of_a_policy_are_those_of_its_specs_and_of_bf16_elsewhere(prices):
    assert prices.nbytes(PolicySpec.parse("mlp=int4-g128")) == 800 * 7 // 8 + 2 * 1600
    assert prices.numel == 2400


def test_only_layers_with_a_spec_of_their_own_are_charged_for_it(prices):
    assert prices.predict(PolicySpec.parse("mlp@0-2=int4-g128,kv@1=int8")).kl_divergence == 0
    assert prices.predict(PolicySpec.parse("mlp.up_proj@3=int4-g128")).kl_divergence > 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("theirs=file:model.gguf", "theirs: a published file's weights have no prices"),
        ("mlp=int3-g128", "layers.3.mlp.up_proj.weight: no price of int3-g128; priced: int8-g128, int4-g128"),
        ("mlp=int4-g64", "no price of int4-g64"),
        ("kv=int4", "kv.3: no price of int4; priced: int8"),
    ],
)
def test_a_spec_that_was_not_priced_is_refused_with_those_that_were(prices, policy, message):
    for ask in (prices.predict, prices.nbytes):
        with pytest.raises(SpecError, match=message):
            ask(PolicySpec.parse(policy))


def test_prices_of_another_checkpoint_are_refused(path):
    with pytest.raises(ReportError, match="prices of checkpoint abc, but this run measured xyz"):
        read_prices(path, "xyz")


def test_a_newer_schema_is_refused(path):
    rewrite(path, lambda content, arrays: content.update(schema_version=2))
    with pytest.raises(ReportError, match="schema version 2, newer than 1"):
        read_prices(path)


def test_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(ReportError, match="no such file; the benchmarks write it beside their JSON"):
        read_prices(tmp_path / "none.prices.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ReportError, match="not a file of prices, or damaged"):
        read_prices(path)


def test_another_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ReportError, match="not a file of prices"):
        read_prices(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content, arrays: content.pop("priced"),
        lambda content, arrays: content.update(priced=[]),
        lambda content, arrays: content.update(num_predicted="many"),
        lambda content, arrays: content["priced"][0].update(name="another"),
        lambda content, arrays: content["priced"][0]["candidates"].pop(),
        lambda content, arrays: content["priced"][0]["nbytes"].pop(),
        lambda content, arrays: content["priced"][0].update(target=["mlp"]),
        lambda content, arrays: content["priced"][0].update(target=["nothing", None, None]),
        lambda content, arrays: arrays.update({"kv.3": np.zeros((1, TOKENS + 1), dtype=np.float32)}),
        lambda content, arrays: arrays.update({"kv.3": np.zeros(TOKENS, dtype=np.float32)}),
    ],
)
def test_damaged_content_is_refused(path, change):
    rewrite(path, change)
    with pytest.raises(ReportError, match="damaged"):
        read_prices(path)


def test_reading_and_predicting_need_no_torch(path):
    program = (
        "import sys; from pathlib import Path; from epic_quant.results.prices import read_prices; "
        "from epic_quant.spec import PolicySpec; "
        f"print(read_prices(Path({str(path)!r})).predict(PolicySpec.parse('mlp=int4-g128')).kl_divergence > 0); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
