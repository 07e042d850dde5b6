"""Evaluating policies: passes over the file, each measured at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import SpecError, TokenError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.model import check_token_ids
from epic_quant.quality import resume as resuming
from epic_quant.quality.measures import Quality, TokenMeasures
from epic_quant.quality.passes import Memory, default_memory_nbytes, passes, work
from epic_quant.quality.stream import State, Stream
from epic_quant.quality.variants import Variant, noise_floor, with_reference
from epic_quant.quant import Hessian
from epic_quant.spec import NOISE_FLOOR, PolicySpec


@dataclass(frozen=True)
class Evaluation:
    """The measures of each variant, and where the run resumed if an earlier one was stopped."""

    tokens: Mapping[str, TokenMeasures]
    resumed_after: str | None = None


def evaluate(
    checkpoint: Checkpoint,
    policies: Mapping[str, PolicySpec | Variant],
    windows: Tensor,
    *,
    hessians: Mapping[str, Hessian] | None = None,
    memory_nbytes: int | None = None,
    resume: Path | None = None,
    progress: bool | None = False,
) -> dict[str, Quality]:
    """The quality of every policy, and of two more: the reference, `bf16`, and the noise floor, `bf16-compute`.

    The reference computes in fp32 from the checkpoint's own weights and keeps K and V in fp32; so does every policy
    but for what it quantizes. The noise floor is the reference computed in bf16. All else as `measure`.
    """
    if NOISE_FLOOR in policies:
        raise SpecError(f"{NOISE_FLOOR!r} is the noise floor; give {policies[NOISE_FLOOR]} another name")
    named = {**policies, NOISE_FLOOR: noise_floor()}
    found = measure(
        checkpoint, named, windows, hessians=hessians, memory_nbytes=memory_nbytes, resume=resume, progress=progress
    )
    return {name: tokens.quality() for name, tokens in found.tokens.items()}


def measure(
    checkpoint: Checkpoint,
    policies: Mapping[str, PolicySpec | Variant],
    windows: Tensor,
    *,
    hessians: Mapping[str, Hessian] | None = None,
    memory_nbytes: int | None = None,
    resume: Path | None = None,
    progress: bool | None = False,
) -> Evaluation:
    """What every policy, and the reference as `bf16`, predicts of each token of `windows`, int64 [N, T] from BOS on.

    The policies go through the file together, or in as many passes as `memory_nbytes` makes necessary (by default half
    of what is free); that changes no bit of the result. `hessians` are what `+gptq` is fitted with. With `resume`, what
    the run has come to is kept in that file after every layer, and a run that finds it there goes on and says so on
    stderr. `progress` None shows a bar where stderr is a terminal.

    Raises TokenError for windows that do not begin with BOS, are too short, or do not fit in the memory; SpecError for
    another policy called `bf16`; QuantizationError for weights that cannot be quantized as asked; CheckpointError for a
    damaged checkpoint or state, and it, SpecError or TokenError for the state of another run.
    """
    config = TextConfig.read(checkpoint)
    check_windows(windows, config)
    windows, hessians = windows.long(), hessians or {}
    variants = with_reference(policies, config)
    memory = Memory(config, *windows.shape)
    at = resuming.Progress(passes(variants, memory, memory_nbytes or default_memory_nbytes()))
    resumed_after = None
    identity = None
    if resume is not None:
        identity = resuming.Identity.of(checkpoint, variants, windows, hessians)
        if (found := resuming.load(resume, identity, config)) is not None:
            at, resumed_after = found, str(found)
            print(f"{resume}: goes on after {resumed_after}", file=sys.stderr)

    remaining = [work([variants[name] for name in batch], config, *windows.shape) for batch in at.batches[at.index :]]
    # In units of a billion multiplications, so that the bar's own numbers stay short.
    with tqdm(
        total=sum(map(sum, remaining)) / 1e9,
        initial=sum(remaining[0][: at.layers]) / 1e9 if remaining else 0,
        disable=None if progress is None else not progress,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
    ) as bar:

        def keep(multiplications: float) -> None:
            if resume is not None and identity is not None:
                resuming.save(resume, identity, at)
            bar.update(multiplications / 1e9)

        for batch, multiplications in zip(at.batches[at.index :], remaining, strict=True):
            where = f"{len(batch)} policies, pass {at.index + 1} of {len(at.batches)}"

            def after_layer(
                layers: int, states: list[State], where: str = where, work: list[int] = multiplications
            ) -> None:
                at.layers, at.states = layers, states
                keep(work[layers - 1])
                part = "head" if layers == config.num_layers else f"layer {layers + 1} of {config.num_layers}"
                bar.set_description(f"{part}, {where}")

            bar.set_description(f"layer {at.layers + 1} of {config.num_layers}, {where}")
            together = {name: variants[name] for name in batch}
            measured = run_pass(
                checkpoint, together, windows, hessians, states=at.states, layers=at.layers, after_layer=after_layer
            )
            at.done.update({name: tokens for name, tokens in measured.items() if name not in at.done})
            at.index, at.layers, at.states = at.index + 1, 0, []
            keep(multiplications[-1])
    return Evaluation({name: at.done[name] for name in variants}, resumed_after)


@torch.inference_mode()
def run_pass(
    checkpoint: Checkpoint,
    variants: Mapping[str, Variant],
    windows: Tensor,
    hessians: Mapping[str, Hessian],
    *,
    states: Sequence[State] = (),
    layers: int = 0,
    after_layer: Callable[[int, list[State]], None] | None = None,
) -> dict[str, TokenMeasures]:
    """One pass over the file for some variants, the reference among them, on `windows` int64 [N, T] from BOS on.

    A plain function of picklable values, so that a thread, a process or a cluster can run it. It begins after `layers`
    layers with their `states`, and calls `after_layer(layers, states)` after each. Raises as `measure`.
    """
    stream = Stream(checkpoint, variants, windows, hessians)
    if layers:
        stream.resume(list(states))
    else:
        stream.begin()
    for spec in stream.config.layers[layers:]:
        stream.layer(spec)
        if after_layer is not None:
            after_layer(spec.index + 1, stream.states)
    return stream.measures()


def check_windows(windows: Tensor, config: TextConfig) -> None:
    """Raise TokenError unless these are ids [N, T] that the model has, each row BOS and at least one token more."""
    check_token_ids(windows, config)
    if windows.shape[1] < 2:
        raise TokenError(f"windows of {windows.shape[1]} token have nothing to predict; expected 2 tokens or more")
    strange = (windows[:, 0] != config.bos_token_id).nonzero()
    if len(strange):
        window = int(strange[0])
        raise TokenError(
            f"window {window} begins with token {int(windows[window, 0])}; expected BOS, {config.bos_token_id}"
        )
