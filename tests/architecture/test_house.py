"""The rules of the house that import-linter cannot say."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "parallel", "data_pipeline", "slurm", "tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TORCH_FREE = (
    "tools.cli",
    "pretrain.config",
    "pretrain.checkpoint.folder",
    "pretrain.comparison.run",
    "pretrain.comparison.report.page",
    "pretrain.lineage.begin",
    "pretrain.train.checks",
    "pretrain.weights.sources",
    "pretrain.planning.text",
    "pretrain.models.config",
    "pretrain.models.accounting",
    "pretrain.models.decoding_accounting",
    "pretrain.generation.grammar",
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


TESTED_ELSEWHERE = {
    "parallel/engine.py": "parallel/test_zero_engine.py",
    "parallel/exit_codes.py": "parallel/test_launch.py",
    "parallel/optimizer.py": "pretrain/checkpoint/test_another_optimizer.py",
    "pretrain/comparison/caveat.py": "pretrain/comparison/test_caveats.py",
    "pretrain/comparison/curve_caveats.py": "pretrain/comparison/test_caveats.py",
    "pretrain/models/routing_state.py": "pretrain/models/test_depth.py",
    "pretrain/run_files.py": "pretrain/test_run_dir.py",
    "slurm/attempt.py": "slurm_cluster/test_jobs.py",
    "tools/model_verbs.py": "tools/test_cli.py",
}
"""Files that hold names, protocols or parsing only, or a part of another -> the test that uses them."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_are_short_and_named_for_what_they_hold() -> None:
    too_long = [relative(path) for path in SOURCES if len(path.read_text().splitlines()) >= 400]
    assert not too_long, f"split what has 400 lines or more by what it holds: {too_long}"
    assert not [path for path in SOURCES if path.stem in {"utils", "common", "helpers", "base", "misc"}]


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

    untested = {relative(path) for path in SOURCES if path.name != "__init__.py" and not tests_of(path)}
    assert untested == TESTED_ELSEWHERE.keys()
    assert all((ROOT / "tests" / test).exists() for test in TESTED_ELSEWHERE.values())


def test_every_folder_of_code_is_a_package() -> None:
    assert all((path.parent / "__init__.py").exists() for path in SOURCES)


def test_files_whose_seconds_are_known_exist() -> None:
    files = tomllib.loads((ROOT / "tests" / "seconds.toml").read_text())
    assert files and not [file for file in files if not (ROOT / file).is_file()]
