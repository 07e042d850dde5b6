"""`--plan`: what would be measured, and how long it takes, in place of measuring it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from types import ModuleType

import pytest

from epic_quant.errors import EpicQuantError
from epic_quant.plan import plan, plan_check, plan_prices
from epic_quant.plugin.progress import Remaining, clock, times_of
from epic_quant.plugin.run import READ_WEIGHTS, Run
from epic_quant.plugin.session import run_of


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--plan`, print the plan in place of measuring anything."""
    if not session.config.option.plan:
        return None
    try:
        lines = _plan(session, run_of(session.config))
    except EpicQuantError as error:
        pytest.exit(str(error), returncode=2)
    print("\n".join([f"{len(session.items)} measurements would be made", *lines]))
    return True


def _plan(session: pytest.Session, run: Run) -> list[str]:
    config = session.config
    planned = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    lines = _plan_of_subjects(session.items, run)
    if planned & READ_WEIGHTS and not config.option.no_check:
        lines += plan_check(run.checkpoint, run.used_names)
    if "class_tensors" in planned:
        lines += plan(run.config, run.policies.values(), run.sampled_rows)
    if "qualities" in planned:
        lines += run.plan_of("quality", run.evaluated, run.num_windows)
    if "sensitivities" in planned and run.ablations:
        variants = {name: ablation.policy for name, ablation in run.ablations.items()}
        lines += run.plan_of("sensitivity", variants, run.num_windows)
    if run.wants_prices and planned & {"prices", "predicted"}:
        num_windows, window_tokens = run.price_windows.shape
        lines += plan_prices(run.config, run.priced_specs, num_windows, window_tokens, run.is_large)
    items = session.items if run.wants_prices else ()
    if recipes := sum("recipe_at" in getattr(item, "fixturenames", ()) for item in items):
        lines.append(f"recipes are made from the prices: up to {recipes} more policies, each as long as one above")
    if known := times_of(config):
        seconds = Remaining([item.nodeid for item in session.items], known).seconds
        lines.append(f"in all about {clock(seconds or 0)}, as an earlier run on this checkpoint took")
    return lines


def _plan_of_subjects(items: Sequence[pytest.Item], run: Run) -> list[str]:
    """A line for each file of benchmarks with its measurements, and what its own `plan(run, counts)` tells of them.

    `counts` has the measurements of each test function; those marked to be skipped are not among them.
    """
    counts: dict[ModuleType, Counter[str]] = defaultdict(Counter)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("skip") is None:
            counts[item.module][item.originalname] += 1
    lines = []
    for module, functions in counts.items():
        of = ", ".join(f"{count} of {name.removeprefix('test_')}" for name, count in functions.items())
        lines.append(f"{module.__name__.rpartition('.')[2].removeprefix('test_')}: {functions.total()}, {of}")
        if (told := getattr(module, "plan", None)) is not None:
            lines += [f"  {line}" for line in told(run, functions)]
    return lines
