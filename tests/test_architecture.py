"""The package's layers: a module imports only from lower ones."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "epic_quant"

# A module or folder and its layer; inside a folder modules may import each other without a circle.
LAYERS = {
    "errors": 0,
    "files": 0,
    "units": 0,
    "metrics": 1,
    "kernels": 1,
    "spec": 1,
    "records": 2,
    "command_line": 2,
    "machine": 2,
    "results": 3,
    "quant": 2,
    "checkpoint": 2,
    "gemma4": 3,
    "ple": 4,
    "kv": 4,
    "text": 4,
    "published": 4,
    "values": 4,
    "policy": 5,
    "calibration": 7,
    "footprint": 6,
    "quality": 6,
    "prices": 6,
    "recipe": 6,
    "predict": 6,
    "export": 8,
    "plan": 7,
    "report": 7,
    "inspection": 7,
    "plugin": 9,
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path):
    parts = ("epic_quant", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {dotted(module) for module in MODULES}


@cache
def imported(path):
    """Every module that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in KNOWN else node.module for name in submodules)
    return names


def package_of(name):
    return name.split(".")[1] if name.startswith("epic_quant.") else None


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_lower_layers(path):
    own = package_of(dotted(path))
    others = {package_of(name) for name in imported(path)} - {None, own}
    assert {name for name in others if LAYERS[name] >= LAYERS[own]} == set()


def test_no_modules_import_each_other_in_a_circle():
    edges = {dotted(path): {name for name in imported(path) if name.startswith("epic_quant.")} for path in MODULES}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in edges.get(name, ()):
                if target != name:
                    visit(target, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def test_only_the_plugin_imports_pytest():
    users = {
        package_of(dotted(path)) for path in MODULES if any(name.split(".")[0] == "pytest" for name in imported(path))
    }
    assert users == {"plugin"}


def test_the_report_and_the_recipe_stand_on_the_lowest_packages_alone():
    inside = {
        package_of(name)
        for path in MODULES
        if package_of(dotted(path)) in ("report", "recipe", "predict", "results")
        for name in imported(path)
        if name.startswith("epic_quant.") and package_of(name) != package_of(dotted(path))
    }
    assert inside == {"command_line", "errors", "files", "records", "results", "spec", "units"}


def test_every_package_has_a_layer():
    assert {package_of(dotted(path)) for path in MODULES} <= set(LAYERS)


SPLITTING = {"split", "rsplit", "partition", "rpartition", "removesuffix", "removeprefix", "startswith", "endswith"}
SPEC_WORDS = {"policy", "spec", "specs", "kv_policy", "scheme"}


def texts_taken_apart(tree):
    """Calls such as `spec.partition("=")`, `re.match(pattern, policy)` and tests such as `"=" in policy`."""

    def names_a_spec(node):
        word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        return word in SPEC_WORDS

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            on_text = node.func.attr in SPLITTING and names_a_spec(node.func.value)
            by_pattern = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
            if on_text or (by_pattern and any(map(names_a_spec, node.args))):
                yield node.lineno
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            is_search = isinstance(node.ops[0], ast.In | ast.NotIn) and names_a_spec(node.comparators[0])
            yield from [node.lineno] * is_search


@pytest.mark.parametrize("path", [path for path in MODULES if "spec" not in path.parts], ids=dotted)
def test_no_module_but_those_of_spec_takes_a_spec_text_apart(path):
    assert list(texts_taken_apart(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source", ["spec.partition('=')", "re.sub('-g', '', spec)", "'ternary' in spec", "run.policy.split(',')"]
)
def test_taking_a_text_apart_is_noticed(source):
    assert list(texts_taken_apart(ast.parse(source))) == [1]
