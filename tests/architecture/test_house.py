"""The rules of the house that import-linter cannot say."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "parallel", "data_pipeline", "slurm", "tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TORCH_FREE = (
    "tools.cli",
    "pretrain.config",
    "pretrain.checkpoint.folder",
    "pretrain.comparison.run",
    "pretrain.comparison.report.page",
    "pretrain.train.checks",
    "pretrain.weights.sources",
    "pretrain.planning.text",
    "pretrain.models.config",
    "pretrain.models.accounting",
    "parallel.engine_memory",
    "parallel.layout",
    "parallel.partition",
    "data_pipeline.tokenize.config",
    "data_pipeline.shards.vocabulary",
    "data_pipeline.files.toml_config",
    "data_pipeline.files.progress",
    "slurm.submit.comparison",
    "slurm.submit",
    "slurm.submit.tokenize",
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400, "split it by what it holds"
    assert path.stem not in {"utils", "common", "helpers", "base", "misc"}


def lines_of_code(path: Path) -> int:
    """Lines that hold code: blank lines, comments and docstrings teach the reader, and are left out."""
    text = path.read_text()
    taught = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {
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
        if token.type not in silent
        for number in range(token.start[0], token.end[0] + 1)
    }
    return len(code - taught)


COMPARISONS = ("pretrain/comparison/", "pretrain/quantities.py")
TOLD_APART = ("tools/", "slurm/", "data_pipeline/demo/", "parallel/testing.py", *COMPARISONS)
"""The command line, jobs, the demo corpus, what only tests use, and comparisons of runs."""


def lines_below(*places: str) -> int:
    return sum(lines_of_code(path) for path in SOURCES if relative(path).startswith(places))


def test_core_can_be_read_in_an_afternoon() -> None:
    """The core is what bytes pass through on their way into weights and checkpoints (docs/design.md)."""
    everything = sum(map(lines_of_code, SOURCES))
    assert everything - lines_below(*TOLD_APART) < 10_000
    assert lines_below("slurm/") < 2_500
    assert lines_below(*COMPARISONS) < 3_000


def test_modules_import_no_torch() -> None:
    """One interpreter imports all of them in turn, and names those after which torch is there."""
    check = f"""
import importlib, sys
for module in {TORCH_FREE}:
    importlib.import_module(module)
    if {{"torch", "deepspeed"}} & sys.modules.keys():
        raise SystemExit(f"{{module}} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_launch_reads_the_environment() -> None:
    """A data layer that reads RANK gives tensor-parallel peers different data."""
    readers = [
        relative(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    # The test harness sets what launch reads, for the ranks that it forks.
    assert set(readers) <= {"parallel/launch.py", "parallel/testing.py"}


def test_every_file_has_a_test_that_mirrors_it() -> None:
    """Beside it in tests/, or in e2e/ where a file can only be tested as a process."""

    def tests_of(path: Path) -> list[Path]:
        mirrored = ROOT / "tests" / path.parent.relative_to(ROOT) / f"test_{path.name}"
        e2e = ROOT / "tests/e2e"
        return [mirrored] if mirrored.exists() else list(e2e.glob(f"test_{path.parent.name}_*.py"))

    no_code_of_its_own = {"parallel/engine.py", "parallel/exit_codes.py", "slurm/attempt.py"}
    untested = {relative(path) for path in SOURCES if path.name != "__init__.py" and not tests_of(path)}
    assert untested <= no_code_of_its_own


def test_every_folder_of_code_is_a_package() -> None:
    assert all((path.parent / "__init__.py").exists() for path in SOURCES)
