"""The run or comparison that a path on the command line names. This module imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.config import is_comparison, make_plan
from pretrain.comparison.plan_file import PLAN
from pretrain.config import RunConfig, load
from pretrain.run_files import CONFIG, RECORD
from slurm.records import FOLDER, last_submission, read_json


@dataclass(frozen=True)
class RunTarget:
    """A run."""

    directory: Path
    config: RunConfig | None
    """None: the directory holds no config that this version can read."""


@dataclass(frozen=True)
class ComparisonTarget:
    """A comparison and its runs."""

    directory: Path
    runs: tuple[RunTarget, ...]
    """The runs in the order of the plan: all arms of the first seed, then of the next. By directory, those
    that come first follow, until they have ended."""


Target = RunTarget | ComparisonTarget


def target(path: str | Path, overrides: Sequence[str] = ()) -> Target:
    """The run or comparison of a file, with `key=value` overrides, or of the directory that it writes.

    Raises ConfigError for a path that is neither.
    """
    path = Path(path)
    if path.is_dir():
        if overrides:
            raise ConfigError(f"{path}: a directory takes no overrides ({' '.join(overrides)}); a file does")
        if (in_directory := _of_directory(path)) is None:
            raise ConfigError(
                f"{path}: holds neither a run ({CONFIG}, {RECORD}, {FOLDER}/) nor a comparison ({PLAN})"
            )
        return in_directory
    if is_comparison(path):
        plan = make_plan(path, overrides)
        return ComparisonTarget(
            plan.directory, tuple(RunTarget(run.config.run_dir, run.config) for run in plan.next_runs)
        )
    config = load(path, overrides)
    return RunTarget(config.run_dir, config)


def run_target(path: str | Path, overrides: Sequence[str] = ()) -> RunTarget:
    """The run that a path names. Raises ConfigError for a comparison, with the names of its runs."""
    named = target(path, overrides)
    if isinstance(named, ComparisonTarget):
        names = ", ".join(str(run.directory) for run in named.runs)
        raise ConfigError(f"{path} is a comparison; name one of its runs: {names}")
    return named


def targets_under(folder: Path) -> list[Target]:
    """The runs and comparisons in the directories of a folder, sorted by name."""
    targets = (_of_directory(path) for path in sorted(folder.iterdir()) if path.is_dir())
    return [item for item in targets if item is not None]


def _of_directory(path: Path) -> Target | None:
    """The run or comparison that wrote a directory; None if none did."""
    if (path / PLAN).exists():
        values = read_json(path / PLAN)
        runs = values.get("runs", {}) | values.get("first", {})
        return ComparisonTarget(
            path, tuple(RunTarget(path / name, _config(values)) for name, values in runs.items())
        )
    if not any((path / name).exists() for name in (CONFIG, RECORD, FOLDER)):
        return None
    values = read_json(path / CONFIG)
    if not values and (submission := last_submission(path / FOLDER)) is not None:
        values = read_json(submission / CONFIG.replace(".resolved", ""))
    return RunTarget(path, _config(values))


def _config(values: dict[str, Any]) -> RunConfig | None:
    try:
        return validate(RunConfig, values, source="")
    except ConfigError:
        return None
