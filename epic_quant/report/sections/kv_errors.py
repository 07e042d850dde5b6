"""Errors of K, V and attention by KV spec and layer type, with bytes and times."""

from __future__ import annotations

from epic_quant.records.subjects import KVRecord
from epic_quant.report.analysis import kv
from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import ratio, scaled, significant, times
from epic_quant.results.run import Run, distinct
from epic_quant.spec import REFERENCE

_NAMES: tuple[Column[KVRecord], ...] = (
    Column("KV policy", lambda one: one.kv_policy, code, text=True),
    Column("stands for", lambda one: str(one.spec), code, text=True),
)


def blocks(run: Run) -> list[Block]:
    """What every name stands for, then for each layer type bytes, errors and times."""
    records = run.of(KVRecord)
    found: list[Block] = [
        Paragraph(
            "K, V and queries are the model's on the evaluation text. K and V are stored as the text goes in and read "
            "back, and the queries of the newest token attend to them. Bytes are those stored at the full length, K "
            "and V together, with scales and unquantized tokens. Dense is a preallocated bf16 tensor: a copy into it, "
            "and a slice of it."
        ),
        table(_NAMES, {one.kv_policy: one for one in reversed(records)}.values()),
    ]
    for layer_type in distinct(one.layer_type for one in records):
        found += [Heading(3, layer_type), _errors(run.of(KVRecord, layer_type=layer_type))]
    return found


def findings(run: Run) -> list[str]:
    """How the errors of attention compare on full layers, and whether unrotated dims deserve fewer bits."""
    compared = ", ".join(
        f"{code(name)} {ratio(value)} that of {code(other)}" for name, other, value in kv.error_ratios(run)
    )
    found = [f"Error of the attention output on full layers: {compared}."] if compared else []
    if (inverted := kv.inverted_ratio(run)) is not None:
        deserve = "more" if inverted < 1 else "no more"
        found.append(
            f"{code(kv.INVERTED)} gives more bits to the dims that RoPE does not rotate, {code(kv.FITTED)} to those "
            f"that it rotates; with no more bits in all, its error is {ratio(inverted)}. Stored like this, dims that "
            f"carry no position deserve {deserve} bits than those that do."
        )
    return found


def _errors(records: list[KVRecord]) -> Table:
    reference = next((one.nbytes for one in records if one.kv_policy == REFERENCE), None)
    columns: tuple[Column[KVRecord], ...] = (
        _NAMES[0],
        Column("bytes a token", lambda one: one.nbytes, lambda nbytes: significant(nbytes, 4)),
        Column(f"{REFERENCE}'s of these", lambda one: times(reference, one.nbytes)),
        Column("bits a value", lambda one: one.bits_per_value, lambda bits: significant(bits, 4)),
        Column("error of K", lambda one: one.k_rel_l2, significant),
        Column("of V", lambda one: one.v_rel_l2, significant),
        Column("of logits, rms", lambda one: one.logit_rms, significant),
        Column("of the attention output", lambda one: one.attention_rel_l2, significant),
        Column("append, µs a token", lambda one: one.append_s, scaled(1e6)),
        Column("of dense", lambda one: times(one.append_s, one.dense_append_s)),
        Column("read, ns a token", lambda one: one.read_s, scaled(1e9)),
        Column("of dense", lambda one: times(one.read_s, one.dense_read_s)),
    )
    return table(columns, records)
