"""Which run a file belongs to: an id drawn when the run begins, and the hash of its resolved config.

The id stands in record.json, in every checkpoint and in every row of metrics.jsonl; the hash in record.json
and in every checkpoint. Runs, checkpoints and rows of earlier versions have neither. Imports no torch.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import file_digest
from pretrain.run_files import CHECKPOINTS, CONFIG, METRICS, RECORD

RECORD_FORMAT = 2
"""Versions without identities wrote records of format 1. When a later version continues such a run, the
record gets an identity and keeps its format."""


@dataclass(frozen=True)
class RunIdentity:
    """What tells a run from every other one."""

    id: str
    config_sha256: str
    """SHA-256 of config.resolved.json."""
    began_without: bool = False
    """Whether a version without identities began the run, so that files without one may be the run's own."""
    earlier_configs: tuple[str, ...] = ()
    """SHA-256 of config.resolved.json before each time that the run was extended, oldest first."""

    def to_json(self) -> dict[str, str]:
        """The entry "run" of record.json and of a checkpoint's manifest."""
        return {"id": self.id, "config_sha256": self.config_sha256}


def draw_identity(run_dir: Path, *, began_without: bool = False) -> RunIdentity:
    """The identity of a run that has just written its config."""
    return RunIdentity(secrets.token_hex(8), file_digest(run_dir / CONFIG)["sha256"], began_without)


def identity_of(record: Mapping[str, Any]) -> RunIdentity | None:
    """The identity in a record.json; None if a version without identities wrote it, or if it is empty."""
    run = record.get("run")
    if run is None:
        return None
    earlier = tuple(change["config_sha256"] for change in record.get("changes", ()) if change["after"])
    return RunIdentity(run["id"], run["config_sha256"], record.get("format") != RECORD_FORMAT, earlier)


def check_files_are_there(run_dir: Path) -> None:
    """Raise ConfigError if a run has begun in the directory and its config or its record is missing.

    Without them nobody can say whose checkpoints and metrics these are. A run writes its config first, then
    its record, then the other files.
    """
    in_order = [run_dir / name for name in (CONFIG, RECORD, METRICS)]
    in_order += sorted((run_dir / CHECKPOINTS).glob("step_*"))
    for place, path in enumerate(in_order[:2]):
        later = [other for other in in_order[place + 1 :] if other.exists()]
        if later and not path.exists():
            raise ConfigError(
                f"{path} is missing, and {later[0].relative_to(run_dir)} is there: the run could go on as "
                "another one; put the file back, or start again under another name=..."
            )


def check_resolved_config(run_dir: Path, run: RunIdentity | None) -> None:
    """Raise ConfigError if the config in the directory is not the one that the run began with."""
    if run is not None and file_digest(run_dir / CONFIG)["sha256"] != run.config_sha256:
        raise ConfigError(
            f"{run_dir / CONFIG} is not the file that the run began with: its SHA-256 differs from the one "
            f"in {RECORD}; put the file back as it was, or start again under another name=..."
        )


def check_origin(path: Path, saved: Mapping[str, str] | None, run: RunIdentity) -> None:
    """Raise ConfigError if a checkpoint is not one of `run`; `saved`: the entry "run" of its manifest."""
    if saved is None:
        problem = None if run.began_without else "it names no run, as all checkpoints of this run do"
    elif saved["id"] != run.id:
        problem = f"its run id is {saved['id']}, and this run has {run.id}"
    elif saved["config_sha256"] not in (run.config_sha256, *run.earlier_configs):
        problem = f"it was saved under another {CONFIG}, whose SHA-256 it holds"
    else:
        problem = None
    if problem:
        raise ConfigError(
            f"{path} is a checkpoint of another run: {problem}. A run continues from its own checkpoints: "
            "move this one back; initial_weights begins a new run with weights of another"
        )


def check_rows_of_run(path: Path, rows: Sequence[Mapping[str, Any]], run: RunIdentity | None) -> None:
    """Raise ConfigError, naming the step, if a row of the metrics file `path` is one of another run."""
    if run is None:
        return
    legal = (run.id, None) if run.began_without else (run.id,)
    for row in rows:
        if row.get("run") not in legal:
            theirs = f"run id {row['run']}" if "run" in row else "no run id"
            raise ConfigError(
                f"{path}: the row of step {row['step']} is one of another run: it has {theirs}, and this run "
                f"has {run.id}; put this run's file back, or start again under another name=..."
            )


def check_sealed_rows(path: Path, record: Mapping[str, Any]) -> None:
    """Raise ConfigError if the metrics file is not the one that the run's last attempt ended with.

    The record has its SHA-256 once an attempt has ended; of a running or killed attempt nothing is known.
    """
    sealed = record.get("metrics")
    if sealed is None:
        return
    if not path.exists() or file_digest(path)["sha256"] != sealed["sha256"]:
        raise ConfigError(
            f"{path} is not the file that the run ended with: its SHA-256 differs from the one in {RECORD}; "
            f"put the file back, or remove {path.parent} and train the run again"
        )
