"""The run directory, which has one config, one writer at a time and a record of every attempt.

This module imports no torch.
"""

import hashlib
import json
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.files.atomic import write_json
from data_pipeline.files.json_file import check_fields, read_object
from data_pipeline.files.lock import lock_directory
from data_pipeline.files.toml_config import ConfigError, validate
from parallel.exit_codes import ExitCode
from parallel.layout import data_parallel_size
from pretrain.checkpoint.folder import checkpoints, file_digest
from pretrain.config import RunConfig, differences
from pretrain.dotted_keys import covers, value_at
from pretrain.run_files import CHECKPOINTS, CONFIG, DOCUMENTS, LOCK, LOGS, METRICS, RECORD
from pretrain.run_identity import (
    RECORD_FORMAT,
    RunIdentity,
    check_files_are_there,
    check_resolved_config,
    check_sealed_rows,
    draw_identity,
    identity_of,
)

PACKAGES = ("torch", "deepspeed", "megatron-core", "motley", "numpy")

FREE_KEYS = (
    "runs_dir",
    "keep_checkpoints",
    "on_failed_save",
    "keep_code_diff",
    "data.prefetch_steps",
    "data.max_unreadable_frac",
    "data.max_epochs",
    "data.cache_dir",
    "data.cache_gb",
    "data.retry_s",
    "parallel",
    "on_spike",
    "spike",
    "every_steps",
    "evaluate",
)
"""Keys and tables that a later attempt may change. They do not change the numbers of the run, except that
another layout adds in another order and rounds differently; that under a higher data.max_unreadable_frac
a run goes on without documents whose absence its fingerprint and rows of metrics show; that on_spike and
spike decide which later steps are left out, which record and rows of metrics show; and that every_steps and
evaluate decide at which steps there are rows and checkpoints, and on how much held-out data, of which every
row has the fingerprint."""


def check_config(config: RunConfig) -> None:
    """Raise ConfigError, showing each difference, if the run directory was made by another config.

    It is also raised if the config or the metrics of an attempt that ended have changed since, or if config
    or record are missing beside other files of the run.
    """
    path = config.run_dir / CONFIG
    check_files_are_there(config.run_dir)
    record = read_record(config.run_dir)
    _check_beginning(config, record)
    if not path.exists():
        return
    check_resolved_config(config.run_dir, identity_of(record))
    check_sealed_rows(config.run_dir / METRICS, record)
    ours = validate(RunConfig, read_object(path), source=str(path))
    changed = [item for item in differences(ours, config) if not is_free(item[0])]
    if changed:
        lines = "\n".join(f"  {key}: {_show(old)} there, {_show(new)} now" for key, old, new in changed)
        raise ConfigError(
            f"{config.run_dir} was made by another config:\n{lines}\n"
            f"To continue it, use the values it was made with ({path}); "
            f"for the new values give the run another name, such as name={config.name}-2"
        )


def _check_beginning(config: RunConfig, record: Mapping[str, Any]) -> None:
    """Raise ConfigError if the run would start at step 0, and its first steps are another run's or were made
    under another schedule."""
    saved = [step for step, _ in checkpoints(config.run_dir / CHECKPOINTS)]
    start_step = config.optimizer.schedule.start_step
    if "branch" in record and not saved:
        raise ConfigError(
            f"{config.run_dir} is a branch of {record['branch']['parent']}, and none of its checkpoints is "
            "left, so that it cannot go on; put one back, or remove the directory and make the branch again"
        )
    if start_step > max(saved, default=0):
        raise ConfigError(
            f"optimizer.schedule.start_step = {start_step}, but {config.run_dir} has no checkpoint of that "
            "step or a later one: only --extend and --branch of a run that has made the steps before it "
            "take the key; a run that begins takes 0"
        )


def finished_step(config: RunConfig) -> int | None:
    """The last step if the run directory holds a finished run, else None."""
    record = read_record(config.run_dir)
    return record["attempts"][-1]["to_step"] if record.get("status") == "done" else None


class RunDir:
    """An open run directory, locked against a second writer, with a record of this attempt."""

    def __init__(self, path: Path, lock: ExitStack, record: dict[str, Any]) -> None:
        self.path, self._lock, self.record = path, lock, record

    @classmethod
    def open(cls, config: RunConfig, *, world_size: int, command: Sequence[str]) -> "RunDir":
        """Open the directory for writing; it is made if it is missing.

        Raises ConfigError if it was made by another config, has another writer, or cannot be written.
        """
        path = config.run_dir
        with lock_run(path) as lock:
            check_config(config)
            if not (path / CONFIG).exists():
                write_json(path / CONFIG, config.model_dump(mode="json"))
            record = read_record(path)
            identity = identity_of(record) or draw_identity(path, began_without=bool(record))
            record = record or new_record(config)
            record["run"] = identity.to_json()
            record.pop("metrics", None)  # it speaks of rows that this attempt adds to
            if record["attempts"] and record["attempts"][-1]["stopped"] is None:
                record["attempts"][-1] |= {"reason": "killed: no stop was recorded"}
            code = code_state()
            if code.digest is not None and config.keep_code_diff:
                record["diffs"][code.digest] = code.diff
            record["attempts"].append(_new_attempt(config, world_size, command, code))
            record["status"] = "running"
            write_json(path / RECORD, record)
            return cls(path, lock.pop_all(), record)

    def started(
        self,
        step: int,
        *,
        device: str,
        processor: str | None,
        arithmetic: str,
        initial_weights: str | None,
    ) -> None:
        """Record that this attempt continues from `step`, on `device`.

        `processor`, `arithmetic`: as in pretrain/train/arithmetic.py. `initial_weights`: the digest of the
        weights that step 0 began with; None if they were drawn.
        """
        self.record["attempts"][-1] |= {
            "from_step": step,
            "device": device,
            "processor": processor,
            "arithmetic": arithmetic,
            "initial_weights": initial_weights,
        }
        self._save()

    @property
    def identity(self) -> RunIdentity:
        """Which run this is."""
        identity = identity_of(self.record)
        assert identity is not None  # `open` draws one
        return identity

    def seal_rows(self, num_rows: int, sha256: str) -> None:
        """Note the digest of all rows of metrics.jsonl; `close` records it."""
        self.record["metrics"] = {"rows": num_rows, "sha256": sha256}

    def keep_documents(self, content: Mapping[str, Any]) -> None:
        """Write documents.json and note its digest; `close` records it."""
        write_json(self.path / DOCUMENTS, content)
        self.record["documents"] = {"sha256": file_digest(self.path / DOCUMENTS)["sha256"]}

    def keep_peak(self, key: str, flops: float) -> None:
        """Record a measured peak (FLOP/s). All attempts use one number, so a restart does not change MFU."""
        self.record["peak_flops"][key] = flops
        self._save()

    def keep_spikes(self, spikes: Sequence[Mapping[str, Any]], lost: Mapping[str, float]) -> None:
        """Record the run's spikes up to now, oldest first, and what they lost."""
        if spikes or "spikes" in self.record:
            self.record["spikes"] = {"events": list(spikes), **lost}
            self._save()

    def close(self, *, status: str, reason: str, exit_code: int, step: int | None) -> None:
        """Record the end of the attempt (`status`: done, stopped or failed) and release the lock."""
        stop = {"stopped": _now(), "reason": reason, "exit_code": exit_code, "to_step": step}
        self.record["attempts"][-1] |= stop
        self.record["status"] = status
        self._save()
        self._lock.close()

    def _save(self) -> None:
        write_json(self.path / RECORD, self.record)


def attempts(config: RunConfig) -> list[dict[str, Any]]:
    """The attempts of the run in its record, oldest first."""
    return read_record(config.run_dir).get("attempts", [])


def record_cause(config: RunConfig, cause: str, *, exit_code: int) -> None:
    """Give the last attempt the cause that the launcher of its ranks has found. Rank 0, which wrote the
    record, may have been killed, or may know only that it lost another rank."""
    with lock_run(config.run_dir):
        record = read_record(config.run_dir)
        attempt = record["attempts"][-1]
        attempt |= {"stopped": attempt["stopped"] or _now(), "reason": cause, "exit_code": exit_code}
        record["status"] = "stopped" if exit_code == ExitCode.REQUEUE else "failed"
        write_json(config.run_dir / RECORD, record)


def check_writable(config: RunConfig) -> None:
    """Raise ConfigError if this process could not write the run directory: asked before ranks are started."""
    lock_run(config.run_dir).close()


def lock_run(path: Path) -> ExitStack:
    """The lock of the run directory, which is made if it is missing; it is held until the stack is closed."""
    stack = ExitStack()
    try:
        for folder in (path, path / LOGS, path / CHECKPOINTS):
            folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(
            lock_directory(
                path,
                lambda holder: (
                    f"{path} is in use by {holder}; a run directory has one writer: "
                    "wait for it, stop it, or give this run another name=..."
                ),
                name=LOCK,
            )
        )
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error}; set runs_dir=... to a folder that can"
        ) from None
    return stack


def read_record(run_dir: Path) -> dict[str, Any]:
    """The content of record.json; {} if there is none. Raises ConfigError, naming the field, for another."""
    path = run_dir / RECORD
    try:
        record = read_object(path, {"attempts": list})
    except (FileNotFoundError, NotADirectoryError):  # check_writable explains the latter better
        return {}
    for name, fields in _OPTIONAL_FIELDS.items():
        if name in record:
            check_fields(record[name], fields, where=f"{path}: {name}", advice="was it edited?")
    for number, attempt in enumerate(record["attempts"]):
        check_fields(attempt, _ATTEMPT_FIELDS, where=f"{path}: attempts[{number}]", advice="was it edited?")
    for number, change in enumerate(record.get("changes", ())):
        check_fields(change, _CHANGE_FIELDS, where=f"{path}: changes[{number}]", advice="was it edited?")
    return record


_CHANGE_FIELDS = {"kind": str, "before": dict, "after": dict, "config_sha256": str}
"""The fields of a change (pretrain/lineage/changes.py)."""
_OPTIONAL_FIELDS = {
    "run": {"id": str, "config_sha256": str},
    "metrics": {"sha256": str},
    "documents": {"sha256": str},
    "spikes": {"events": list},
    "branch": {"parent": str, "run": str, "step": int, "inherited": dict},
    "change": {"step": int, "aside": (str, type(None)), "config": (dict, type(None)), **_CHANGE_FIELDS},
}
"""Entries that records of earlier versions, or of a running attempt, lack -> the fields that they hold."""
_ATTEMPT_FIELDS = {"stopped": (str, type(None)), "to_step": (int, type(None))}
"""The fields of an attempt that a later attempt, or a report, relies on."""


class CodeState(NamedTuple):
    """The git checkout that this code runs from."""

    commit: str | None
    """None if the code is in no checkout."""
    diff: str
    """What is not committed, as a diff against `commit`. It may hold secrets."""
    changed_files: list[str]
    """Files that the diff changes, relative to the root of the checkout."""

    @property
    def digest(self) -> str | None:
        """A hash of the diff; None if all is committed."""
        return hashlib.sha256(self.diff.encode()).hexdigest()[:16] if self.diff else None


def code_state() -> CodeState:
    """The state of the git checkout that this code runs from."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ("git", "-C", here.parent, *arguments), capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            return ""
        return done.stdout if done.returncode == 0 else ""

    if not git("ls-files", "--error-unmatch", here.name):  # installed in another repository
        return CodeState(None, "", [])
    files = git("diff", "--name-only", "HEAD").splitlines()
    return CodeState(git("rev-parse", "HEAD").strip() or None, git("diff", "HEAD"), files)


def new_record(config: RunConfig) -> dict[str, Any]:
    """The record of a run that begins, without its identity."""
    return {"format": RECORD_FORMAT, "name": config.name, "attempts": [], "diffs": {}, "peak_flops": {}}


def _new_attempt(
    config: RunConfig, world_size: int, command: Sequence[str], code: CodeState
) -> dict[str, Any]:
    """A row of record["attempts"]; None stands for what only the attempt or its end will tell."""
    return {
        "started": _now(),
        "stopped": None,
        "reason": None,
        "exit_code": None,
        "from_step": None,
        "to_step": None,
        "command": list(command),
        "host": socket.gethostname(),
        "device": None,
        "processor": None,
        "arithmetic": None,
        "layout": {
            "processes": world_size,
            "dp": data_parallel_size(config.parallel, world_size),
            **config.parallel.model_dump(include={"tp", "pp", "zero_stage"}),
        },
        "free_keys": {key: value_at(config.model_dump(mode="json"), key) for key in FREE_KEYS},
        "commit": code.commit,
        "diff": code.digest,
        "changed_files": code.changed_files,
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    """Python's version, and that of each of PACKAGES; None for a package that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_free(key: str) -> bool:
    """Whether a later attempt may change the dotted key."""
    return any(covers(free, key) for free in FREE_KEYS)


def _show(value: Any) -> str:
    return "(absent)" if value is None else json.dumps(value)
