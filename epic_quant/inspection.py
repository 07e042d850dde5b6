"""`python -m epic_quant.inspection SOURCE`: what is in this checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from epic_quant import command_line
from epic_quant.spec.layers import format_layers

if TYPE_CHECKING:
    from epic_quant.checkpoint import Checkpoint
    from epic_quant.gemma4.config import TextConfig
    from epic_quant.gemma4.tensors import TextTensor


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_line.parser(
        "inspection",
        "Print what a Gemma 4 checkpoint holds.",
        [
            "python -m epic_quant.inspection benchmarks/mini_gemma4",
            "python -m epic_quant.inspection model.safetensors --config config.json --tensors",
            "python -m epic_quant.inspection google/gemma-4-E4B --values",
        ],
        "0; 1 where --values finds NaN, infinity or overflow in a text tensor; 2 where the checkpoint cannot be read.",
    )
    command_line.add_checkpoint(parser, "config")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--values", action="store_true", help="read all text tensors: NaN, infinity, zeros, outliers, dtypes"
    )
    parser.add_argument("--download", action="store_true", help="download a hub id that is not in the local cache")
    options = parser.parse_args(arguments)

    # `--help` does not wait for torch.
    from epic_quant.checkpoint import Checkpoint

    with Checkpoint.open(options.source, config=options.config, download=options.download) as checkpoint:
        print("\n".join(describe(checkpoint, list_tensors=options.tensors)))
        return _print_values(checkpoint) if options.values else 0


def _print_values(checkpoint: Checkpoint) -> int:
    """What is remarkable of the text tensors' values; returns the exit status, 1 where a run would refuse them."""
    from epic_quant.gemma4.config import TextConfig
    from epic_quant.gemma4.tensors import expected_tensors, text_tensors
    from epic_quant.values import findings, read_values

    config = TextConfig.read(checkpoint)
    names = text_tensors(checkpoint, config)
    unused = {names[tensor.name] for tensor in expected_tensors(config) if tensor.unused and tensor.name in names}
    values = [read_values(name, checkpoint.tensor(name)) for name in names.values()]
    if rows := findings(checkpoint, values):
        said = [(name, f"{found} (unused)" if name in unused else found) for name, found in rows]
        print("", tabulate(said, headers=["tensor", "found"], disable_numparse=True), sep="\n")
    faults = [one for one in values if one.fault is not None and one.name not in unused]
    verdict = "no run can measure them" if faults else "a run can measure them"
    peak = max(values, key=lambda one: one.peak)
    print(
        "",
        f"values of {len(values)} text tensors read: {len(faults)} with NaN, infinity or overflow, so {verdict}; the "
        f"largest outlier is {peak.peak:,.1f} times the rms, in {peak.name}",
        sep="\n",
    )
    return 1 if faults else 0


def describe(checkpoint: Checkpoint, *, list_tensors: bool = False) -> Iterator[str]:
    """The lines of the page. Raises CheckpointError or ConfigError where config and file do not fit."""
    from epic_quant.gemma4.config import TextConfig
    from epic_quant.gemma4.tensors import expected_tensors, text_tensors

    config = TextConfig.read(checkpoint)
    expected = {tensor.name: tensor for tensor in expected_tensors(config)}
    tensors = {file_name: expected[name] for name, file_name in text_tensors(checkpoint, config).items()}
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names)

    yield f"{checkpoint.source}"
    yield f"{len(checkpoint.names)} tensors, {total:,} bytes, fingerprint {checkpoint.fingerprint}"
    yield ""
    yield _parts_table(checkpoint, tensors, total)
    yield ""
    yield from _layers(config)
    if list_tensors:
        yield ""
        rows = [
            [name, _part(name, tensors.get(name)), "x".join(map(str, checkpoint.shape(name))), checkpoint.nbytes(name)]
            for name in checkpoint.names
        ]
        yield tabulate(rows, headers=["tensor", "class", "shape", "bytes"], intfmt=",")


def _part(file_name: str, tensor: TextTensor | None) -> str:
    """The line of the table that a tensor is counted in."""
    from epic_quant.gemma4.tensors import is_head

    if tensor is None:
        return "head, the embedding again" if is_head(file_name) else "not text"
    if tensor.unused:
        return "unused"
    return "norms and scalars" if tensor.tensor_class is None else tensor.tensor_class.value


def _parts_table(checkpoint: Checkpoint, tensors: dict[str, TextTensor], total: int) -> str:
    from epic_quant.checkpoint import dtype_name

    members: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names:
        members[_part(name, tensors.get(name))].append(name)
    rows = []
    for part, names in sorted(members.items(), key=lambda item: -sum(map(checkpoint.nbytes, item[1]))):
        nbytes = sum(map(checkpoint.nbytes, names))
        dtypes = sorted({dtype_name(checkpoint.dtype(name)) for name in names})
        rows.append([part, len(names), nbytes, f"{nbytes / total:.1%}", " ".join(dtypes)])
    headers = ["part", "tensors", "bytes", "share", "dtype"]
    return tabulate(rows, headers=headers, intfmt=",", colalign=("left", "right", "right", "right", "left"))


def _layers(config: TextConfig) -> Iterator[str]:
    """Layer types, KV source layers, and the layers that share their K and V."""
    for layer_type in sorted({layer.layer_type for layer in config.layers}, reverse=True):
        layers = [layer for layer in config.layers if layer.layer_type == layer_type]
        attention = layers[0].attention
        window = "" if attention.sliding_window is None else f", window {attention.sliding_window}"
        kv_sources = [layer.index for layer in layers if layer.is_kv_source]
        sharers = [layer.index for layer in layers if not layer.is_kv_source]
        yield (
            f"{layer_type}: {len(layers)} layers, {attention.num_heads} query and {attention.num_kv_heads} KV heads "
            f"of {attention.head_dim}{window}"
        )
        yield f"  layers {_ranges([layer.index for layer in layers])}"
        yield f"  KV source layers {_ranges(kv_sources)}"
        if sharers:
            sources = sorted({layer.kv_source for layer in layers if not layer.is_kv_source})
            yield f"  layers {_ranges(sharers)} share the K and V of layer {_ranges(sources)}"


def _ranges(layers: list[int]) -> str:
    """Layers as `0-4, 6, 8-9`."""
    return format_layers(layers).replace("+", ", ")


if __name__ == "__main__":
    command_line.leave(main)
