"""The rules of the house that import-linter cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "parallel", "data_pipeline", "tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TORCH_FREE = (
    "tools.cli",
    "pretrain.config",
    "pretrain.compare",
    "pretrain.report",
    "pretrain.models.config",
    "pretrain.models.accounting",
    "parallel.layout",
    "data_pipeline.config",
    "data_pipeline.vocabulary",
    "data_pipeline.toml_config",
    "data_pipeline.progress",
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400, "split it by what it holds"
    assert path.stem not in {"utils", "common", "helpers", "base", "misc"}


def test_core_can_be_read_in_an_afternoon() -> None:
    assert sum(len(path.read_text().splitlines()) for path in SOURCES) < 10_000


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_imports_no_torch(module: str) -> None:
    check = f"import sys, {module}; raise SystemExit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_only_launch_reads_the_environment() -> None:
    """A data layer that reads RANK gives tensor-parallel peers different data."""
    readers = [
        relative(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert set(readers) <= {"parallel/launch.py"}


def test_every_file_has_a_test_that_mirrors_it() -> None:
    missing = [
        relative(path)
        for path in SOURCES
        if path.name != "__init__.py"
        and not (ROOT / "tests" / path.parent.relative_to(ROOT) / f"test_{path.name}").exists()
    ]
    assert not missing


def test_every_folder_of_code_is_a_package() -> None:
    assert all((path.parent / "__init__.py").exists() for path in SOURCES)
