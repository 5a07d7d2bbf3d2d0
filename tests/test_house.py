"""The rooms of the package import one another only as `docs/architecture.md` says, and planted faults fit the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from planted_faults import read_faults

ROOT = Path(__file__).parents[1]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for path in sorted((ROOT / "vlmslim").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def in_room(module: str, room: str) -> bool:
    """Tell if a module is `vlmslim.room` or lies inside it."""
    return f"{module}.".startswith(f"vlmslim.{room}.")


def statements(node: ast.AST, anywhere: bool) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported, or with `anywhere` all nodes; none that is for types alone."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not for_types and (anywhere or not lazy):
            yield child
            yield from statements(child, anywhere)


@cache
def imports(module: str, anywhere: bool = True) -> frozenset[str]:
    """The names that a module imports: of modules, and of what it takes from them."""
    found = set()
    for node in statements(ast.parse(modules()[module].read_text()), anywhere):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return frozenset(found)


def users(prefix: str) -> list[str]:
    """The modules that import something whose name begins with `prefix`."""
    return [m for m in modules() if any(f"{name}.".startswith(f"{prefix}.") for name in imports(m))]


def test_the_parser_sees_imports():
    assert "transformers.AutoTokenizer" in imports("vlmslim.methods._question")
    assert "transformers.AutoTokenizer" not in imports("vlmslim.methods._question", anywhere=False)
    assert "vlmslim.ops.ranking" in imports("vlmslim.methods.divprune", anywhere=False)
    assert "vlmslim.methods.divprune" in users("vlmslim.ops.ranking")


def test_ops_import_nothing_of_ours():
    for module in filter(lambda m: in_room(m, "ops"), modules()):
        ours = {name for name in imports(module) if name.split(".")[0] == "vlmslim"}
        assert all(in_room(name, "ops") for name in ours), module


def test_engine_and_ops_import_no_method():
    assert not [m for m in users("vlmslim.methods") if in_room(m, "engine") or in_room(m, "ops")]


def test_pictures_need_no_method_and_no_engine():
    others = [m for room in ("methods", "engine") for m in users(f"vlmslim.{room}")]
    assert not [m for m in others if in_room(m, "pictures")]


def test_only_some_rooms_know_transformers_model_code():
    known = ("engine", "loading", "training")
    assert not [m for m in users("transformers.models") if not any(in_room(m, room) for room in known)]


def test_no_import_goes_in_a_circle():
    graph = {m: {name for name in imports(m, anywhere=False) if name in modules()} - {m} for m in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_the_leaderboard_loads_no_torch():
    board = [m for m in modules() if in_room(m, "leaderboard")]
    code = f"import sys, {', '.join(board)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_planted_fault_fits_the_code():
    """Code that moves takes its faults along, or `scripts/analysis/planted_faults.py` would test less and less."""
    assert [(fault.name, reason) for fault in read_faults() if (reason := fault.stale())] == []
