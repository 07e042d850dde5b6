"""What a test takes by name: the run, a policy of it, and the function that records what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from epic_quant.errors import EpicQuantError
from epic_quant.kv import KVPolicy
from epic_quant.plugin.journal import Measured, journal_of
from epic_quant.plugin.run import Run
from epic_quant.plugin.session import run_of, runs_benchmarks
from epic_quant.policy import Policy
from epic_quant.records import JSON_KEY, Record

_NO_SENSITIVITIES = [
    pytest.param(
        "none", marks=pytest.mark.skip(reason="on a checkpoint over 1 GB only with -k sensitivity or --by-layer")
    )
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test every policy, KV policy and single change that it takes by name, and every context of a KV cache.

    Recipes are made at the bytes of every policy but bf16. With a `tensor_class` it gets the policies that quantize
    that class.
    """
    if "kv_policy_name" in metafunc.fixturenames:
        metafunc.parametrize("kv_policy_name", list(run_of(metafunc.config).kv_policies))
    if "kv_context" in metafunc.fixturenames:
        metafunc.parametrize("kv_context", run_of(metafunc.config).kv_contexts)
    if "ablation_name" in metafunc.fixturenames:
        # Without a single one pytest would only say that there is none.
        metafunc.parametrize("ablation_name", list(run_of(metafunc.config).changes) or _NO_SENSITIVITIES)
    if "recipe_at" in metafunc.fixturenames:
        run = run_of(metafunc.config)
        names = [name for name in run.policies if name != "bf16"]
        metafunc.parametrize("recipe_at", names if names and run.changes else _NO_SENSITIVITIES)
    if "policy_name" not in metafunc.fixturenames:
        return
    policies = run_of(metafunc.config).policies
    if "tensor_class" in metafunc.fixturenames:
        pairs = [(name, str(part)) for name, policy in policies.items() for part in policy.quantized_classes]
        metafunc.parametrize(("policy_name", "tensor_class"), pairs)
    else:
        metafunc.parametrize("policy_name", list(policies))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Any:
    """Wrong input that all of a session rests on ends it with one line and status 2, not every test by itself."""
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
def policy(run: Run, policy_name: str) -> Policy:
    """One of the run's policies."""
    return run.policies[policy_name]


@pytest.fixture
def kv_policy(run: Run, kv_policy_name: str) -> KVPolicy:
    """One of the run's KV policies."""
    return run.kv_policies[kv_policy_name]


RecordFunction = Callable[..., None]


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> RecordFunction:
    """`record(subject, labels, metrics, details)` puts a record into the benchmark's JSON; call it before timing."""

    def write(
        subject: str,
        labels: Mapping[str, str],
        metrics: Mapping[str, float | None],
        details: Mapping[str, Any] | None = None,
    ) -> None:
        made = Record(subject, labels, metrics, details or {})
        # pytest-benchmark keeps a reference to this dict, so it is filled and never replaced.
        benchmark.extra_info[JSON_KEY] = made.to_json()
        journal_of(request.config).record(Measured(request.node.nodeid, made, benchmark))

    return write
