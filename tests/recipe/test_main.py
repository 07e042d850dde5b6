import subprocess
import sys

import pytest

from epic_quant.recipe.__main__ import main
from epic_quant.records import JSON_KEY, Record

from .conftest import entry


def test_the_policy_string_comes_first_then_what_it_does(data, write, capsys):
    assert main([str(write(data)), "--budget", "60kB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    policy = "full_attention=int8-g128,mlp=ternary-g128,ple_table=int8-g128,kv=bf16,ple=lru:5000"
    assert lines == [
        policy,
        "",
        "predicted divergence: 0.3011 nats a token, the sum of what each class does alone",
        "resident: 56,875 bytes, all weights, PLE rows, norms and KV cache",
        "weights: 62,750 bytes, 4.482 bits a weight",
        "measured divergence: none in this JSON; to measure it: pytest "
        f"benchmarks/test_quality.py --checkpoint 'some model' --policy {policy} --benchmark-json recipe.json",
    ]


def test_what_was_measured_stands_beside_what_was_predicted(data, write, capsys):
    path = write(data)
    main([str(path), "--bits", "4.125"])
    policy = capsys.readouterr().out.splitlines()[0]
    parts = policy.split(",")
    # The same in another order, under a name, and with other rows in RAM.
    data[JSON_KEY]["policy_strings"]["mine"] = ",".join([*reversed(parts[:-1]), "ple=all"])
    metrics = {"kl_divergence": 0.048, "kl_se": 0.002}
    data["benchmarks"].append(entry(Record("quality", {"policy": "mine"}, metrics)))
    assert main([str(write(data)), "--bits", "4.125"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "measured divergence:  0.048 ± 0.002 nats a token, on the evaluation text, 1.5 times the predicted"
    )


def test_llama_cpp_arguments_can_be_pasted(data, write, capsys):
    assert main([str(write(data)), "--bits", "4.125", "--format", "llama.cpp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        r"--tensor-type '^blk\.(0|2)\.attn_(q|k|v|output)\.weight$=bf16'",
        r"--tensor-type '^blk\.(1)\.attn_(q|k|v|output)\.weight$=q4_K'",
        r"--tensor-type '^blk\.\d+\.ffn_(gate|up|down)\.weight$=q4_K'",
        r"--tensor-type '^blk\.\d+\.(inp_gate|proj)\.weight$=bf16'",
        r"--tensor-type '^per_layer_token_embd\.weight$=q4_K'",
        r"--tensor-type '^token_embd\.weight$=bf16'",
    ]
    assert lines[6] == ""
    assert lines[7].startswith("# 4.5 bits a weight with these types, 4.125 with the recipe's own")
    assert all(line.startswith("#") for line in lines[7:])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("3.5GB", 3_500_000_000), ("800 MiB", 800 * 2**20), ("41000", 41_000), ("1kb", 1000), (".5KiB", 512), ("7B", 7)],
)
def test_budgets_are_read_with_their_unit(text, nbytes, data, write, capsys):
    # Only what is too small is repeated, so the smaller ones show what was read.
    status = main([str(write(data)), "--budget", text])
    error = capsys.readouterr().err
    assert (f"a budget of {nbytes:,} bytes is too small" in error) == (status == 2) == (nbytes < 39_000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "much"], "'much' is no number of bytes"),
        (["--budget", "3.5XB"], "'3.5XB' is no number of bytes"),
        (["--budget", "-1GB"], "expected one argument"),
        (["--budget", "nan"], "'nan' is no number of bytes"),
        (["--bits", "many"], "'many' is no number of bits"),
        (["--bits", "inf"], "'inf' is no number of bits"),
        ([], "one of the arguments --budget --bits is required"),
        (["--budget", "1GB", "--bits", "4"], "not allowed with"),
        (["--bits", "4", "--format", "gguf"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_status_2(arguments, said, data, write, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(write(data)), *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def without_sensitivities(data):
    del data["benchmarks"][1:]


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (lambda data: data.pop(JSON_KEY), ["--bits", "4"], "holds no records of epic_quant"),
        (lambda data: data.pop("benchmarks"), ["--bits", "4"], "not a JSON file of pytest-benchmark"),
        (without_sensitivities, ["--bits", "4"], "pytest benchmarks/test_quality.py --benchmark-json out.json"),
        (without_sensitivities, ["--budget", "1GB"], "pytest benchmarks/test_quality.py --benchmark-json out.json"),
        (lambda data: None, ["--budget", "1kB"], "the least that these specs need is"),
        (lambda data: None, ["--bits", "1"], "the least that these specs need is 1.75"),
        (lambda data: None, ["--bits", "4", "--keep", "kv"], "no sensitivities of 'kv' to leave out"),
        (lambda data: None, ["--bits", "4", "--by", "layer"], "no sensitivities by layer; make them with: pytest"),
        (lambda data: data[JSON_KEY].update(layer_types="x"), ["--bits", "4"], "layer_types must be a list of names"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(change, arguments, said, data, write, capsys):
    change(data)
    assert main([str(write(data)), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_help_has_an_example_and_waits_for_neither_torch_nor_scipy():
    program = (
        "import sys; from epic_quant.recipe.__main__ import _parser; print(_parser().format_help()); "
        "print([name for name in ('torch', 'scipy', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "python -m epic_quant.recipe out.json --budget 3.5GB\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
