import re
from pathlib import Path

from epic_quant.results.gate import Condition, check_baseline

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


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
