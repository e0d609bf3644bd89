"""How much there is to read: the import closure of the training loop, every wing, every function.

`sizes.toml` holds a limit for each total. A change that needs more raises the limit and writes one line that
says why; a change that needs clearly less must lower it, so that the limits say what is there.
"""

import ast
import io
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "parallel", "data_pipeline", "slurm", "tools")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LIMITS = tomllib.loads((Path(__file__).parent / "sizes.toml").read_text())
SLACK = 0.03
"""A limit more than this share above its total is stale."""
LONG, LONGEST = 40, 60
LONG_FUNCTIONS = f"functions of more than {LONG} lines"


@cache
def lines_of_code(module: str) -> int:
    """Lines of a module that hold code. Blank lines, comments and docstrings do not count: they teach."""
    text = MODULES[module].read_text()
    docstrings = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    without_code = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code = {
        number
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in without_code
        for number in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docstrings)


def imported_modules(module: str) -> set[str]:
    """Modules of ours that a module imports anywhere in its text, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def import_closure(module: str) -> set[str]:
    """The module and everything of ours that is imported, however far away, when it is used."""
    closure: set[str] = set()
    waiting = {module}
    while waiting:
        current = waiting.pop()
        closure.add(current)
        waiting |= imported_modules(current) - closure
    return closure


@cache
def function_lengths() -> dict[str, int]:
    """Lines of every function, its docstring included."""
    return {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def measured(name: str) -> int:
    """What `name` counts: LONG_FUNCTIONS, or lines of code of "closure of <module>" or of a package."""
    if name == LONG_FUNCTIONS:
        return sum(lines > LONG for lines in function_lengths().values())
    if name.startswith("closure of "):
        return sum(map(lines_of_code, import_closure(name.removeprefix("closure of "))))
    wing = [module for module in MODULES if module == name or module.startswith(f"{name}.")]
    assert wing, f"sizes.toml: no package {name}"
    return sum(map(lines_of_code, wing))


@pytest.mark.parametrize("name", LIMITS)
def test_a_total_stays_within_its_limit(name: str) -> None:
    total, limit = measured(name), LIMITS[name]["limit"]
    assert total <= limit, f"{name}: {total}; shorten it, or raise the limit of {limit} with a reason"
    assert total >= (1 - SLACK) * limit - 20, f"{name}: {total}; lower the limit of {limit}"


def test_every_package_has_a_limit() -> None:
    assert set(PACKAGES) <= LIMITS.keys()
    assert all(entry["why"] for entry in LIMITS.values())


def test_a_function_fits_on_a_page() -> None:
    too_long = {name: lines for name, lines in function_lengths().items() if lines > LONGEST}
    assert not too_long, f"functions of more than {LONGEST} lines: {too_long}"


def test_the_training_loop_fits_in_half_a_page() -> None:
    assert function_lengths()["pretrain/train/loop.py: train"] <= LONG


def test_closures_follow_imports_inside_functions() -> None:
    closure = import_closure("pretrain.train.loop")
    assert {"pretrain.models.decoder", "parallel.zero_engine", "data_pipeline.stream.stream"} <= closure
    assert not any(module.startswith(("slurm", "tools", "pretrain.comparison")) for module in closure)
