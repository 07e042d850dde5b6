"""The floors of the house: a module imports only from lower ones."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "epic_quant"

# A room and its floor; a folder is one room, inside which modules may import each other without a circle.
FLOORS = {
    "errors": 0,
    "records": 0,
    "units": 0,
    "command_line": 1,
    "metrics": 1,
    "kernels": 1,
    "spec": 1,
    "machine": 2,
    "results": 2,
    "quant": 2,
    "checkpoint": 2,
    "gemma4": 3,
    "ple": 4,
    "kv": 4,
    "text": 4,
    "policy": 5,
    "calibration": 6,
    "footprint": 6,
    "quality": 6,
    "recipe": 6,
    "plan": 7,
    "report": 7,
    "inspect": 7,
    "plugin": 8,
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path):
    parts = ("epic_quant", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Every module that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {dotted(module) for module in MODULES}
            yield from (name if name in known else node.module for name in submodules)


def room(name):
    return name.split(".")[1] if name.startswith("epic_quant.") else None


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_lower_floors(path):
    own = room(dotted(path))
    others = {room(name) for name in imported(path)} - {None, own}
    assert {name for name in others if FLOORS[name] >= FLOORS[own]} == set()


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
    users = {room(dotted(path)) for path in MODULES if any(name.split(".")[0] == "pytest" for name in imported(path))}
    assert users == {"plugin"}


def test_the_report_and_the_recipe_stand_on_the_lowest_rooms_alone():
    inside = {
        room(name)
        for path in MODULES
        if room(dotted(path)) in ("report", "recipe", "results")
        for name in imported(path)
        if name.startswith("epic_quant.") and room(name) != room(dotted(path))
    }
    assert inside == {"command_line", "errors", "records", "results", "spec", "units"}


def test_every_room_has_a_floor():
    assert {room(dotted(path)) for path in MODULES} <= set(FLOORS)
