"""The PLE row cache: what it hits on traces, how fast its rows are, and what a packed table costs in quality."""

import gc
import json
import math
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.model import begin, head
from epic_quant.metrics import kl_divergence, squared_norm
from epic_quant.plan import plan_forwards, plan_quantizing
from epic_quant.ple import PLERowCache, frequent_ids, pack_table, pages, simulation, traces
from epic_quant.ple.packing import Table
from epic_quant.ple.residency import NAMES, Residency
from epic_quant.plugin.session import run_of
from epic_quant.policy import PolicyWeights
from epic_quant.quant import quantize
from epic_quant.records.subjects import (
    EMPTY_START,
    LOWEST_IDS,
    OPTIMUM,
    OTHER_TEXT,
    SHIPPED_LIST,
    PLEColdRecord,
    PLEGuardRecord,
    PLEHitsRecord,
    PLEHotRecord,
    PLEMemoryRecord,
    PLEStartRecord,
    PLETextRecord,
)
from epic_quant.spec import BF16, NAMED, PolicySpec, TensorClass, WeightSpec

FACTS = Path(__file__).parent / "facts"
PUBLISHED = json.loads((FACTS / "published-numbers.json").read_text(encoding="utf-8"))["epic_quant_original"]["ple"]
E4B = json.loads((FACTS / "gemma-4-E4B.config.json").read_text(encoding="utf-8"))
E4B_ROWS = E4B["text_config"]["vocab_size_per_layer_input"]
E4B_ROW_NBYTES = 2 * E4B["text_config"]["num_hidden_layers"] * E4B["text_config"]["hidden_size_per_layer_input"]

# Of each trace the first half warms the caches and chooses the static rows; the second half is measured.
ORIGINAL_TOKENS = 200_000
ZIPF_TOKENS = 100_000
CAPACITIES = (50, 100, 200, 500, 1000, 2000, 5000, 20_000, 50_000)
STATIC_FREQUENT = "static, most frequent"
RESIDENCIES = (LOWEST_IDS, STATIC_FREQUENT, "lru", "static+lru", "w-lrfu", OPTIMUM)
EVALUATION = "evaluation text"
TRACES = {
    "original 85/15": partial(traces.original, ORIGINAL_TOKENS, E4B_ROWS, 0),
    "Zipf 0.8": partial(traces.zipf, 0.8, ZIPF_TOKENS, E4B_ROWS, 1),
    "Zipf 1.0": partial(traces.zipf, 1.0, ZIPF_TOKENS, E4B_ROWS, 2),
    "Zipf 1.2": partial(traces.zipf, 1.2, ZIPF_TOKENS, E4B_ROWS, 3),
}

# Real token ids, and what was counted on longer texts; rows that one of these needs are tried here.
REAL = {"kjv": "King James Bible, first 200,000 tokens", "python": "Python's library, first 200,000 tokens"}
REAL_IDS = traces.load_texts(FACTS / "traces" / "gemma3-tokens.npz")
TRACES |= {title: partial(REAL_IDS.get, name) for name, title in REAL.items()}
PUBLISHED_TEXTS = json.loads((FACTS / "traces" / "texts.json").read_text(encoding="utf-8"))
TARGETS = {f"{rate:.0%}": rate for rate in (0.90, 0.95, 0.99)}
MANUAL_ROWS = [PUBLISHED_TEXTS["texts"]["a Linux manual, English"][target] for target in TARGETS]
REAL_CAPACITIES = sorted([200, 500, 1000, traces.ORIGINAL_HOT_ROWS, *MANUAL_ROWS])

START_CAPACITIES = sorted([traces.ORIGINAL_HOT_ROWS, *MANUAL_ROWS])
START_TOKENS = 1000
START_PLACES = 10


def pytest_generate_tests(metafunc):
    given = metafunc.config.getoption("ple_trace")
    own = [given.name] if given else []
    if "trace_name" in metafunc.fixturenames:
        metafunc.parametrize("trace_name", [*TRACES, EVALUATION, *own])
    if "real_name" in metafunc.fixturenames:
        metafunc.parametrize("real_name", [*REAL.values(), *own])
    if "guarded" in metafunc.fixturenames:
        pairs = [(str(part), spec) for part, spec in guarded_pairs(run_of(metafunc.config))]
        metafunc.parametrize(("guarded", "spec"), pairs)


def plan(run, counts):
    """For `--plan`: every guarded class and spec is a forward of its own, with its tensors quantized twice."""
    if not run.config.ple_dim:
        yield "skipped: this model has no per-layer embeddings"
    elif counts["test_guard"]:
        pairs = guarded_pairs(run)
        policies = [
            PolicySpec.of(f"{part}={spec}", {part: spec}) for part, spec in pairs if part != TensorClass.PLE_TABLE
        ]
        layers = {None, *range(run.config.num_layers)}
        seconds = plan_forwards(run.config, GUARD_TOKENS, len(pairs) + 1)
        seconds += 2 * plan_quantizing(run.config, policies, layers)
        yield f"divergence of {len(pairs)} pairs of class and spec on {GUARD_TOKENS} tokens: about {seconds:,.0f} s"


@pytest.fixture(autouse=True, scope="module")
def per_layer_embeddings(run):
    if not run.config.ple_dim:
        pytest.skip("this model has no per-layer embeddings")


@pytest.fixture(scope="session")
def trace_of(run):
    """A trace by name, made once, with the rows and the bytes a row of the table that it is of."""
    made = {}

    def make(name):
        if name not in made:
            if name in TRACES:
                made[name] = TRACES[name](), E4B_ROWS, E4B_ROW_NBYTES
            else:
                path = run.text if name == EVALUATION else run.options.ple_trace
                row_nbytes = 2 * run.config.num_layers * run.config.ple_dim
                made[name] = run.token_ids(path), run.config.ple_vocab_size, row_nbytes
        return made[name]

    return make


@pytest.fixture
def real_trace(real_name, trace_of):
    """Ids of the vocabulary of 262,144 that the real texts and the shipped list are of, and the bytes of a row."""
    trace, table_rows, row_nbytes = trace_of(real_name)
    if table_rows != E4B_ROWS:
        pytest.skip(f"real ids are of a vocabulary of {E4B_ROWS:,}, this checkpoint has {table_rows:,}")
    return trace, row_nbytes


def hits(residency, trace, capacities, table_rows):
    """Hits in the second half of a trace at each capacity."""
    warm = len(trace) // 2
    if residency == "lru":
        return simulation.lru(trace, capacities, warm)
    found = []
    frequent = simulation.by_frequency(trace[:warm])
    for capacity in capacities:
        match residency:
            case "static, lowest ids":
                found.append(simulation.static(trace[warm:], np.arange(capacity)))
            case "static, most frequent":
                found.append(simulation.static(trace[warm:], frequent[:capacity]))
            case "optimum":
                found.append(simulation.optimum(trace[warm:], capacity))
            case "static+lru":
                found.append(simulation.static_lru(trace, frequent[: capacity // 2], capacity, warm))
            case _:
                found.append(simulation.hits(Residency.named(residency, table_rows, capacity), trace, warm))
    return found


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_hits(trace_name, residency, trace_of, record, benchmark):
    """Hit rate over capacity; timed is the cache's bookkeeping for 10,000 tokens."""
    trace, table_rows, row_nbytes = trace_of(trace_name)
    measured = trace[len(trace) // 2 :]
    tried = REAL_CAPACITIES if trace_name in REAL.values() else CAPACITIES
    capacities = [rows for rows in tried if table_rows / 1500 <= rows <= table_rows]
    rates = [count / len(measured) for count in hits(residency, trace, capacities, table_rows)]
    if residency == LOWEST_IDS and trace_name == "original 85/15":
        assert abs(rates[capacities.index(traces.ORIGINAL_HOT_ROWS)] - traces.ORIGINAL_HOT_SHARE) < 0.003
    record(
        PLEHitsRecord(
            trace=trace_name,
            residency=residency,
            hit_rate=dict(zip(capacities, rates, strict=True)).get(traces.ORIGINAL_HOT_ROWS),
            capacities=tuple(capacities),
            hit_rates=tuple(rates),
            row_nbytes=row_nbytes,
            tokens=len(measured),
            distinct=len(np.unique(measured)),
            # The most that a cache can hit that must see a token before it holds its row.
            met_before=simulation.lru(trace, [table_rows], len(trace) // 2)[0] / len(measured),
            original_rows=traces.ORIGINAL_HOT_ROWS,
        )
    )
    name = residency if residency in NAMES else "static"
    bookkeeping = Residency.named(name, table_rows, capacities[-1])
    benchmark.pedantic(bookkeeping.look_up, (measured[:10_000],), rounds=1)


STARTS = {
    EMPTY_START: ("lru", "w-lrfu"),
    SHIPPED_LIST: ("static", "lru", "w-lrfu"),
    OTHER_TEXT: ("static", "lru", "w-lrfu"),
}


def frequent_at(start, real_name):
    """The list that a start is from, of first halves alone."""
    if start == EMPTY_START:
        return np.arange(0)
    if start == SHIPPED_LIST:
        return frequent_ids()
    others = [ids for name, ids in REAL_IDS.items() if REAL[name] != real_name]
    return simulation.by_frequency(others[0][: len(others[0]) // 2])


@pytest.mark.parametrize(("start", "residency"), [(start, name) for start, names in STARTS.items() for name in names])
def test_start(real_name, start, residency, real_trace, record, benchmark):
    """What a list of frequent ids saves in the first tokens of a text; timed is filling a cache's bookkeeping by it."""
    trace, row_nbytes = real_trace
    if start == OTHER_TEXT and real_name not in REAL.values():
        pytest.skip("the other text is that of a trace of this project")
    frequent, measured = frequent_at(start, real_name), trace[len(trace) // 2 :]
    made = partial(Residency.named, residency, E4B_ROWS, initial_ids=frequent)
    tokens = min(START_TOKENS, len(measured))
    places = np.linspace(0, len(measured) - tokens, START_PLACES, dtype=int)
    misses, rates = [], []
    for rows in START_CAPACITIES:
        counted = [tokens - made(rows).look_up(measured[place : place + tokens]).hits for place in places]
        misses.append(float(np.mean(counted)))
        rates.append(made(rows).look_up(measured).hits / len(measured))
    record(
        PLEStartRecord(
            trace=real_name,
            residency=residency,
            start=start,
            hit_rate=rates[START_CAPACITIES.index(traces.ORIGINAL_HOT_ROWS)],
            capacities=tuple(START_CAPACITIES),
            misses=tuple(misses),
            hit_rates=tuple(rates),
            row_nbytes=row_nbytes,
            tokens=tokens,
            places=START_PLACES,
            list_rows=len(frequent),
            original_rows=traces.ORIGINAL_HOT_ROWS,
        )
    )
    benchmark.pedantic(made, (traces.ORIGINAL_HOT_ROWS,), rounds=1)


def test_text(real_name, real_trace, record, benchmark):
    """Which ids a text uses, beside what was counted on others; timed is finding the best static choice."""
    trace, row_nbytes = real_trace
    rows = {target: simulation.fewest_static(trace, rate) for target, rate in TARGETS.items()}
    is_real = real_name in REAL.values()
    record(
        PLETextRecord(
            text=real_name,
            hit_rate=float(np.mean(trace < traces.ORIGINAL_HOT_ROWS)),
            tokens=len(trace),
            rows=rows,
            row_nbytes=row_nbytes,
            original_rows=traces.ORIGINAL_HOT_ROWS,
            source=PUBLISHED_TEXTS["source"] if is_real else None,
            published=PUBLISHED_TEXTS["texts"] if is_real else {},
        )
    )
    benchmark.pedantic(simulation.by_frequency, (trace,), rounds=1)


def test_the_originals_published_hit_rates_are_chance():
    """84.5% of 200 tokens and 86% of 100 lie within what 0.85 gives in 95 of 100 draws."""
    for tokens, rate in ((200, PUBLISHED["hit_rate"]), (100, PUBLISHED["hit_rate_100_tokens"])):
        deviation = math.sqrt(traces.ORIGINAL_HOT_SHARE * (1 - traces.ORIGINAL_HOT_SHARE) / tokens)
        assert abs(rate - traces.ORIGINAL_HOT_SHARE) < 1.96 * deviation


# Tables to look rows up in: name, rows, and rows that are hot. The synthetic ones have E4B's row width.
SMALL, LARGE, OWN = "synthetic", "synthetic, large", "this checkpoint"
ALL_TABLES = [OWN, SMALL, pytest.param(LARGE, marks=pytest.mark.slow)]
SYNTHETIC_ROWS = {SMALL: 2048, LARGE: 65_536}
MAX_HOT_ROWS = 5000
COLD_ROWS = 448
# Less may come out of memory that the process has freed and kept, so that the system sees nothing added.
MIN_MEASURED_NBYTES = 2**25
COLD_BATCH = 64
COLD_THREADS = 8


def write_synthetic(folder, rows):
    """A checkpoint with nothing but a table of E4B's row width; every byte is written, drawn at random."""
    text = E4B["text_config"] | {"vocab_size_per_layer_input": rows}
    (folder / "config.json").write_text(json.dumps(E4B | {"text_config": text}), encoding="utf-8")
    cols = E4B_ROW_NBYTES // 2
    entry = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, rows * E4B_ROW_NBYTES]}
    header = json.dumps({"embed_tokens_per_layer.weight": entry}).encode()
    random = np.random.default_rng(5)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, rows, 1024):
            bits = random.integers(0, 2**16, (min(1024, rows - start), cols), dtype=np.uint16)
            # The exponent's highest bit off keeps every weight below 2, so that a quantizer takes it.
            file.write((bits & 0xBFFF).data)
    return folder


@pytest.fixture(scope="module")
def source_of(run, tmp_path_factory):
    """Where a table is, and how to open it anew; synthetic ones are removed at the end."""
    folders = {}

    def source(table):
        if table == OWN:
            options = run.options
            return partial(Checkpoint.open, run.checkpoint.source, config=options.config, tokenizer=options.tokenizer)
        if table not in folders:
            folders[table] = write_synthetic(tmp_path_factory.mktemp("table"), SYNTHETIC_ROWS[table])
        return partial(Checkpoint.open, folders[table])

    yield source
    for folder in folders.values():
        for file in folder.iterdir():
            file.unlink()


class OriginalLookup:
    """The original's way: the lowest ids hot, found by searching a list, one layer's slice a call."""

    def __init__(self, table, num_layers, dim):
        self.hot_ids = list(range(min(traces.ORIGINAL_HOT_ROWS, len(table))))
        self.hot = table[: len(self.hot_ids)].clone()
        self.table, self.num_layers, self.dim = table, num_layers, dim

    def layer(self, token_id, layer):
        part = slice(layer * self.dim, (layer + 1) * self.dim)
        if token_id in self.hot_ids:
            return self.hot[self.hot_ids.index(token_id), part]
        return self.table[token_id, part]

    def tokens(self, ids):
        return [self.layer(token_id, layer) for token_id in ids for layer in range(self.num_layers)]


def median_s(call, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


ORIGINAL_BATCH = 16
HOT_WAYS = ("cache", "index_select", "the original's")


@pytest.mark.parametrize("table", ALL_TABLES)
@pytest.mark.parametrize(
    ("way", "batch"), [(way, batch) for way in HOT_WAYS[:2] for batch in (1, 256)] + [(HOT_WAYS[2], ORIGINAL_BATCH)]
)
def test_hot(table, way, batch, source_of, record, benchmark):
    """All rows hot: the cache, torch on a dense table, and the original's way."""
    with source_of(table)() as checkpoint:
        found = Table.of(checkpoint)
        hot_rows = min(found.num_rows, MAX_HOT_ROWS)
        dense = checkpoint.rows(found.name, torch.arange(hot_rows))
        ids = torch.randint(0, hot_rows, (batch,), generator=torch.Generator().manual_seed(6))
        with PLERowCache(checkpoint, capacity_rows=hot_rows) as cache:
            cache.rows(torch.arange(hot_rows))
            expected = dense[ids].view(torch.int16)
            assert torch.equal(cache.rows(ids).view(batch, -1).view(torch.int16), expected)
            original = OriginalLookup(dense, found.num_layers, found.dim)
            # The search takes longer for higher ids, so several are looked up, drawn as the original drew its hot ones.
            drawn = torch.randint(0, hot_rows, (ORIGINAL_BATCH,), generator=torch.Generator().manual_seed(6)).tolist()
            assert torch.equal(
                torch.cat(original.tokens(drawn[:1])).view(torch.int16), dense[drawn[0]].view(torch.int16)
            )
            calls = {
                "cache": partial(cache.rows, ids),
                "index_select": partial(dense.index_select, 0, ids),
                "the original's": partial(original.tokens, drawn),
            }
            throughput_to_dense = None
            if way == "cache":
                # Ratios are of times taken in turn, so that a busy machine is busy for both.
                turns = [{name: median_s(calls[name], 20) for name in HOT_WAYS[:2]} for _ in range(9)]
                throughput_to_dense = float(np.median([t["index_select"] / t["cache"] for t in turns]))
            record(
                PLEHotRecord(
                    table=table,
                    way=way,
                    batch=batch,
                    tokens=batch,
                    layers=found.num_layers,
                    throughput_to_dense=throughput_to_dense,
                )
            )
            benchmark.pedantic(calls[way], rounds=10 if way == "the original's" else 50, iterations=5, warmup_rounds=1)


COLD_WAYS = ("positioned", "mapped", "packed int8", "int8, quantized on reading")
COLD_MODES = [("positioned", 1, COLD_THREADS), *((way, batch, 1) for way in COLD_WAYS for batch in (1, COLD_BATCH))]


class ColdPass:
    """Lookups of rows that no cache holds, each once; `times` is of every call, in seconds."""

    def __init__(self, open_checkpoint, way, batch, threads, packed):
        self.open_checkpoint, self.way, self.batch, self.threads, self.packed = (
            open_checkpoint,
            way,
            batch,
            threads,
            packed,
        )
        with open_checkpoint() as checkpoint:
            table = Table.of(checkpoint)
            self.path = packed or table.location.path
            # Every other row, so that no two share a page, and none that opening the file may bring along.
            step = max(2, -(-2 * 4096 // (table.cols * 2)))
            first = min(table.num_rows // 8, 128 * step)
            candidates = np.arange(first, table.num_rows, step)
        ids = np.random.default_rng(7).permutation(candidates)[:COLD_ROWS]
        # Of whole batches; none of a table with too few rows.
        self.batches = [torch.from_numpy(part) for part in ids[: len(ids) // batch * batch].reshape(-1, batch)]
        self.tokens = sum(map(len, self.batches))
        self.times = []

    def evict(self):
        """Drop the file from memory, and open it again: what is mapped cannot be dropped."""
        gc.collect()
        self.is_cold = pages.evict(self.path)
        self.checkpoint = self.open_checkpoint()
        self.cache = PLERowCache(
            self.checkpoint,
            capacity_rows=1,
            reads="mapped" if self.way == "mapped" else "positioned",
            spec=WeightSpec("int8") if "int8" in self.way else BF16,
            packed=self.packed,
        )

    def close(self):
        self.cache.close()
        self.checkpoint.close()

    def __call__(self):
        if self.threads == 1:
            self._look_up(self.batches)
            return
        parts = [self.batches[start :: self.threads] for start in range(self.threads)]
        threads = [threading.Thread(target=self._look_up, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _look_up(self, batches):
        for ids in batches:
            start = time.perf_counter()
            self.cache.rows(ids)
            self.times.append(time.perf_counter() - start)


@pytest.mark.parametrize("table", ALL_TABLES)
@pytest.mark.parametrize(("way", "batch", "threads"), COLD_MODES)
def test_cold(table, way, batch, threads, source_of, packed_of, record, benchmark):
    """Rows that are neither hot nor in the system's page cache; where that cannot be verified, nothing is reported."""
    cold = ColdPass(source_of(table), way, batch, threads, packed_of(table) if way == "packed int8" else None)
    if not cold.batches:
        pytest.skip(f"the table has too few rows to look {batch} up that are not in memory")
    cold.evict()
    fetched, asked = pages.read_nbytes(), cold.cache.stats.bytes_read
    start = time.perf_counter()
    cold()
    seconds = time.perf_counter() - start
    asked = cold.cache.stats.bytes_read - asked
    fetched = None if fetched is None else pages.read_nbytes() - fetched
    cold.close()
    # Opening a small file may bring all of it along; then nothing is fetched, and nothing was cold.
    known = cold.is_cold is True and (fetched is None or fetched >= asked)
    p50, p99 = np.percentile(cold.times, [50, 99])
    record(
        PLEColdRecord(
            table=table,
            way=way,
            batch=batch,
            threads=threads,
            p50_s=float(p50) if known else None,
            p99_s=float(p99) if known else None,
            bytes_read=asked,
            fetched_nbytes=fetched if known else None,
            tokens=cold.tokens,
            calls=len(cold.times),
            pass_s=seconds if known else None,
        )
    )
    benchmark.pedantic(cold, setup=cold.evict, teardown=lambda *_: cold.close(), rounds=1)


@pytest.fixture(scope="module")
def packed_of(source_of, tmp_path_factory):
    """A table's packed file; only rows that can be packed in moments, so no more than the small tables' are."""
    made = {}

    def packed(table):
        if table not in made:
            with source_of(table)() as checkpoint:
                if checkpoint.nbytes(Table.of(checkpoint).name) > 2**30 and table != LARGE:
                    pytest.skip("packing this table is a run of its own: epic_quant.ple.pack_table")
                folder = tmp_path_factory.mktemp("packed")
                made[table] = pack_table(checkpoint, WeightSpec("int8"), folder / "table.safetensors")
        return made[table]

    yield packed
    for path in made.values():
        path.unlink()


@pytest.mark.parametrize("table", ALL_TABLES)
def test_resident(table, source_of, record, benchmark):
    """Memory that a cache really takes once it is full; timed is a batch of which all rows are read."""
    with source_of(table)() as checkpoint:
        rows = Table.of(checkpoint).num_rows
        capacity = min(rows, 20_000)
        gc.collect()
        before = pages.anonymous_nbytes()
        with PLERowCache(checkpoint, capacity_rows=capacity) as cache:
            for ids in torch.arange(rows).split(COLD_BATCH):
                cache.rows(ids)
            gc.collect()
            added = None if before is None else pages.anonymous_nbytes() - before
            held = cache.stats.resident_nbytes
            assert held == capacity * cache.row_nbytes
            if held < MIN_MEASURED_NBYTES:
                added = None
            if table == LARGE and added is not None:
                assert 0.9 * held <= added <= 1.1 * held + COLD_BATCH * cache.row_nbytes
            record(PLEMemoryRecord(table=table, nbytes=held, anonymous_nbytes=added))
            benchmark.pedantic(cache.rows, (torch.arange(COLD_BATCH),), rounds=3)


GUARDED = (TensorClass.PLE_TABLE, TensorClass.PLE_PROJECTIONS)
GUARD_SPECS = ("int8", "int8-g32", "int4", "int4-g32", "int3-g32", "absmax4", "ternary-g32")
GUARD_TOKENS = 256


def guarded_pairs(run):
    """Every guarded class with each spec of the ladder and of all policies, where it fits and needs no Hessians."""
    policies = [*NAMED.values(), *(policy for policy in run.policies.values() if policy.file is None)]
    asked = [(part, policy.class_spec(part)) for policy in policies for part in GUARDED]
    pairs = dict.fromkeys([*((part, WeightSpec.parse(spec)) for part in GUARDED for spec in GUARD_SPECS), *asked])
    return [
        (part, str(spec))
        for part, spec in pairs
        if spec != BF16
        and not spec.needs_hessian
        and all(spec.fits(tensor.shape[1]) for tensor in run.tensors_of(part))
    ]


@pytest.fixture(scope="session")
def divergences(run):
    """KL divergence of every guarded class and spec: all variants go through a layer before the next is read."""
    plain = PolicyWeights(run.checkpoint, PolicySpec.parse("bf16"))
    weights = {None: plain} | {
        (part, spec): PolicyWeights(run.checkpoint, PolicySpec.of(f"{part}={spec}", {part: spec}))
        for part, spec in guarded_pairs(run)
    }
    window = run.windows(1, GUARD_TOKENS)
    with torch.inference_mode():
        states = {pair: begin(variant, window) for pair, variant in weights.items()}
        for spec in run.config.layers:
            unchanged = plain.layer(spec.index)
            for pair, (hidden, forward) in states.items():
                changes = pair is not None and pair[0] is TensorClass.PLE_PROJECTIONS
                layer = weights[pair].layer(spec.index) if changes else unchanged
                states[pair] = forward.layer(hidden, layer, spec), forward
        reference = head(plain, states[None][0])
        return {
            pair: float(kl_divergence(reference, head(plain, hidden)).mean())
            for pair, (hidden, _) in states.items()
            if pair is not None
        }


def test_guard(guarded, spec, run, divergences, record, benchmark):
    """What fewer bits do to the table or the projections, and that alone to the output; timed is the quantizing."""
    weight_spec = WeightSpec.parse(spec)
    error = norm = nbytes = weights = 0
    for tensor in run.tensors_of(TensorClass(guarded)):
        weight = run.sample(tensor)
        quantized = quantize(weight, weight_spec)
        error += squared_norm(quantized.dequantize() - weight.float())
        norm, nbytes, weights = norm + squared_norm(weight), nbytes + quantized.nbytes, weights + weight.numel()
    rel_l2, divergence = math.sqrt(error / norm), divergences[TensorClass(guarded), spec]
    assert all(map(math.isfinite, (rel_l2, divergence)))
    record(
        PLEGuardRecord(
            tensor_class=guarded,
            spec=weight_spec,
            rel_l2=rel_l2,
            bits_per_weight=8 * nbytes / weights,
            kl_divergence=divergence,
            tokens=GUARD_TOKENS,
        )
    )
    benchmark.pedantic(quantize, (weight[:256], weight_spec), rounds=1)
