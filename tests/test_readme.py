import json
import re
from pathlib import Path

from epic_quant import kv
from epic_quant.gemma4.config import TextConfig
from epic_quant.results.gate import Condition, check_baseline
from epic_quant.spec import KVSpec

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_limit_in_the_readme_is_one():
    blocks = re.findall(r"```(?:sh|yaml)\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "--fail-if" in line]
    assert len(lines) >= 2
    for line in lines:
        conditions = [Condition.parse(text) for text in re.findall(r"--fail-if '([^']+)'", line)]
        assert conditions
        check_baseline(conditions, "--baseline" in line)


def test_every_limit_that_the_readme_explains_is_one():
    text = README.partition("A limit is `METRIC")[2].partition("\n")[0]
    explained = re.findall(r"`([a-z0-9_]+(?:\[[^`]*\])?:[^`]+)`", text)
    assert len(explained) == 3
    for one in explained:
        Condition.parse(one)


def test_the_python_example_in_the_readme_runs(monkeypatch, capsys):
    """As a user would paste it, from the repository's folder; it prints what its comments say."""
    config = TextConfig.from_json(json.loads((ROOT / "benchmarks/mini_gemma4/config.json").read_text(encoding="utf-8")))
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    bits_and_error, logits, decoded, rows = capsys.readouterr().out.splitlines()
    bits, error = map(float, bits_and_error.split())
    assert bits == 4.125
    assert 0.05 < error < 0.2
    assert logits == "torch.Size([1, 3, 2048])"
    shape, nbytes = decoded.rsplit(" ", 1)
    assert shape == "torch.Size([2, 1, 2048])"
    assert int(nbytes) == 2 * kv.nbytes(KVSpec.parse("int4"), config, tokens=4)
    assert rows.startswith("torch.Size([3, 18, 32])")


def test_every_policy_in_the_readme_is_one():
    from epic_quant.spec import PolicySpec

    texts = re.findall(r"--policy[ =]'?([a-z0-9_=@.,:+-]+)'?", README)
    assert len(texts) >= 8
    for text in texts:
        if not text.startswith("@"):
            PolicySpec.parse(text)
