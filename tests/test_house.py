"""The house: imports go down only (CONTRIBUTING.md), so that a floor can be read, tested and trusted by itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lockstep

PACKAGE = Path(lockstep.__file__).parent
FLOORS = [
    ("scheme",),
    ("grid",),
    ("activations",),
    ("layouts",),
    ("kernels",),
    ("qat",),
    ("export",),
    ("loading",),
    ("align", "calibrate", "inspect", "plan", "sensitivity"),
    ("ptq",),
    ("callbacks",),
    ("recipes", "report"),
    ("cli",),
]
HEIGHT = {part: height for height, parts in enumerate(FLOORS) for part in parts}
# What `lockstep` itself hands out of its parts.
ATTRIBUTES = {
    **dict.fromkeys(("prepare", "unprepare", "PrepareReport"), "qat"),
    **dict.fromkeys(("Scheme", "TensorSpec", "ActivationSpec", "KVCacheSpec", "Rule"), "scheme"),
    "CalibrationReport": "calibrate",
    "Plan": "plan",
    "SensitivityReport": "sensitivity",
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and part of each import of Lockstep in a file, also inside functions and as an attribute of `lockstep`."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(level=level, module=module) if level:
                yield node.lineno, f"relative: {module}"
            case ast.ImportFrom(module="lockstep"):
                yield from ((node.lineno, ATTRIBUTES.get(alias.name, alias.name)) for alias in node.names)
            case ast.ImportFrom(module=str(module)) if module.startswith("lockstep."):
                yield node.lineno, module.split(".")[1]
            case ast.Import():
                for alias in node.names:
                    if alias.name.startswith("lockstep."):
                        yield node.lineno, alias.name.split(".")[1]
            case ast.Attribute(value=ast.Name(id="lockstep"), attr=attribute) if not attribute.startswith("__"):
                yield node.lineno, ATTRIBUTES.get(attribute, attribute)


def upward(source: str, part: str) -> list[str]:
    """Imports of `source`, a file of `part`, that do not go down."""
    found = []
    for line, other in imported(ast.parse(source)):
        if other not in HEIGHT:
            found.append(f"{line}: {other} has no floor")
        elif other != part and HEIGHT[other] >= HEIGHT[part]:
            found.append(f"{line}: {part} imports {other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    """A kernel that knows of the trainer cannot be used without it. There is no exception today."""
    assert upward(path.read_text(), part_of(path)) == []


def test_every_part_has_a_floor():
    assert {part_of(path) for path in FILES} == set(HEIGHT)


def test_the_floors_are_those_that_contributors_read_about():
    (line,) = re.findall(r"^- Imports go down only: (.*)\.$", (PACKAGE.parent / "CONTRIBUTING.md").read_text(), re.M)
    assert [set(re.findall(r"`(\w+)`", floor)) for floor in line.split(" < ")] == [
        *({part} for floor in FLOORS[:6] for part in floor),
        {"export"},
        {"loading"},
        {"align", "calibrate", "inspect", "plan", "sensitivity"},
        {"ptq"},
        {"callbacks"},
        {"recipes", "report"},
        {"cli"},
    ]


@pytest.mark.parametrize(
    ("source", "part", "found"),
    [
        ("from lockstep.scheme import Scheme", "grid", []),
        ("from lockstep.kernels import reference", "kernels", []),
        ("from lockstep.qat.linear import QATLinear", "kernels", ["1: kernels imports qat"]),
        ("from lockstep import grid, qat", "kernels", ["1: kernels imports qat"]),
        ("from lockstep import prepare", "kernels", ["1: kernels imports qat"]),
        ("def f():\n    import lockstep.align.compare", "export", ["2: export imports align"]),
        ("import lockstep\nlockstep.prepare(model, 'W4A16')", "kernels", ["2: kernels imports qat"]),
        ("import lockstep\nlockstep.__version__", "scheme", []),
        ("from . import qat", "kernels", ["1: relative: None has no floor"]),
        ("from lockstep.cli import main", "recipes", ["1: recipes imports cli"]),
        ("from lockstep.cellar import wine", "cli", ["1: cellar has no floor"]),
    ],
)
def test_an_import_that_goes_up_is_found(source, part, found):
    """In every way in which it can be written."""
    assert upward(source, part) == found
