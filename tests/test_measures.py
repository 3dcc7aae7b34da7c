"""The measures of the package: statements, fields, refusals, floors, circles. `pytest -s` prints them."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig

from trl_lambda import LambdaGRPOConfig

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_lambda"
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
# Ground floor first. A room imports rooms before it only.
ROOMS = (
    *("generation_batch", "weights", "trl_seam", "lambda_grpo_config", "lambda_parameter", "metrics", "report"),
    *("model_card", "lambda_grpo_trainer", "scripts", "__init__", "cli"),
)
MOST = {
    "statements": 2400,
    "statements without report and scripts": 1650,
    "lines": 4500,
    "added fields": 17,
    "raise statements": 100,
    "rooms": 11,
    "lines of tests": 10_000,
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def count(kind: type, files=FILES) -> int:
    return sum(isinstance(node, kind) for path in files for node in ast.walk(FILES[path]))


def imports(path: Path) -> set[Path]:
    """The files of the package that a file imports from, by relative imports."""
    found = set()
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            target = base.joinpath(*(node.module or "").split("."))
            for candidate in (target.with_suffix(".py"), target / "__init__.py"):
                found |= {candidate} & FILES.keys()
            found |= {target / f"{alias.name}.py" for alias in node.names} & FILES.keys()
    return found


def measures() -> dict[str, int]:
    core = [path for path in FILES if room_of(path) not in ("report", "scripts", "cli")]
    tests = [path for path in (ROOT / "tests").rglob("*.py")]
    return {
        "statements": count(ast.stmt),
        "statements without report and scripts": count(ast.stmt, core),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES),
        "added fields": len({f.name for f in fields(LambdaGRPOConfig)} - {f.name for f in fields(GRPOConfig)}),
        "raise statements": count(ast.Raise),
        "rooms": len({room_of(path) for path in FILES} - {"__init__", "cli"}) + 1,  # those two are one
        "lines of tests": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests),
    }


def test_measures():
    found = measures()
    by_room = {room: count(ast.stmt, [p for p in FILES if room_of(p) == room]) for room in ROOMS}
    print(*(f"\n{name}: {value} (at most {MOST[name]})" for name, value in found.items()))
    print("statements by room:", by_room)
    assert {room_of(path) for path in FILES} == set(ROOMS)
    assert not {name: value for name, value in found.items() if value > MOST[name]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_one_above_it(path):
    floor = ROOMS.index(room_of(path))
    above = [target.name for target in imports(path) if ROOMS.index(room_of(target)) > floor]
    assert not above


def test_no_circle_of_files():
    graph = {path: imports(path) - {path} for path in FILES}
    while free := [path for path, targets in graph.items() if not targets]:
        graph = {path: targets - set(free) for path, targets in graph.items() if path not in free}
    assert not graph, [str(path.relative_to(PACKAGE)) for path in graph]
