"""Train the small Gemma 4 model that stands beside this script.

    python benchmarks/mini_gemma4/train.py --out benchmarks/mini_gemma4

The text is CPython's standard library as the running interpreter ships it: `Lib/` without test suites, docstrings of
modules written in C, and the packages that `ensurepip` carries there. Two sets of modules are held out of training: a
piece of one becomes `eval.txt`, a piece of the other `calibration.txt`. The tokenizer is trained on the training text
alone. Everything is seeded; the result differs between machines only by the rounding of their matrix products.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import sys
import sysconfig
import time
import zipfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AttentionInterface, Gemma4ForCausalLM, Gemma4TextConfig

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
VOCAB_SIZE = 2048
BOS_ID, EOS_ID = 2, 1
STEP_TOKENS = 4096

# Whole top-level modules, so that no file of a held-out package is trained on.
EVAL_MODULES = {"argparse", "asyncio", "csv", "heapq", "ipaddress", "json", "shutil", "statistics"}
CALIBRATION_MODULES = {"concurrent", "decimal", "fractions", "http", "_pydecimal", "pathlib", "textwrap", "typing"}
HELD_OUT_NBYTES = 256 * 1024
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DYNLOAD = Path(sysconfig.get_paths()["stdlib"]) / "lib-dynload"
TABLES = {"encodings"}  # A seventh of the text, and nearly all of it tables of characters.


def read_sources() -> tuple[dict[str, str], str, str]:
    """The training files by path, the evaluation piece and the calibration piece, in sorted order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out = {}, {"eval": [], "calibration": []}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT_FOLDERS.intersection(parts) or parts[0].startswith("config-") or parts[0].startswith("_sysconfig"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        module = parts[0].removesuffix(".py")
        if module in EVAL_MODULES:
            held_out["eval"].append(text)
        elif module in CALIBRATION_MODULES:
            held_out["calibration"].append(text)
        else:
            training[path.relative_to(root).as_posix()] = text
    training |= carried_sources(root, [*training.values()], [*held_out["eval"], *held_out["calibration"]])
    return training, _piece(held_out["eval"]), _piece(held_out["calibration"])


def carried_sources(root: Path, known: list[str], held_out: list[str]) -> dict[str, str]:
    """The files of the packages that `ensurepip` carries, pip and setuptools, by path; none where it carries none.

    They hold backports and copies. A file is left out if over a twentieth of its lines stand in a held-out module,
    or over a half in a file that was read before; and so is a table, of which few characters are letters.
    """

    def lines(text: str) -> list[str]:
        return [line for each in text.splitlines() if len(line := each.strip()) > 20]

    kept_back, read = ({line for text in texts for line in lines(text)} for texts in (held_out, known))
    found = {}
    for wheel in sorted((root / "ensurepip" / "_bundled").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
                text = archive.read(name).decode("utf-8").replace("\r\n", "\n")
                of_file = lines(text)
                copied = sum(line in kept_back for line in of_file) > len(of_file) / 20
                repeated = sum(line in read for line in of_file) > len(of_file) / 2
                table = sum(map(str.isalpha, text)) < 0.4 * len("".join(text.split()))
                read.update(of_file)
                if of_file and not (copied or repeated or table):
                    found[f"ensurepip/_bundled/{wheel.name}/{name}"] = text
    return found


def extension_docstrings() -> str:
    """The docstrings of modules written in C, their functions, classes and methods; not those of held-out modules."""
    names = {*sys.builtin_module_names, *(path.name.split(".")[0] for path in _DYNLOAD.glob("*.so"))}
    held_out = EVAL_MODULES | CALIBRATION_MODULES
    found: dict[str, None] = {}  # each text once, in order
    for name in sorted(names):
        if "test" in name or name.lstrip("_") in held_out or name in held_out:
            continue
        module = importlib.import_module(name)
        for member, value in [(name, module), *sorted(vars(module).items())]:
            inside = sorted(vars(value).items()) if inspect.isclass(value) else []
            for title, one in [(member, value), *((f"{member}.{attribute}", one) for attribute, one in inside)]:
                documented = callable(one) or inspect.ismodule(one) or inspect.isdatadescriptor(one)
                if documented and isinstance(text := getattr(one, "__doc__", None), str):
                    found[f'{title}\n"""{inspect.cleandoc(text)}"""\n\n'] = None
    return "".join(found)


def _piece(files: list[str]) -> str:
    """An equal share from the beginning of each file, cut at line ends, so that every module is represented."""
    share = HELD_OUT_NBYTES // len(files)
    piece = ""
    for text in files:
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            size += len(line.encode())
            if size > share:
                break
            lines.append(line)
        piece += "".join(lines)
    return piece


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """BPE in Gemma's manner: spaces as ▁, byte fallback, no splitting but at spaces."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Only learning is split: it keeps merges inside words, runs of blanks and single digits.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[\p{L}_]+|\p{N}|▁+|\n+|▁?[^\p{L}\p{N}▁\n]+"), "isolated")
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 256, special_tokens=SPECIAL_TOKENS, limit_alphabet=128)
    )
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)[len(SPECIAL_TOKENS) :]
    vocab = {word: token_id for token_id, word in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *words])}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS_ID)]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def make_config() -> Gemma4TextConfig:
    """E4B's architecture, small: the 5:1 pattern three times, the last six of 18 layers sharing K and V."""
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=128,
        hidden_size_per_layer_input=32,
        sliding_window=64,
        num_kv_shared_layers=6,
        max_position_embeddings=2048,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        dtype="float32",
    )


def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention over whole windows, q [B, heads, S, D] -> [B, S, heads, D], for `transformers` to call.

    What a sliding layer does not see is not computed: each piece of as many tokens as it sees is attended from
    together, with the piece before it.
    """
    window, tokens = module.sliding_window, q.shape[2]
    if window is None or tokens <= window:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None
    pieces = -(-tokens // window)

    def split(x: Tensor) -> Tensor:  # [B, heads, S, D] -> [B, pieces, heads, window, D]
        x = F.pad(x, (0, 0, 0, pieces * window - tokens))
        return x.unflatten(2, (pieces, window)).transpose(1, 2)

    def with_earlier(x: Tensor) -> Tensor:  # -> [B * pieces, heads, 2 * window, D]
        x = split(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), x], dim=3).flatten(0, 1)

    query, key = torch.arange(window)[:, None], torch.arange(2 * window)
    seen = (key > query) & (key <= query + window)
    seen = torch.stack([seen & (key >= window), *[seen] * (pieces - 1)])  # nothing stands before the first piece
    mixed = F.scaled_dot_product_attention(
        split(q).flatten(0, 1),
        with_earlier(k),
        with_earlier(v),
        attn_mask=seen[:, None].repeat(len(q), 1, 1, 1),
        scale=scaling,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2).reshape(len(q), pieces * window, q.shape[1], -1)[:, :tokens], None


def make_model(seed: int, init: Path | None, dropout: float) -> Gemma4ForCausalLM:
    """A new model, or the one that was saved in the folder `init`; fp32, its layer scalars trainable.

    In training, `dropout` falls on what attention, MLP and PLE add to the stream.
    """
    torch.manual_seed(seed)
    AttentionInterface.register("windows", attention)
    if init is None:
        model = Gemma4ForCausalLM._from_config(make_config(), attn_implementation="windows", dtype=torch.float32)
    else:
        model = Gemma4ForCausalLM.from_pretrained(init, attn_implementation="windows", dtype=torch.float32)
    for layer in model.train().model.layers:
        for added in (
            layer.post_attention_layernorm,
            layer.post_feedforward_layernorm,
            layer.post_per_layer_input_norm,
        ):
            added.register_forward_hook(partial(_drop, dropout))
        # A buffer in `transformers`, which does not train it; E4B's are trained, and far from 1.
        start = torch.full((1,), 0.9) if init is None else layer.layer_scalar.clone()
        del layer.layer_scalar
        layer.layer_scalar = torch.nn.Parameter(start)
    return model


def _drop(probability: float, module: nn.Module, _: object, x: Tensor) -> Tensor:
    """Variational dropout: channels of x [B, S, H], the same for all tokens of a window."""
    return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), probability, module.training)


def windows(stream: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[count, length] token ids, each a BOS and `length` - 1 tokens from a random place of the stream."""
    starts = torch.randint(len(stream) - length + 2, (count, 1), generator=generator)
    pieces = stream[starts + torch.arange(length - 1)]
    return torch.cat([torch.full((count, 1), BOS_ID), pieces], dim=1)


def loss_of(model: Gemma4ForCausalLM, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(model: Gemma4ForCausalLM, tokenizer: Tokenizer, text: str, length: int) -> float:
    """Bits a byte of `text`, read in consecutive windows of `length` tokens, each beginning with BOS."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    pieces = ids.split(length - 1)
    nats = sum(float(loss_of(model, F.pad(piece, (1, 0), value=BOS_ID)[None], "sum")) for piece in pieces)
    return nats / math.log(2) / len(text.encode())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, the peak, and from 65% of the steps on a straight line to nothing."""
    return peak * min(1.0, (step + 1) / 50, (steps - step) / (0.35 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, tokenizer and texts")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of 4096 tokens")
    parser.add_argument("--long-steps", type=int, default=150, help="of these, the last ones on windows of 2048 tokens")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="go on from the weights that an earlier run saved")
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    sources, eval_text, calibration_text = read_sources()
    if arguments.init is None:
        tokenizer = train_tokenizer(list(sources.values()))
    else:  # Training one breaks ties by chance, and the weights know only their own.
        tokenizer = Tokenizer.from_file(str(arguments.init / "tokenizer.json"))
    training = [text for path, text in sources.items() if not TABLES.intersection(path.split("/"))]
    training.append(extension_docstrings())
    nbytes = sum(len(text.encode()) for text in training)
    ids = [token for text in training for token in [*tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID]]
    stream = torch.tensor(ids)
    print(f"{len(training)} files, {nbytes:,} bytes, {len(stream):,} tokens", flush=True)

    model = make_model(arguments.seed, arguments.init, arguments.dropout)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() > 1 and "embed_tokens" not in name]
    tables = [p for name, p in named if p.dim() > 1 and "embed_tokens" in name]
    vectors = [p for _, p in named if p.dim() <= 1]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=arguments.peak_lr, weight_decay=arguments.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": arguments.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=arguments.peak_lr,
            betas=(0.9, 0.95),
        ),
    ]
    generator = torch.Generator().manual_seed(arguments.seed)
    start, smooth = time.monotonic(), None
    for step in range(arguments.steps):
        length = 2048 if step >= arguments.steps - arguments.long_steps else 512
        batch = windows(stream, STEP_TOKENS // length, length, generator)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate(step, arguments.steps, arguments.peak_lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step} loss {smooth:.4f} {time.monotonic() - start:.0f} s", flush=True)

    for layer in model.model.layers:
        trained = layer.layer_scalar.detach()
        del layer.layer_scalar
        layer.layer_scalar = torch.nn.Buffer(trained)
    model = model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(arguments.out)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    special = dict(zip(["pad_token", "eos_token", "bos_token", "unk_token", "mask_token"], SPECIAL_TOKENS, strict=True))
    names = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **special}
    (arguments.out / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "eval.txt").write_text(eval_text, encoding="utf-8", newline="\n")
    (arguments.out / "calibration.txt").write_text(calibration_text, encoding="utf-8", newline="\n")

    fp32 = model.float()
    earlier = json.loads((arguments.init / "training.json").read_text("utf-8")) if arguments.init else {}
    facts = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": arguments.seed,
        "steps": arguments.steps + earlier.get("steps", 0),
        "training_tokens": arguments.steps * STEP_TOKENS + earlier.get("training_tokens", 0),
        "corpus_files": len(training),
        "corpus_nbytes": nbytes,
        "corpus_tokens": len(stream),
        "training_s": round(time.monotonic() - start) + earlier.get("training_s", 0),
        "last_training_loss": round(smooth or 0.0, 4),
        "bits_per_byte_512": round(bits_per_byte(fp32, tokenizer, eval_text, 512), 4),
        "bits_per_byte_2048": round(bits_per_byte(fp32, tokenizer, eval_text, 2048), 4),
    }
    (arguments.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
