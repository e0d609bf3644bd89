"""The run directory: one config, one writer at a time, a record of every attempt. Imports no torch."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError, validate
from parallel.layout import data_parallel_size
from pretrain.config import RunConfig, differences
from pretrain.run_files import CHECKPOINTS, CONFIG, LOCK, LOGS, RECORD

PACKAGES = ("torch", "deepspeed", "megatron-core", "motley", "numpy")

FREE_KEYS = (
    "runs_dir",
    "keep_checkpoints",
    "data.prefetch_steps",
    "parallel",
)
"""Keys and tables that a later attempt may change: nothing of it reaches the numbers of the run, but for the
rounding of sums that another layout takes in another order."""


def check_config(config: RunConfig) -> None:
    """Raise ConfigError, showing each difference, if the run directory was made by another config."""
    path = config.run_dir / CONFIG
    if not path.exists():
        return
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); was it edited?") from None
    ours = validate(RunConfig, values, source=str(path))
    changed = [item for item in differences(ours, config) if not _is_free(item[0])]
    if changed:
        lines = "\n".join(f"  {key}: {_show(old)} there, {_show(new)} now" for key, old, new in changed)
        raise ConfigError(
            f"{config.run_dir} was made by another config:\n{lines}\n"
            f"To continue it, use the values it was made with ({path}); "
            f"for the new values give the run another name, such as name={config.name}-2"
        )


def finished_step(config: RunConfig) -> int | None:
    """The last step if the run directory holds a finished run, else None."""
    record = _read_record(config.run_dir)
    return record["attempts"][-1]["to_step"] if record.get("status") == "done" else None


class RunDir:
    """An open run directory: made, locked against a second writer, its record of this attempt begun."""

    def __init__(self, path: Path, lock: "_Lock", record: dict[str, Any]) -> None:
        self.path, self._lock, self.record = path, lock, record

    @classmethod
    def open(cls, config: RunConfig, *, world_size: int, command: Sequence[str]) -> "RunDir":
        """Open for writing. Raises ConfigError: another config, another writer, a disk that is read-only."""
        path = config.run_dir
        lock = _lock(path)
        check_config(config)
        if not (path / CONFIG).exists():
            write_json(path / CONFIG, config.model_dump(mode="json"))
        record = _read_record(path) or {
            "format": 1,
            "name": config.name,
            "attempts": [],
            "diffs": {},
            "peak_flops": {},
        }
        if record["attempts"] and record["attempts"][-1]["stopped"] is None:
            record["attempts"][-1] |= {"reason": "killed: no stop was recorded"}
        commit, diff = code_state()
        digest = hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else None
        if digest:
            record["diffs"][digest] = diff
        record["attempts"].append(
            {
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
                "free_keys": {key: _at(config.model_dump(mode="json"), key) for key in FREE_KEYS},
                "commit": commit,
                "diff": digest,
                "versions": {"python": platform.python_version()}
                | {name: _version(name) for name in PACKAGES},
            }
        )
        record["status"] = "running"
        run = cls(path, lock, record)
        run._save()
        return run

    def started(
        self,
        step: int,
        *,
        device: str,
        processor: str | None,
        arithmetic: str,
        initial_weights: str | None,
    ) -> None:
        """This attempt goes on from `step`; at step 0 from weights of that digest, None: drawn ones.
        `processor`, `arithmetic`: as in pretrain/train/arithmetic.py."""
        self.record["attempts"][-1] |= {
            "from_step": step,
            "device": device,
            "processor": processor,
            "arithmetic": arithmetic,
            "initial_weights": initial_weights,
        }
        self._save()

    def keep_peak(self, key: str, flops: float) -> None:
        """Keep a measured peak: one number for all attempts, so that MFU does not change with a restart."""
        self.record["peak_flops"][key] = flops
        self._save()

    def close(self, *, status: str, reason: str, exit_code: int, step: int | None) -> None:
        """End the attempt (status: done, stopped or failed) and let go of the lock."""
        stop = {"stopped": _now(), "reason": reason, "exit_code": exit_code, "to_step": step}
        self.record["attempts"][-1] |= stop
        self.record["status"] = status
        self._save()
        self._lock.release()

    def _save(self) -> None:
        write_json(self.path / RECORD, self.record)


def check_writable(config: RunConfig) -> None:
    """Raise ConfigError now, before ranks are started, if this process could not write the run directory."""
    _lock(config.run_dir).release()


def _lock(path: Path) -> "_Lock":
    try:
        for folder in (path, path / LOGS, path / CHECKPOINTS):
            folder.mkdir(parents=True, exist_ok=True)
        return _Lock(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error}; set runs_dir=... to a folder that can"
        ) from None


class _Lock:
    """A POSIX record lock: the kernel drops it with its process, however that dies, so none is ever stale.

    (flock would pass to forked processes and outlive a killed rank.) The file says who holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / LOCK
        self._file = path.open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise ConfigError(
                    f"{run_dir} is in use by {holder}; a run directory has one writer: "
                    "wait for it, stop it, or give this run another name=..."
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self._file.close()
                raise
            print(f"{path}: no locks on this file system; two writers would go unnoticed", file=sys.stderr)
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()


def _read_record(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):  # the latter: check_writable says it better
        return {}
    except ValueError as error:
        raise ConfigError(f"{run_dir / RECORD}: not valid JSON ({error}); was it edited?") from None


def code_state() -> tuple[str | None, str]:
    """(commit, diff against it) of the checkout that this code runs from; (None, "") outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", here.parent, *arguments), capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            return None
        return done.stdout if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # installed inside somebody else's repository
        return None, ""
    return (git("rev-parse", "HEAD") or "").strip() or None, git("diff", "HEAD") or ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _show(value: Any) -> str:
    return "(absent)" if value is None else json.dumps(value)
