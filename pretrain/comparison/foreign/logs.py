"""Logs of foreign runs become rows of metrics, as if Motley had written them.

This module imports no torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.foreign.csv_file import ALL_TARGETS, Measurement, read_measurements
from pretrain.comparison.plan import PlannedRun
from pretrain.comparison.results import RunResult, load_run
from pretrain.comparison.run_documents import RunDocuments
from pretrain.config import RunConfig
from pretrain.run_files import CONFIG

_AXES = {"flops": "compute/train_flops", "seconds": "time/train_s"}

RunKey = tuple[str, int, float | None]
"""Arm, seed and size; the size is None where a log states none."""


@dataclass(frozen=True)
class Log:
    """One run, as far as it is known."""

    place: str
    """File or run directory, for messages."""
    rows: tuple[dict[str, Any], ...]
    """Rows of metrics, by rising step."""
    record: dict[str, Any]
    num_steps: int
    """Steps that the run was to make, or the last step of a CSV file, which does not say."""
    note: str | None = None
    """A sentence on what was left out of the log, or on what the run goes on from."""
    documents: RunDocuments | None = None
    """Its losses per held-out document, of a run directory that has them."""

    @property
    def last_losses(self) -> dict[str, Any]:
        """The last row with a loss on held-out data; {} if there is none. Behind it, a run that is not
        finished has rows of training."""
        with_loss = (row for row in reversed(self.rows) if any(n.startswith("eval/loss") for n in row))
        return next(with_loss, {})

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of which a loss is known, in the order of the log, without ALL_TARGETS, pairs of
        modalities, and parts of a modality, such as image/time_1."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith("eval/loss/"))
        known = (name.removeprefix("eval/loss/") for name in names)
        return tuple(name for name in known if "_to_" not in name and "/time_" not in name)


def read_logs(paths: Sequence[Path]) -> dict[RunKey, Log]:
    """The logs in CSV files, run directories and folders of run directories.

    Raises ConfigError for a path that is none of these, and for a run that two of them hold.
    """
    logs: dict[RunKey, Log] = {}
    for path in paths:
        found = _of_folder(path) if path.is_dir() else logs_of(read_measurements(path), str(path))
        for key, log in found.items():
            if key in logs:
                arm, seed, _ = key
                raise ConfigError(
                    f"{log.place}: seed {seed} of {arm} is in {logs[key].place} too; take one of the two out"
                )
            logs[key] = log
    return logs


# ------------------------------------------------------------------------------------------------ CSV files


def logs_of(measurements: Iterable[Measurement], source: str) -> dict[RunKey, Log]:
    """The logs in a CSV file. Raises ConfigError for lines that contradict each other."""
    by_run: dict[RunKey, list[Measurement]] = {}
    for one in measurements:
        by_run.setdefault((one.arm, one.seed, one.size), []).append(one)
    return {key: _log(key, lines, source) for key, lines in by_run.items()}


def _log(key: RunKey, lines: Sequence[Measurement], source: str) -> Log:
    by_step: dict[int, list[Measurement]] = {}
    for line in lines:
        by_step.setdefault(line.step, []).append(line)
    rows = [_row(by_step[step]) for step in sorted(by_step)]
    _check_rising(key, rows, by_step)
    return _without_lost_losses(key, rows, source)


def _row(lines: Sequence[Measurement]) -> dict[str, Any]:
    """The row of metrics of one step."""
    first, seen = lines[0], dict[str, Measurement]()
    for line in lines:
        if (other := seen.setdefault(line.modality, line)) is not line:
            raise ConfigError(
                f"{line.place}: {line.arm}, seed {line.seed}, step {line.step}, {line.modality} is there "
                f"already, in {other.place}; leave one out"
            )
        for name in ("tokens", *_AXES):
            if (ours := getattr(line, name)) != (theirs := getattr(first, name)):
                raise ConfigError(
                    f"{line.place}: {name} is {_shown(ours)}, and {_shown(theirs)} in {first.place}; at one "
                    f"step a run has one number of {name}"
                )
    row: dict[str, Any] = {"step": first.step, "tokens": first.tokens}
    row |= {key: value for name, key in _AXES.items() if (value := getattr(first, name)) is not None}
    losses = {line.modality: line.loss for line in lines}
    row |= {f"eval/loss/{modality}": loss for modality, loss in losses.items() if modality != ALL_TARGETS}
    if ALL_TARGETS in losses:
        row["eval/loss"] = losses[ALL_TARGETS]
    return row


def _shown(value: float | None) -> str:
    return "empty" if value is None else f"{value:g}"


def _check_rising(
    key: RunKey, rows: Sequence[dict[str, Any]], by_step: Mapping[int, list[Measurement]]
) -> None:
    """Raise ConfigError where a run has spent no more at a later step than at an earlier one."""
    for name, column in {"tokens": "tokens", **_AXES}.items():
        known = [row for row in rows if column in row]
        if 0 < len(known) < len(rows):
            row = next(row for row in rows if column not in row)
            raise ConfigError(
                f"{by_step[row['step']][0].place}: {name} is empty, and not in other rows of the run"
            )
        for before, after in pairwise(known):
            if after[column] <= before[column]:
                raise ConfigError(
                    f"{by_step[after['step']][0].place}: {key[0]}, seed {key[1]} has {after[column]:g} "
                    f"{name} at step {after['step']} and {before[column]:g} at step {before['step']}; {name} "
                    "count from the start of the run"
                )


def _without_lost_losses(key: RunKey, rows: Sequence[dict[str, Any]], source: str) -> Log:
    """The log without losses that are not finite. A run whose last loss is not finite has failed."""
    num_steps = rows[-1]["step"]
    lost = [(row, name) for row in rows for name, value in row.items() if not math.isfinite(value)]
    if not lost:
        return Log(source, tuple(rows), {}, num_steps)
    kept = tuple({name: value for name, value in row.items() if math.isfinite(value)} for row in rows)
    at_end = [name for row, name in lost if row is rows[-1]]
    if not at_end:
        note = (
            f"{len(lost)} losses of seed {key[1]} of {key[0]} are not finite, and are left out of its curves."
        )
        return Log(source, kept, {}, num_steps, note)
    why = f"its loss ({at_end[0].removeprefix('eval/loss').lstrip('/') or 'all'}) is {rows[-1][at_end[0]]}"
    attempt = {"reason": f"{why} at step {rows[-1]['step']}"}
    sound = tuple(row for row in kept[:-1] if any(name.startswith("eval/") for name in row))
    return Log(source, sound, {"status": "failed", "attempts": [attempt]}, num_steps)


# ------------------------------------------------------------------------------------------ run directories


def _of_folder(path: Path) -> dict[RunKey, Log]:
    """The logs of a run directory, or of the run directories in a folder."""
    if (path / CONFIG).is_file():
        folders = [path]
    else:
        folders = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    if not folders:
        raise ConfigError(
            f"{path}: a folder without a run: neither it nor a folder in it holds {CONFIG}; name CSV files, "
            "run directories, or the directory of a comparison"
        )
    logs: dict[RunKey, Log] = {}
    for folder in folders:
        key, log = _of_run(folder)
        if key in logs:
            raise ConfigError(
                f"{folder}: seed {key[1]} of {key[0]} is in {logs[key].place} too; name one of them"
            )
        logs[key] = log
    return logs


def _of_run(folder: Path) -> tuple[RunKey, Log]:
    """The log of one run directory. Its arm is the run's name without `_seed<n>`.

    An arm that looks ahead has the losses of its causal form, where it has one.
    """
    config = validate(RunConfig, read_object(folder / CONFIG), source=str(folder / CONFIG))
    if config.name != folder.name:
        raise ConfigError(
            f"{folder}: holds the run {config.name}, so the folder was renamed; give it its name back"
        )
    config = config.model_copy(update={"runs_dir": str(folder.parent)})
    arm = config.name.removesuffix(f"_seed{config.seed}")
    run = load_run(PlannedRun(arm, config.seed, config), causally=True)
    rows = tuple(_as_compared(row, run.prefix) for row in run.rows)
    log = Log(str(folder), rows, run.record, config.num_steps, _lineage(run), run.documents)
    return (arm, config.seed, None), log


def _lineage(run: RunResult) -> str | None:
    """A sentence on the trunk of a run; None for a run without one."""
    if (branch := run.record.get("branch")) is None:
        return None
    return (
        f"{run.planned.name} is a branch of {branch['parent']} at step {branch['step']:,}: its curves, "
        "tokens, FLOPs and seconds hold those of its trunk."
    )


def _as_compared(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The row with the losses of `prefix` as its held-out losses, and no other losses of evaluations."""
    kept = {name: value for name, value in row.items() if not name.startswith("eval/")}
    own = {name: value for name, value in row.items() if name.startswith((f"{prefix}loss", f"{prefix}gain"))}
    return kept | {f"eval/{name.removeprefix(prefix)}": value for name, value in own.items()}
