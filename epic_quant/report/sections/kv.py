"""The KV cache: errors by layer type, divergence in decoding over bytes, and what is stored beside what was claimed."""

from __future__ import annotations

from epic_quant.errors import ReportError
from epic_quant.records import Record
from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Heading, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, megabytes, quotient, significant, times
from epic_quant.report.pareto import front
from epic_quant.results.run import Run

REFERENCE = "bf16"
ORIGINAL = "original"
E4B = "E4B"
SLIDING, FULL = "sliding_attention", "full_attention"

# Below this a divergence is the rounding of fp32 and no effect of a policy.
_LEAST_DIVERGENCE = 1e-9

# The original's bits with scales of least squares, as all but the original's own policy have.
_FITTED = "original+ls"

# Pairs whose errors on full layers are told as a ratio.
_COMPARED = (
    ("p-rope", ORIGINAL),
    ("p-rope", _FITTED),
    ("p-rope-4", "int4"),
    ("original-inverted", _FITTED),
)


def error_blocks(run: Run) -> list[Block]:
    """What every name stands for, then for each layer type bytes, errors and times."""
    found: list[Block] = [
        Paragraph(
            "K, V and queries are those of the model on the evaluation text; what a policy stores of K and V is read "
            "back as the text goes in, and the newest token's queries attend to it. Bytes are what is really stored at "
            "the full length, K and V together, scales and unquantized tokens included. Dense is a preallocated bf16 "
            "tensor: a copy into it, and a slice of it."
        ),
        Table(("KV policy", "stands for"), tuple(_strings(run)), num_text_columns=2),
    ]
    for layer_type in run.labels("kv", "layer_type"):
        found += [Heading(3, layer_type), _errors(run, layer_type)]
    return found


def error_findings(run: Run) -> list[str]:
    """How the errors of attention compare on full layers, and whether unrotated dims deserve fewer bits."""
    ratios = []
    for policy, other in _COMPARED:
        mine, its = (run.value("kv", "attention_rel_l2", kv_policy=name, layer_type=FULL) for name in (policy, other))
        if (ratio := times(mine, its)) != MISSING:
            ratios.append(f"{code(policy)} {ratio} that of {code(other)}")
    found = [f"Error of the attention output on full layers: {', '.join(ratios)}."] if ratios else []
    inverted, fitted = (
        run.value("kv", "attention_rel_l2", kv_policy=name, layer_type=FULL) for name in ("original-inverted", _FITTED)
    )
    if (ratio_inverted := quotient(inverted, fitted)) is not None:
        verdict = "more bits" if ratio_inverted < 1 else "no more bits"
        found.append(
            f"With the bits of {code(_FITTED)} the other way round, and no more of them in all, the error is "
            f"{significant(ratio_inverted)}×: by it, and so stored, dims that carry no position deserve {verdict} than "
            "those that do."
        )
    return found


def divergence_blocks(run: Run) -> list[Block]:
    """The plot, then a row for each policy with its divergence at every context length."""
    contexts = sorted(run.labels("kv_divergence", "context"), key=lambda text: _number(text, "kv_divergence"))
    longest = contexts[-1]
    rows = []
    for policy in run.labels("kv_divergence", "kv_policy"):
        nbytes, reference = (_a_token(run, name, longest) for name in (policy, REFERENCE))
        divergences = (
            significant(run.value("kv_divergence", "kl_divergence", kv_policy=policy, context=context))
            for context in contexts
        )
        rows.append((code(policy), significant(nbytes, 4), times(reference, nbytes), *divergences))
    columns = (
        "KV policy",
        f"bytes a token at {longest}",
        f"{REFERENCE}'s of these",
        *(f"at {context}" for context in contexts),
    )
    return [
        Paragraph(
            "KL divergence of the next token's distribution, in nats a token, from a forward without a cache, over "
            "the tokens just before each context length. The text before them is an exact prefill whose K and V are "
            "stored; they themselves are decoded with the cache, so errors of one layer reach the next. Bytes a token "
            "are those of all layers that own K and V."
        ),
        *_figure(run, contexts),
        Table(columns, tuple(rows)),
    ]


def divergence_findings(run: Run) -> list[str]:
    """The least divergence within each size, at the longest context."""
    contexts = run.labels("kv_divergence", "context")
    longest = max(contexts, key=lambda text: _number(text, "kv_divergence"))
    measured = []
    for record in run.select("kv_divergence", context=longest):
        nbytes, divergence = (record.metrics.get(name) for name in ("nbytes", "kl_divergence"))
        if nbytes is not None and divergence is not None:
            measured.append((record.labels["kv_policy"], nbytes, divergence))
    steps = ", ".join(
        f"{code(policy)} ({significant(nbytes, 4)} bytes, {_divergence(divergence)})"
        for policy, nbytes, divergence in front(measured)
    )
    if not steps:
        return []
    return [f"Least KL divergence within each size of the KV cache, by bytes a token at {longest} tokens: {steps}."]


def bytes_blocks(run: Run) -> list[Block]:
    """For each model MB by policy and length, of KV source layers and of all; then the claim of the original."""
    found: list[Block] = [
        Paragraph(
            "Layers that share K and V store none. Counting all layers as if each stored its own is what a formula "
            "over the layer count would say."
        )
    ]
    for model in run.labels("kv_bytes", "model"):
        lengths = _lengths(run, model)
        rows = []
        for policy in run.labels("kv_bytes", "kv_policy", model=model):
            records = [run.select("kv_bytes", kv_policy=policy, model=model, tokens=text) for text in lengths]
            cells = [
                cell
                for record in (same[0] if same else None for same in records)
                for cell in (
                    megabytes(record.metrics.get("nbytes") if record else None),
                    megabytes(_detail(record, "all_layers_nbytes") if record else None),
                )
            ]
            rows.append((code(policy), *cells))
        columns = [column for text in lengths for column in (f"{int(text):,} tokens", "all layers")]
        found += [Heading(3, f"KV cache of {model}, MB"), Table(("KV policy", *columns), tuple(rows))]
    if run.select("kv_bytes", kv_policy=ORIGINAL, model=E4B):
        found += [Heading(3, "What the original claims, and what is stored"), _claims(run)]
    return found


def bytes_findings(run: Run) -> list[str]:
    """The cache at the longest context beside what counting all layers would say, and the original's ratios."""
    found = []
    for model in run.labels("kv_bytes", "model"):
        longest = _lengths(run, model)[-1]
        for record in run.select("kv_bytes", model=model, tokens=longest, kv_policy=REFERENCE):
            kv_sources, all_layers = record.metrics.get("nbytes"), _detail(record, "all_layers_nbytes")
            if (ratio := times(all_layers, kv_sources)) != MISSING:
                found.append(
                    f"KV cache of {model} at {int(longest):,} tokens in {code(REFERENCE)}: {megabytes(kv_sources)} MB; "
                    f"counting all layers would say {megabytes(all_layers)} MB, {ratio}."
                )
    for layer_type in (SLIDING, FULL):
        claimed, stored = _published(run, f"{layer_type}_claimed"), _stored_ratio(run, layer_type)
        if claimed is not None and stored is not None:
            found.append(
                f"{code(ORIGINAL)} on {E4B}'s {layer_type} layers stores {significant(stored)}× less than "
                f"{code(REFERENCE)}; {significant(claimed)}× was claimed."
            )
    return found


def _strings(run: Run) -> list[tuple[str, str]]:
    rows = []
    for policy in run.labels("kv", "kv_policy"):
        spec = run.select("kv", kv_policy=policy)[0].details.get("spec")
        rows.append((code(policy), code(spec) if isinstance(spec, str) else MISSING))
    return rows


def _errors(run: Run, layer_type: str) -> Table:
    reference = run.value("kv", "nbytes", kv_policy=REFERENCE, layer_type=layer_type)
    rows = []
    for policy in run.labels("kv", "kv_policy", layer_type=layer_type):
        labels = {"kv_policy": policy, "layer_type": layer_type}
        record = run.select("kv", **labels)[0]
        value = {
            name: run.value("kv", name, **labels)
            for name in (
                "nbytes",
                "bits_per_value",
                "k_rel_l2",
                "v_rel_l2",
                "logit_rms",
                "attention_rel_l2",
                "append_s",
                "read_s",
            )
        }
        rows.append(
            (
                code(policy),
                significant(value["nbytes"], 4),
                times(reference, value["nbytes"]),
                significant(value["bits_per_value"], 4),
                *(significant(value[name]) for name in ("k_rel_l2", "v_rel_l2", "logit_rms", "attention_rel_l2")),
                significant(_in(1e6, value["append_s"])),
                times(value["append_s"], _detail(record, "dense_append_s")),
                significant(_in(1e9, value["read_s"])),
                times(value["read_s"], _detail(record, "dense_read_s")),
            )
        )
    columns = (
        "KV policy",
        "bytes a token",
        f"{REFERENCE}'s of these",
        "bits a value",
        "error of K",
        "of V",
        "of logits, rms",
        "of the attention output",
        "append, µs a token",
        "of dense",
        "read, ns a token",
        "of dense",
    )
    return Table(columns, tuple(rows))


def _figure(run: Run, contexts: list[str]) -> list[Block]:
    points = []
    for context in contexts:
        for record in run.select("kv_divergence", context=context):
            nbytes, divergence = (record.metrics.get(name) for name in ("nbytes", "kl_divergence"))
            if plots.drawable(nbytes) and plots.drawable(divergence) and divergence >= _LEAST_DIVERGENCE:
                policy = record.labels["kv_policy"]
                points.append(plots.Point(f"{context} tokens", policy, nbytes, divergence))
    if not points:
        return []
    panels = ", ".join(dict.fromkeys(point.panel for point in points))
    alt = (
        f"KL divergence of the next token's distribution over bytes a token of the KV cache, both logarithmic, a panel "
        f"for each of {panels}, a colour and a marker for each KV policy; below {_LEAST_DIVERGENCE:g} nats, where "
        "fp32 rounds, none is drawn; "
        + plots.extremes(points, lambda point: f"{point.series} at {point.panel}", "nats")
    )
    return [Figure("kv-divergence-over-bytes.svg", alt, plots.divergence_over_bytes(points))]


def _claims(run: Run) -> Table:
    """One row: the original's ratios as it claims them, as its own bits a head give them, and as they are stored."""
    row = [f"{code(ORIGINAL)} on {E4B}, times less than {REFERENCE}"]
    columns = ["KV policy"]
    for layer_type in (SLIDING, FULL):
        columns += [f"{layer_type}, claimed", "by its own arithmetic", "stored in truth"]
        row += [
            _ratio(_published(run, f"{layer_type}_claimed")),
            _ratio(_published(run, f"{layer_type}_arithmetic")),
            _ratio(_stored_ratio(run, layer_type)),
        ]
    return Table(tuple(columns), (tuple(row),))


def _stored_ratio(run: Run, layer_type: str) -> float | None:
    """How many times less than bf16 the original's policy really stores of E4B's layers of a type, at most tokens."""
    longest = next(iter(_lengths(run, E4B)[-1:]), "")
    stored = []
    for policy in (REFERENCE, ORIGINAL):
        records = run.select("kv_bytes", kv_policy=policy, model=E4B, tokens=longest)
        stored.append(records[0].details.get("parts", {}).get(layer_type) if records else None)
    return quotient(stored[0], stored[1])


def _published(run: Run, name: str) -> float | None:
    for record in run.select("kv_bytes", kv_policy=ORIGINAL, model=E4B):
        value: float | None = record.details.get("published", {}).get(name)
        if value is not None:
            return value
    return None


def _lengths(run: Run, model: str) -> list[str]:
    return sorted(run.labels("kv_bytes", "tokens", model=model), key=lambda text: _number(text, "kv_bytes"))


def _a_token(run: Run, policy: str, context: str) -> float | None:
    return run.value("kv_divergence", "nbytes", kv_policy=policy, context=context)


def _divergence(value: float) -> str:
    return significant(value) if value >= _LEAST_DIVERGENCE else "rounding alone"


def _ratio(value: float | None) -> str:
    text = significant(value)
    return text if text == MISSING else f"{text}×"


def _number(text: str, subject: str) -> int:
    if not text.isdecimal():
        raise ReportError(f"a {subject!r} record has {text!r} where a number of tokens was expected")
    return int(text)


def _detail(record: Record, name: str) -> float | None:
    value = record.details.get(name)
    return value if isinstance(value, int | float) else None


def _in(factor: float, value: float | None) -> float | None:
    return None if value is None else value * factor
