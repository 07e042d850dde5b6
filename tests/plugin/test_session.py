"""The options of a session and what it prints, with pytest run as a user runs it."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from epic_quant.checkpoint import Checkpoint
from epic_quant.records import JSON_KEY, SCHEMA_VERSION, Record
from epic_quant.results.reading import read_run

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_json_names_what_was_run(finished, model):
    facts = finished.json[JSON_KEY]
    with Checkpoint.open(model) as checkpoint:
        assert facts["checkpoint"]["fingerprint"] == checkpoint.fingerprint
    assert facts["schema_version"] == SCHEMA_VERSION
    assert facts["checkpoint"]["kind"] == "user"
    assert facts["policies"] == ["bf16", "original-4", "mlp=ternary,kv=fp32,ple=lru:7"]
    assert facts["policy_strings"]["original-4"].startswith("sliding_attention=absmax4,")
    assert facts["read_bandwidth_gbs"] > 0
    assert facts["versions"]["torch"]


def test_the_command_line_in_the_json_names_no_folder_of_the_machine(finished, model):
    arguments = finished.json[JSON_KEY]["arguments"]
    assert "--checkpoint toy" in arguments
    assert str(model.parent) not in json.dumps(finished.json)


def test_every_entry_has_a_record_and_no_raw_timings(finished):
    entries = finished.json["benchmarks"]
    records = [Record.from_json(entry["extra_info"][JSON_KEY]) for entry in entries]
    assert {record.subject for record in records} == {"footprint", "weights", "block"}
    assert all("data" not in entry["stats"] and entry["stats"]["median"] > 0 for entry in entries)


def test_kv_policies_are_measured_on_any_checkpoint(model, tmp_path, run_pytest):
    """At the context lengths that fit; the reference is there unasked."""
    out = tmp_path / "out.json"
    options = ["--text", model / "text.txt", "--kv-policy", "k=int4-b8/v=int4", "--kv-context", "300"]
    selected = ["-k", "not near and not searched"]
    status, printed = run_pytest(
        "benchmarks/test_kv.py", "--checkpoint", model, *options, *selected, "--benchmark-json", out
    )
    assert status == 0, printed
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data[JSON_KEY]["kv_tokens"] == 300
    records = [Record.from_json(entry["extra_info"][JSON_KEY]) for entry in data["benchmarks"]]
    found = {(r.labels["kv_policy"], r.labels["context"]) for r in records if r.subject == "kv_divergence"}
    assert found == {(policy, context) for policy in ("bf16", "k=int4-b8/v=int4") for context in ("128", "256")}
    bits = {r.labels["kv_policy"]: r.metrics["bits_per_value"] for r in records if r.subject == "kv"}
    assert bits["bf16"] == 16
    assert 4 < bits["k=int4-b8/v=int4"] < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "original-2"], "unknown policy 'original-2'; did you mean original-"),
        (["--policy", "mpl=int4"], "unknown tensor class 'mpl'"),
        (["--policy=@none.policy"], "none.policy: no such file; expected one that holds a policy"),
        (["--policy", "mlp=int4-g100"], "int4-g100: a group of 100 does not divide rows of"),
        (["--kv-policy", "int4-g48"], "int4-g48 does not fit the 128 dims of layer 5's heads: "),
        (["--price", "int4-g7"], "--price int4-g7: its group or block divides the rows of no tensor class"),
        (["--kv-policy", "orginal"], "unknown KV spec 'orginal'; did you mean original"),
        (["--checkpoint", "none/at/all"], "none/at/all: no such file or folder"),
        (["--checkpoint", "benchmarks/facts"], "no weights in this folder"),
    ],
)
def test_bad_input_is_one_line_status_2_and_no_json(options, message, tmp_path, run_pytest):
    out = tmp_path / "out.json"
    status, printed = run_pytest("benchmarks/test_footprint.py", *options, "--benchmark-json", out)
    assert status == 2
    assert sum(message in line for line in printed.splitlines()) == 1
    assert "Traceback" not in printed
    assert list(out.parent.iterdir()) == []


@pytest.fixture
def policy_files(tmp_path):
    """Files of one name in three folders; the last says the same as the first, in two lines."""
    files = []
    for folder, text in (("one", "mlp=int4"), ("two", "mlp=int8"), ("three", "mlp=int4,\nkv=bf16\n")):
        files.append(tmp_path / folder / "small.policy")
        files[-1].parent.mkdir()
        files[-1].write_text(text, encoding="utf-8")
    return files


def test_policy_files_name_their_policies_and_those_of_one_name_must_say_the_same(
    model, policy_files, tmp_path, run_pytest
):
    """A result goes by its policy's name, so one of two would be lost."""
    out = tmp_path / "out.json"

    def run(*files):
        policies = [f"--policy=@{file}" for file in files]
        return run_pytest("benchmarks/test_footprint.py", "--checkpoint", model, *policies, "--benchmark-json", out)

    one, two, three = policy_files
    status, printed = run(one, two)
    assert status == 2
    said = "--policy: two different policies are called small; rename one of the files"
    assert sum(said in line for line in printed.splitlines()) == 1
    assert "Traceback" not in printed
    assert not out.exists()
    status, printed = run(one, three)
    assert status == 0, printed
    facts = json.loads(out.read_text(encoding="utf-8"))[JSON_KEY]
    assert facts["policies"] == ["bf16", "small"]
    assert facts["policy_strings"]["small"].startswith("mlp=int4,")
    assert "--policy=@small.policy" in facts["arguments"]
    assert str(tmp_path) not in facts["arguments"]


@pytest.mark.parametrize("which", [0, 2], ids=["one line", "two lines"])
def test_a_policy_file_after_a_space_is_refused_with_what_to_write(which, model, policy_files, tmp_path, run_pytest):
    """Its lines would stand in its place, since pytest reads them as arguments, and the policy would lose its name."""
    out, file = tmp_path / "out.json", policy_files[which]
    options = ["--checkpoint", model, "--policy", f"@{file}", "--benchmark-json", out]
    status, printed = run_pytest("benchmarks/test_footprint.py", *options)
    assert status == 2
    assert sum(f"; write --policy=@{file}" in line for line in printed.splitlines()) == 1
    assert "Traceback" not in printed
    assert not out.exists()


def test_a_plan_measures_nothing(model, tmp_path, run_pytest):
    out = tmp_path / "out.json"
    options = ["--checkpoint", model, "--policy", "original-4", "--plan", "--benchmark-json", out]
    files = ["benchmarks/test_footprint.py", "benchmarks/test_weights.py", "-k", "footprint or test_weights["]
    status, printed = run_pytest(*files, *options)
    assert status == 0
    assert "16 measurements would be made" in printed
    assert "footprint: 8, 4 of as_published, 4 of resident" in printed
    assert "weights: 8, 8 of weights" in printed
    assert "absmax4: " in printed
    assert "RAM beyond the mapped file" in printed
    assert list(out.parent.iterdir()) == []


def test_json_that_could_not_be_written_is_reported_at_once(tmp_path, run_pytest):
    out = tmp_path / "out.json"
    status, printed = run_pytest("benchmarks/test_footprint.py", "--benchmark-disable", "--benchmark-json", out)
    assert status == 4
    assert "no --benchmark-json can be written: nothing is timed, since --benchmark-disable was given" in printed
    assert list(out.parent.iterdir()) == []


def test_an_option_that_is_no_number_is_refused(model, run_pytest):
    status, printed = run_pytest("benchmarks/test_footprint.py", "--checkpoint", model, "--context", "0")
    assert status == 4
    assert "--context" in printed


@pytest.mark.parametrize(
    ("isa", "status", "message"),
    [("reference", 0, "kernels: reference of "), ("avx1024", 2, "EPIC_QUANT_ISA is 'avx1024', but this machine has: ")],
)
def test_the_header_says_what_computes_and_refuses_what_is_not_there(isa, status, message, monkeypatch, run_pytest):
    monkeypatch.setenv("EPIC_QUANT_ISA", isa)
    ended, printed = run_pytest("--collect-only", "tests/test_errors.py")
    assert ended == status
    # Without a native module the line says why instead.
    assert message in printed or "kernels: torch reference" in printed


@pytest.mark.parametrize("option", ["--checkpoint", "--policy"])
def test_an_option_that_is_given_empty_is_refused_by_its_name(option, run_pytest):
    status, printed = run_pytest("benchmarks/test_footprint.py", option, "", "--collect-only")
    assert status == 4
    assert f"{option}: is empty; is a variable of the shell not set?" in printed


def test_a_run_inside_the_folder_of_the_benchmarks_is_one(model, run_pytest):
    where = REPOSITORY / "benchmarks"
    status, printed = run_pytest("test_footprint.py", "--checkpoint", model, "--policy", "original-4", cwd=where)
    assert status == 0, printed
    assert "policies: bf16, original-4" in printed
    status, printed = run_pytest("test_footprint.py", "--checkpoint", "none/at/all", cwd=where)
    assert status == 2
    assert "Traceback" not in printed


def test_the_package_may_be_installed_apart_from_the_repository(tmp_path):
    """As `pip install .` does: the default checkpoint and texts are the repository's."""
    shutil.copytree(REPOSITORY / "epic_quant", tmp_path / "epic_quant", ignore=shutil.ignore_patterns("__pycache__"))
    paths = [path for path in sys.path if path and Path(path).resolve() != REPOSITORY]
    program = (
        f"import sys; sys.path[:] = {[str(tmp_path), *paths]}\n"
        "import epic_quant, pytest\n"
        "print(epic_quant.__file__)\n"
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', 'benchmarks/test_ple.py', '-k', 'guard', '--plan']))"
    )
    # Without what an editable install has put among the site packages.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "checkpoint: the small trained model of this repository" in done.stdout
    assert re.search(r"^ple: \d+, \d+ of guard", done.stdout, re.M)


WARNS = """
import warnings
def pytest_load_initial_conftests(): warnings.warn("at the start")
def pytest_collection_finish(): warnings.warn("after collecting")
def pytest_runtest_logstart(): warnings.warn("at a test")
def pytest_sessionfinish(): warnings.warn("at the end")
"""


def test_what_another_plugin_warns_of_ends_no_run(model, run_pytest, tmp_path, monkeypatch):
    (tmp_path / "it_warns.py").write_text(WARNS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--checkpoint", model, "--policy", "original-4", "-p", "it_warns"]
    status, printed = run_pytest("benchmarks/test_footprint.py", *options)
    assert status == 0, printed
    assert "INTERNALERROR" not in printed


def test_a_folder_that_takes_no_cache_of_pytest_ends_no_run(model, run_pytest, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    options = ["--policy", "original-4", "-p", "cacheprovider", "-o", f"cache_dir={tmp_path / 'file'}"]
    status, printed = run_pytest("benchmarks/test_footprint.py", "--checkpoint", model, *options)
    assert status == 0, printed
    assert "INTERNALERROR" not in printed


FULL = """
import errno, os
from pytest_benchmark.session import BenchmarkSession
def save_json(self, output_json):
    self.json.write_bytes(b"{")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BenchmarkSession.save_json = save_json
"""


def test_a_full_disk_is_one_line_and_the_partial_file_stays(model, run_pytest, tmp_path, monkeypatch):
    (tmp_path / "full_disk.py").write_text(FULL, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "out"
    folder.mkdir()
    options = ["--policy", "original-4", "-p", "full_disk", "--benchmark-json", folder / "out.json"]
    status, printed = run_pytest("benchmarks/test_footprint.py", "--checkpoint", model, *options)
    assert status == 2, printed
    assert "INTERNALERROR" not in printed
    assert f"out.json: cannot be written: No space left on device; what was measured is in {folder}" in printed
    assert [path.name for path in folder.iterdir()] == ["out.partial.jsonl"]
    assert len(read_run(folder / "out.partial.jsonl").records) == 8


@pytest.fixture
def with_nan(model, tmp_path):
    """The checkpoint with a NaN in one weight."""
    folder = shutil.copytree(model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_nan_ends_the_run_before_anything_is_measured(with_nan, tmp_path, run_pytest):
    out = tmp_path / "out.json"
    options = ["--checkpoint", with_nan, "--text", with_nan / "text.txt", "--benchmark-json", out]
    files = ["benchmarks/test_footprint.py", "benchmarks/test_weights.py"]
    status, printed = run_pytest(*files, *options)
    assert status == 2
    assert printed.count("nan: model.layers.1.mlp.up_proj.weight has NaN in row 3") == 1
    assert "Traceback" not in printed
    assert not out.exists()
    # What reads no weights is measured, and so is anything where nobody wants to wait for the check.
    assert run_pytest(files[0], *options, "--policy", "original-4")[0] == 0
    skipped = ["-k", "test_weights and original-4 and full_attention", "--policy", "original-4", "--no-check"]
    assert run_pytest(files[1], *options, *skipped)[0] == 0


@pytest.fixture
def planned(e4b_sparse_file, run_pytest):
    """`planned(*options)`: the plan of a checkpoint of E4B's size under few policies and short texts."""
    few = ["--policy", "original-4", "--kv-policy", "int4", "--kv-context", "256", "--window-tokens", "256"]

    def plan(*options):
        status, printed = run_pytest("benchmarks", "--plan", "--checkpoint", e4b_sparse_file.parent, *few, *options)
        assert status == 0, printed
        return printed

    return plan


def test_over_1_gb_the_plan_has_all_that_would_run(planned):
    """By what is collected: the words of `-k` switch nothing on."""
    printed = planned("-k", "not sensitivity")
    for line in (
        r"block: 18, 12 of block, 6 of block_fp32",
        r"  about [\d,]+ s, \d+ s of it quantizing",
        r"footprint: 8, 4 of as_published, 4 of resident",
        r"kernels: \d+, .*",
        r"kv: \d+, 4 of kv, 4 of divergence, 16 of bytes, .*",
        r"  a forward of 256 tokens: about [\d,]+ s",
        r"  errors: about [\d,]+ s",
        r"  divergence of 4 pairs of policy and context: about [\d,]+ s",
        r"ple: \d+, .* of guard",
        r"  divergence of \d+ pairs of class and spec on 256 tokens: about [\d,]+ s",
        r"quality: \d+, 2 of quality, .*",
        r"quality, 3 policies with the reference on 1 windows of 256 tokens: .* about [\d,]+ s",
        r"weights: \d+, 8 of weights, .*",
        r"check of all weights, one read of 14\.93 GB: about [\d,]+ s .*",
    ):
        assert len(re.findall(f"^{line}$", printed, re.M)) == 1, line
    assert "sensitivity" not in printed
    assert not re.search("^prices", printed, re.M)


def test_over_1_gb_what_is_asked_for_is_planned_where_it_is_collected(e4b_sparse_file, planned, tmp_path):
    words = {"<bos>": 2} | {str(number): number for number in range(262_144) if number != 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("7 " * 300, encoding="utf-8")
    files = ["--tokenizer", tmp_path / "tokenizer.json", "--calibration-text", tmp_path / "text.txt"]
    printed = planned("--prices", "--price", "int8", "-k", "quality and not sensitivity", *files)
    assert not re.search(r"^sensitivity, ", printed, re.M)
    assert re.search(r"^recipes are made from the prices", printed, re.M)
    assert re.search(r"^prices, 2 specs on 1 windows of \d+ tokens: .* about [\d,]+ s", printed, re.M)


def test_the_plan_skips_the_check_too(model, run_pytest):
    options = ["--checkpoint", model, "--policy", "original-4", "--plan", "--no-check"]
    status, printed = run_pytest("benchmarks/test_block.py", *options)
    assert status == 0
    assert "check of all weights" not in printed


@pytest.mark.parametrize("name", ["no_ple", "one_layer", "all_full"])
def test_a_model_that_lacks_a_part_is_measured_in_all_others(name, toy, model, tmp_path, run_pytest):
    folder = shutil.copytree(toy(name), tmp_path / name)
    shutil.copyfile(model / "tokenizer.json", folder / "tokenizer.json")
    out = tmp_path / "out.json"
    files = [f"benchmarks/test_{subject}.py" for subject in ("block", "footprint", "kv", "ple")]
    selected = ["-k", "(block and original-4 and 1) or (this and original-4) or test_kv or guard"]
    options = ["--policy", "original-4", "--kv-policy", "int4", "--kv-context", "128", "--text", model / "text.txt"]
    status, printed = run_pytest(*files, "--checkpoint", folder, *options, *selected, "--benchmark-json", out, "-rs")
    assert status == 0, printed
    entries = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    found = {Record.from_json(entry["extra_info"][JSON_KEY]).subject for entry in entries}
    assert {"block", "footprint", "kv"} <= found
    assert ("ple_guard" in found) == (name != "no_ple")
    assert ("this model has no per-layer embeddings" in printed) == (name == "no_ple")
