"""What a path on the command line stands for: a run or a comparison. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.config import PLAN, is_comparison, make_plan
from pretrain.config import RunConfig, load
from pretrain.run_files import CONFIG, RECORD
from slurm.records import FOLDER, last_submission, read_json


@dataclass(frozen=True)
class RunTarget:
    directory: Path
    config: RunConfig | None
    """None: the directory holds none that this version can read."""


@dataclass(frozen=True)
class ComparisonTarget:
    directory: Path
    runs: tuple[RunTarget, ...]
    """Seed by seed."""


Target = RunTarget | ComparisonTarget


def target(path: str | Path, overrides: Sequence[str] = ()) -> Target:
    """The run or comparison of a file, with `key=value` overrides, or of a directory that one has made.

    Raises ConfigError for a path that is neither.
    """
    path = Path(path)
    if path.is_dir():
        if overrides:
            raise ConfigError(f"{path}: a directory takes no overrides ({' '.join(overrides)}); a file does")
        if (found := _of_directory(path)) is None:
            raise ConfigError(
                f"{path}: holds neither a run ({CONFIG}, {RECORD}, {FOLDER}/) nor a comparison ({PLAN})"
            )
        return found
    if is_comparison(path):
        plan = make_plan(path, overrides)
        return ComparisonTarget(
            plan.directory, tuple(RunTarget(run.config.run_dir, run.config) for run in plan.runs)
        )
    config = load(path, overrides)
    return RunTarget(config.run_dir, config)


def run_target(path: str | Path, overrides: Sequence[str] = ()) -> RunTarget:
    """As `target`, and raises ConfigError, naming its runs, for a comparison."""
    found = target(path, overrides)
    if isinstance(found, ComparisonTarget):
        names = ", ".join(str(run.directory) for run in found.runs)
        raise ConfigError(f"{path} is a comparison; name one of its runs: {names}")
    return found


def targets_under(folder: Path) -> list[Target]:
    """All that a folder holds, by name."""
    found = (_of_directory(path) for path in sorted(folder.iterdir()) if path.is_dir())
    return [each for each in found if each is not None]


def _of_directory(path: Path) -> Target | None:
    if (path / PLAN).exists():
        runs = read_json(path / PLAN).get("runs", {})
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
