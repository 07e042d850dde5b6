import pytest
import torch

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.metrics import relative_l2
from epic_quant.prices.backward import Backward, HeadRows, KeysValues, Linear, Rows

from .conftest import WINDOWS, Recorded

TOYS = ["e4b", "e2b", "no_ple", "no_sharing", "other_rope"]
LIMIT = 1e-4  # fp32 against fp64; gradients at queries are sums that cancel


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("weights", "name"), [(name, name) for name in TOYS], indirect=["weights"], ids=TOYS)
def test_gradients_are_those_of_one_graph_in_transformers(weights, name, truth):
    """At every linear layer, at K and V with those of the layers that share them, and at the tables' rows."""
    backward = Recorded(weights, WINDOWS, seed=0)
    captured = list(backward.run())
    expected = truth(name, backward.labels)

    linears = {one.name: one for one in captured if isinstance(one, Linear)}
    assert set(linears) == {
        key for key in expected.outputs if key in weights.tensors and not weights.tensors[key].unused
    }
    for key, one in linears.items():
        assert relative_l2(one.x, expected.inputs[key].flatten(0, 1)) < LIMIT
        assert relative_l2(one.gradient, expected.outputs[key].grad.flatten(0, 1)) < LIMIT
        assert torch.equal(one.weight, weights.get(key).float())

    kv = {one.layer: one for one in captured if isinstance(one, KeysValues)}
    assert set(kv) == set(expected.keys) == {spec.index for spec in weights.config.layers if spec.is_kv_source}
    for layer, one in kv.items():
        assert relative_l2(one.k, expected.keys[layer].detach()) < LIMIT
        assert relative_l2(one.v, expected.values[layer].detach()) < LIMIT
        assert relative_l2(one.k_gradient, expected.keys[layer].grad) < LIMIT
        assert relative_l2(one.v_gradient, expected.values[layer].grad) < LIMIT

    tables = {key: torch.zeros_like(grad) for key, grad in expected.tables.items()}
    for one in captured:
        if isinstance(one, Rows):
            tables[one.name].index_add_(0, one.ids, one.gradient.double())
            assert torch.equal(one.rows, weights.rows(one.name, one.ids).float())
        elif isinstance(one, HeadRows):  # The embedding's other end.
            rows = slice(one.first, one.first + len(one.weight))
            tables["embed_tokens.weight"][rows] += (one.gradient.T @ one.x).double()
    for key, gradient in tables.items():
        assert relative_l2(gradient, expected.tables[key]) < LIMIT


@pytest.mark.usefixtures("small_steps")
def test_both_ends_of_the_tied_embedding_have_a_share(weights):
    captured = list(Backward(weights, WINDOWS, seed=0).run())
    [rows] = [one for one in captured if isinstance(one, Rows) and one.name == "embed_tokens.weight"]
    heads = [one for one in captured if isinstance(one, HeadRows)]
    assert [one.first for one in heads] == [0, 50, 100]
    assert rows.gradient.norm() > 0
    assert all(one.gradient.norm() > 0 for one in heads)


def test_steps_of_any_size_give_the_same_gradients(weights, request):
    whole = list(Backward(weights, WINDOWS, seed=0).run())
    request.getfixturevalue("small_steps")
    backward = Recorded(weights, WINDOWS, seed=0)
    in_steps = list(backward.run())
    linears = [{one.name: one for one in found if isinstance(one, Linear)} for found in (whole, in_steps)]
    # Labels are drawn slice by slice, so they are others; inputs are the same.
    for key, one in linears[0].items():
        assert relative_l2(linears[1][key].x, one.x) < LIMIT


def test_hidden_states_in_a_folder_give_the_same_bits_and_leave_nothing(weights, tmp_path):
    in_ram = list(Backward(weights, WINDOWS, seed=0).run())
    in_file = list(Backward(weights, WINDOWS, seed=0, folder=tmp_path).run())
    for one, other in zip(in_ram, in_file, strict=True):
        assert type(one) is type(other)
        for key, value in vars(one).items():
            same = (
                torch.equal(value, vars(other)[key]) if isinstance(value, torch.Tensor) else value == vars(other)[key]
            )
            assert same, (one, key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head_rows", [30, 1000], ids=["in slices", "at once"])
def test_labels_are_distributed_as_the_model_says(weights, reference, monkeypatch, head_rows):
    """Pearson's statistic of the labels of one token, drawn 20,000 times, against its softmax in `transformers`."""
    monkeypatch.setattr("epic_quant.prices.backward._HEAD_ROWS", head_rows)
    window = WINDOWS[:1, :2]
    backward = Recorded(weights, window.repeat(20_000, 1), seed=0)
    next(backward.run())
    logits = reference("e4b", torch.float64)(window, output_hidden_states=True, use_cache=False).logits[0]
    for position in range(2):
        expected = logits[position].softmax(-1) * len(backward.labels)
        seen = backward.labels[:, position].bincount(minlength=len(expected)).double()
        common = expected >= 10
        statistic = ((seen - expected).square() / expected)[common].sum()
        degrees = int(common.sum())
        assert degrees > 20
        assert abs(float(statistic) - degrees) < 4 * (2 * degrees) ** 0.5


def test_another_seed_draws_other_labels_and_the_same_one_the_same(weights):
    labels = []
    for seed in (0, 0, 1):
        backward = Recorded(weights, WINDOWS, seed)
        next(backward.run())
        labels.append(backward.labels)
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_the_pass_says_where_it_is(weights):
    steps = []
    list(Backward(weights, WINDOWS, seed=0).run(steps.append))
    layers = weights.config.num_layers
    assert steps[:2] == [f"layer 1 of {layers}", f"layer 2 of {layers}"]
    assert steps[layers:] == ["head", *(f"layer {n} of {layers} backwards" for n in range(layers, 0, -1)), "tables"]


def test_a_weight_that_is_no_number_is_refused_naming_the_layer(toy_checkpoint_with_nan):
    with pytest.raises(CheckpointError, match="after layer 1 is not finite"):
        list(Backward(CheckpointWeights(toy_checkpoint_with_nan), WINDOWS, seed=0).run())


def test_the_last_token_of_a_window_is_not_predicted(toy):
    with Checkpoint.open(toy("e4b")) as checkpoint:
        backward = Backward(CheckpointWeights(checkpoint), WINDOWS, seed=0)
        assert backward.num_predicted == 3 * 8
        head = next(backward.run())
        last = head.gradient.view(3, 9, -1)[:, -1]
        assert not last.any()
