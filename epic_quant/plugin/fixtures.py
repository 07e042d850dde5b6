"""Fixtures: the run, a policy of it, and the function that records results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from epic_quant.errors import EpicQuantError
from epic_quant.plugin.journal import Measured, journal_of
from epic_quant.plugin.run import Run
from epic_quant.plugin.session import run_of, runs_benchmarks
from epic_quant.records import FINGERPRINT, JSON_KEY, SubjectRecord
from epic_quant.spec import REFERENCE, KVSpec, PolicySpec

_ONLY_ASKED = pytest.mark.skip(reason="on a checkpoint over 1 GB only with --prices or --by-layer")
_NO_ABLATIONS = [pytest.param("none", marks=_ONLY_ASKED)]
_NO_RECIPES = [pytest.param("none", "none", marks=_ONLY_ASKED)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test what it takes by name: every policy, KV policy, ablation and context of a KV cache.

    Recipes are made at the bytes of every policy but bf16, and at some bits a weight. With a `tensor_class` it gets
    the policies that quantize that class.
    """
    if "kv_policy_name" in metafunc.fixturenames:
        metafunc.parametrize("kv_policy_name", list(run_of(metafunc.config).kv_policies))
    if "kv_context" in metafunc.fixturenames:
        metafunc.parametrize("kv_context", run_of(metafunc.config).kv_contexts)
    if "ablation_name" in metafunc.fixturenames:
        # With an empty list pytest would only report an empty parameter set.
        metafunc.parametrize("ablation_name", list(run_of(metafunc.config).ablations) or _NO_ABLATIONS)
    if "recipe_at" in metafunc.fixturenames:
        run = run_of(metafunc.config)
        pairs: list[Any] = [(name, kv) for name in run.policies if name != REFERENCE for kv in ("in bf16", "chosen")]
        pairs += [(f"{bits} bits", "in bf16") for bits in metafunc.module.RECIPE_BITS]
        metafunc.parametrize(("recipe_at", "recipe_kv"), pairs if run.wants_prices else _NO_RECIPES)
    if "policy_name" not in metafunc.fixturenames:
        return
    run = run_of(metafunc.config)
    policies = run.policies
    if "tensor_class" in metafunc.fixturenames:
        pairs = [
            (name, str(part))
            for name, policy in policies.items()
            for part in policy.quantized_classes
            if part in run.classes
        ]
        metafunc.parametrize(("policy_name", "tensor_class"), pairs)
    else:
        metafunc.parametrize("policy_name", list(policies))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Any:
    """Bad input that the whole session depends on ends it with one line and status 2, not each test alone."""
    try:
        return (yield)
    except EpicQuantError as error:
        if fixturedef.scope == "session" and runs_benchmarks(request.config):
            pytest.exit(str(error), returncode=2)
        raise


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    """The session's checkpoint, config and policies."""
    return run_of(request.config)


@pytest.fixture
def policy(run: Run, policy_name: str) -> PolicySpec:
    """One of the run's policies."""
    return run.policies[policy_name]


@pytest.fixture
def kv_policy(run: Run, kv_policy_name: str) -> KVSpec:
    """One of the run's KV policies."""
    return run.kv_policies[kv_policy_name]


RecordFunction = Callable[[SubjectRecord], None]


@pytest.fixture
def record(run: Run, benchmark: Any, request: pytest.FixtureRequest) -> RecordFunction:
    """`record(BlockRecord(…))` puts a record into the benchmark's JSON, with its checkpoint; call it before timing."""

    def write(measured: SubjectRecord) -> None:
        made = measured.to_record()
        # pytest-benchmark keeps a reference to this dict, so it is filled and never replaced.
        benchmark.extra_info[JSON_KEY] = made.to_json() | {FINGERPRINT: run.checkpoint.fingerprint}
        journal_of(request.config).record(Measured(request.node.nodeid, made, benchmark))

    return write
