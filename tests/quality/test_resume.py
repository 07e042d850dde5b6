"""A run that was stopped goes on from the last whole layer, to the same bits; the state of another run is refused."""

from dataclasses import astuple

import pytest
import torch
from safetensors.torch import save_file

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, SpecError, TokenError
from epic_quant.quality import evaluate, measure
from epic_quant.quality.stream import Stream
from epic_quant.quant import Hessian
from epic_quant.spec import PolicySpec

POLICIES = {text: PolicySpec.parse(text) for text in ("mlp=int4", "full_attention=int4,kv=int4", "embedding=int4")}


class StoppedError(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def stop_before(monkeypatch):
    """`stop_before(n)`: the n-th call from now on of a layer, or of a pass's head, ends the run; None stops nothing."""
    calls = {"left": None}

    def counted(method):
        def call(self, *arguments):
            if calls["left"] == 0:
                raise StoppedError
            if calls["left"] is not None:
                calls["left"] -= 1
            return method(self, *arguments)

        return call

    monkeypatch.setattr(Stream, "layer", counted(Stream.layer))
    monkeypatch.setattr(Stream, "measures", counted(Stream.measures))
    return lambda count: calls.update(left=count)


@pytest.fixture
def whole(toy_checkpoint, windows):
    return {name: astuple(quality) for name, quality in evaluate(toy_checkpoint, POLICIES, windows).items()}


# Layers 4 and 5 give the K and V that layers 6 to 11 read. Two passes have 13 steps each.
@pytest.mark.parametrize(("tight", "stops"), [(False, [0, 1, 5, 6, 11, 12]), (True, [3, 13, 20])])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tight, stops, toy_checkpoint, windows, whole, stop_before, tight_memory, tmp_path, capsys
):
    memory_nbytes = tight_memory(POLICIES) if tight else None
    for stop in stops:
        path = tmp_path / f"{stop}.safetensors"
        stop_before(stop)
        with pytest.raises(StoppedError):
            evaluate(toy_checkpoint, POLICIES, windows, memory_nbytes=memory_nbytes, resume=path)
        assert path.exists() == (stop > 0)
        stop_before(None)
        capsys.readouterr()
        resumed = evaluate(toy_checkpoint, POLICIES, windows, memory_nbytes=memory_nbytes, resume=path)
        assert {name: astuple(quality) for name, quality in resumed.items()} == whole
        assert ("goes on after" in capsys.readouterr().err) == (stop > 0)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * len(stops)


def test_stopped_twice_is_the_same_too(toy_checkpoint, windows, whole, stop_before, tmp_path):
    path = tmp_path / "state"
    for stop in (4, 3):
        stop_before(stop)
        with pytest.raises(StoppedError):
            evaluate(toy_checkpoint, POLICIES, windows, resume=path)
    stop_before(5)  # four layers and three are done; five more and the head would be left
    with pytest.raises(StoppedError):
        evaluate(toy_checkpoint, POLICIES, windows, resume=path)
    stop_before(1)
    resumed = evaluate(toy_checkpoint, POLICIES, windows, resume=path)
    assert {name: astuple(quality) for name, quality in resumed.items()} == whole


def test_a_run_says_where_it_went_on(toy_checkpoint, windows, stop_before, tmp_path, capsys):
    path = tmp_path / "state"
    stop_before(7)
    with pytest.raises(StoppedError):
        measure(toy_checkpoint, POLICIES, windows, resume=path)
    stop_before(None)
    assert measure(toy_checkpoint, POLICIES, windows, resume=path).resumed_after == "layer 7 of pass 1 of 1"
    assert capsys.readouterr().err == f"{path}: goes on after layer 7 of pass 1 of 1\n"
    stop_before(0)  # all is done, so nothing is computed again
    assert measure(toy_checkpoint, POLICIES, windows, resume=path).resumed_after == "the end"
    assert measure(toy_checkpoint, POLICIES, windows, resume=path).tokens.keys() == {"bf16", *POLICIES}


@pytest.fixture
def state(toy_checkpoint, windows, stop_before, tmp_path):
    """The state of a run that was stopped after its first layer."""
    path = tmp_path / "state"
    stop_before(1)
    with pytest.raises(StoppedError):
        measure(toy_checkpoint, POLICIES, windows, resume=path)
    stop_before(None)
    return path


def test_the_state_of_another_run_is_refused_in_one_line(state, toy, toy_checkpoint, windows):
    before = state.read_bytes()
    other = {**POLICIES, "mlp=int4": PolicySpec.parse("mlp=int3")}
    others = windows.clone()
    others[1, 3] += 1
    hessians = {"layers.0.mlp.down_proj.weight": Hessian(lambda: torch.eye(80))}
    cases = [
        (SpecError, "of a run with other policies, which differ in mlp=int4", other, windows, None),
        (SpecError, "which differ in embedding=int4", dict(list(POLICIES.items())[:2]), windows, None),
        (TokenError, "on other windows or another text", POLICIES, others, None),
        (TokenError, "on other windows or another text", POLICIES, windows[:, :9], None),
        (SpecError, r"that was fitted with other Hessians", POLICIES, windows, hessians),
    ]
    for error, message, policies, ids, fitted in cases:
        with pytest.raises(error, match=message) as raised:
            measure(toy_checkpoint, policies, ids, hessians=fitted, resume=state)
        assert "\n" not in str(raised.value)
        assert str(state) in str(raised.value)
    with (
        Checkpoint.open(toy("other_rope")) as checkpoint,
        pytest.raises(CheckpointError, match="of a run on checkpoint"),
    ):
        measure(checkpoint, POLICIES, windows, resume=state)
    assert state.read_bytes() == before


@pytest.mark.parametrize("content", ["text", "tensors", "cut off"])
def test_a_file_that_is_no_state_is_refused_and_kept(content, state, toy_checkpoint, windows, tmp_path):
    path = tmp_path / "other"
    match content:
        case "text":
            path.write_text("no state", encoding="utf-8")
        case "tensors":
            save_file({"x": torch.zeros(1)}, path)
        case "cut off":
            path.write_bytes(state.read_bytes()[:-1])
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="not the state of an evaluation; delete it to begin anew"):
        measure(toy_checkpoint, POLICIES, windows, resume=path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_an_error(toy_checkpoint, windows, tmp_path):
    with pytest.raises(CheckpointError, match="the state of the run cannot be written"):
        measure(toy_checkpoint, {}, windows, resume=tmp_path / "none" / "state")
    assert not any(tmp_path.iterdir())
