"""Bytes of every policy: as the original counted them, and as a user must have them in RAM."""

import json
from pathlib import Path

import pytest

from epic_quant import footprint
from epic_quant.gemma4.config import TextConfig
from epic_quant.records.subjects import AS_PUBLISHED, E4B, RESIDENT, THIS_CHECKPOINT, FootprintRecord

FACTS = Path(__file__).parent / "facts"
E4B_CONFIG = TextConfig.from_json(json.loads((FACTS / "gemma-4-E4B.config.json").read_text(encoding="utf-8")))
PUBLISHED = json.loads((FACTS / "published-numbers.json").read_text(encoding="utf-8"))["epic_quant_original"][
    "policies"
]

# The original's names of its policies; the packed 3-bit one was claimed, not stored.
PUBLISHED_NAMES = {
    "original-1.58": "1.58-bit (brief)",
    "original-3": "3-bit",
    "original-4": "4-bit uniform",
    "bf16": "16-bit (no quant)",
}
PARTS = ("attention", "mlp", "ple_projections", "ple_hot", "total")


@pytest.fixture(params=[THIS_CHECKPOINT, E4B])
def model(request):
    return request.param


@pytest.fixture
def text_config(model, run):
    return E4B_CONFIG if model == E4B else run.config


def counted(policy, model, column, parts, config, published=None):
    return FootprintRecord(
        policy=policy.name,
        model=model,
        column=column,
        nbytes=sum(parts.values()),
        parts=parts,
        unused_nbytes=footprint.unused_nbytes(config),
        published=published or {},
    )


def skip_other_models(policy, config, run):
    if policy.file is not None and config != run.config:
        pytest.skip("a published file has bytes of this checkpoint alone")


def test_as_published(model, text_config, policy, run, record, benchmark):
    """The original's own sum of parts; on E4B its four rows come out to the published digit."""
    skip_other_models(policy, text_config, run)
    parts = footprint.as_published(policy, text_config)
    published = {}
    if model == E4B and policy.name in PUBLISHED_NAMES:
        row = PUBLISHED[PUBLISHED_NAMES[policy.name]]
        published = {part: row[f"{part}_MB"] for part in PARTS}
        measured = parts | {"total": sum(parts.values())}
        assert {part: round(measured[part] / 1e6, 1) for part in PARTS} == published
    record(counted(policy, model, AS_PUBLISHED, parts, text_config, published))
    benchmark.pedantic(footprint.as_published, (policy, text_config))


def test_resident(model, text_config, policy, run, record, benchmark):
    """What must really be in RAM: every text weight in use, the PLE rows kept, and the KV cache."""
    skip_other_models(policy, text_config, run)
    context = run.context_of(text_config)
    parts = footprint.resident(policy, text_config, context)
    record(counted(policy, model, RESIDENT, parts, text_config))
    benchmark.pedantic(footprint.resident, (policy, text_config, context))
