"""Asynchronous saving: training waits only for a copy in host memory, which a thread of every rank writes.

The threads use no collective. Every thread leaves a report file beside the files that it wrote; the thread of
rank 0 waits for all reports, writes the manifest and renames the folder into place. However the process dies,
every folder under its final name is a whole checkpoint.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data_pipeline.files.atomic import write_json
from parallel.engine import Engine
from parallel.fragments import Fragment
from parallel.world import World
from pretrain.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    SAVING,
    STATE,
    CheckpointError,
    checkpoint_path,
    prune,
    report_file,
    rng_file,
    seal,
    shard_file,
    sync,
    synced_file_digest,
)
from pretrain.checkpoint.random_states import random_states
from pretrain.checkpoint.rank_errors import error_text, on_all_ranks, on_rank_0
from pretrain.checkpoint.shards import HostCopy, merge, write_shard
from pretrain.run_identity import RunIdentity

_PACKAGES = ("torch", "deepspeed", "megatron-core", "motley", "numpy")
_GRACE_S = 60.0
"""How long a rank that ends with an error waits for its unfinished save: other ranks may be gone."""
_POLL_S = 0.02


@dataclass
class _Save:
    """A save in progress on this rank."""

    path: Path
    saving: Path
    """The folder that becomes `path`."""
    state: str
    manifest: dict[str, Any]
    fragments: Sequence[Fragment]
    random: dict[str, Any]
    written: threading.Event = field(default_factory=threading.Event)
    """Set when this rank's share is on disk, or when `error` says why it is not."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when another rank has failed and its report will not come."""
    error: str | None = None
    began: float = field(default_factory=time.monotonic)


class CheckpointWriter:
    """The writer of a run's checkpoints, one at a time. Leaving its context waits for the last save."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        world: World,
        *,
        keep: int,
        stop_on_failure: bool = True,
        run: RunIdentity | None = None,
    ) -> None:
        """`keep`: the number of whole checkpoints that are kept. `stop_on_failure`: whether a failed save
        raises CheckpointError at once; if not, stderr says so, and it is raised if no later save succeeds.
        `run`: the run that the checkpoints belong to."""
        self._folder, self._engine, self._world, self._keep = folder, engine, world, keep
        self._run = None if run is None else run.to_json()
        self._stop_on_failure = stop_on_failure
        self._failed: CheckpointError | None = None
        """The error of the last save, if it failed and training went on."""
        self._host = HostCopy()
        self._running: tuple[_Save, threading.Thread] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            if self._failed is not None:
                raise self._failed
        elif self._running is not None:
            self._running[1].join(_GRACE_S)

    def save(self, step: int, state: Any) -> Path:
        """Begin the checkpoint of `step` when the previous save is finished; returns its future path.

        All ranks call it. `state` is any JSON value, equal on all ranks, of which rank 0's is stored. An
        existing checkpoint of this step is kept, because it is the same step of the same run. Raises
        CheckpointError on all ranks if this save cannot begin or the previous one failed; earlier checkpoints
        are then untouched, and nothing of this one is left.
        """
        self.wait()
        path = checkpoint_path(self._folder, step)
        try:
            self._begin(path, step, state)
        except CheckpointError as error:
            self._go_on_or_raise(error)
        return path

    def _begin(self, path: Path, step: int, state: Any) -> None:
        """Copy what is saved and start the thread that writes it. Raises CheckpointError on all ranks."""
        if self._world.broadcast(path.exists()):
            return
        save = _Save(
            path,
            self._folder / f"{SAVING}{path.name}",
            json.dumps({"step": step, "state": state}, indent=1),
            {"format": FORMAT, "step": step, "run": self._run, "optimizer": self._optimizer()},
            [],
            random_states(),
        )
        save.manifest["layout"] = dict(self._engine.layout)

        def begin() -> None:
            shutil.rmtree(save.saving, ignore_errors=True)
            for file in (shard_file(0), rng_file(0), report_file(0)):
                (save.saving / file).parent.mkdir(parents=True)

        def copy() -> None:
            save.fragments = self._host.take(self._engine.fragments())

        try:
            on_rank_0(self._world, begin, _failure(path))
            on_all_ranks(self._world, copy, _failure(path))
        except CheckpointError:
            self._remove(save)
            raise
        thread = threading.Thread(target=self._write, args=(save,), name=f"write {path.name}", daemon=True)
        self._running = save, thread
        thread.start()

    def wait(self) -> None:
        """Wait until the last save is finished. All ranks call it.

        If it failed, all raise CheckpointError, unless failures do not stop the run.
        """
        try:
            if self._running is not None:
                self._wait_for_running()
                self._failed = None
        except CheckpointError as error:
            self._go_on_or_raise(error)

    def _go_on_or_raise(self, error: CheckpointError) -> None:
        """After a failed save: raise its error, or keep it and say that training goes on."""
        if self._stop_on_failure:
            raise error
        self._failed = error
        if self._world.rank == 0:
            print(
                f"motley: WARNING: {error}. Training goes on (on_failed_save = warn); until a "
                "later save succeeds, steps since the checkpoint before it can be lost",
                file=sys.stderr,
                flush=True,
            )

    def _wait_for_running(self) -> None:
        assert self._running is not None
        (save, thread), self._running = self._running, None
        save.written.wait()
        try:
            self._raise_errors(save)  # no rank writes its share any more
        except CheckpointError:
            save.abandoned.set()
            thread.join()
            self._remove(save)
            raise
        thread.join()
        self._raise_errors(save)

    def _optimizer(self) -> dict[str, Any]:
        return {"name": self._engine.optimizer.name, "counters": self._engine.counters()}

    def _remove(self, save: _Save) -> None:
        """Remove the files of a failed save. All ranks call it."""
        if self._world.rank == 0:
            shutil.rmtree(save.saving, ignore_errors=True)
        self._world.barrier()

    def _raise_errors(self, save: _Save) -> None:
        """Raise CheckpointError on all ranks if the save failed on one."""
        for error in self._world.gather(save.error):
            if error is not None:
                raise CheckpointError(error)

    def _write(self, save: _Save) -> None:
        """Write the checkpoint; this is the function of a save's thread."""
        try:
            self._write_share(save)
        except Exception as error:  # `wait` raises it on every rank
            save.error = error_text(self._world, _failure(save.path), error)
        finally:
            save.written.set()
        if self._world.rank != 0 or save.error is not None:
            return
        failure = _failure(save.path)
        try:
            reports = self._reports(save)
            if reports is None:
                return
            _finish(save, reports)
            failure = f"checkpoints before {save.path} cannot be removed"
            prune(self._folder, self._keep)
        except Exception as error:
            save.error = error_text(self._world, failure, error)
            shutil.rmtree(save.saving, ignore_errors=True)

    def _write_share(self, save: _Save) -> None:
        """Write this rank's files, then its report."""
        rank, folder = self._world.rank, save.saving
        tensors = write_shard(folder, rank, save.fragments)
        torch.save(save.random, folder / rng_file(rank))
        names = [shard_file(rank), rng_file(rank)]
        if rank == 0:
            (folder / STATE).write_text(save.state + "\n")
            names.append(STATE)
        report = {"files": {name: synced_file_digest(folder / name) for name in names}, "tensors": tensors}
        write_json(folder / report_file(rank), report)

    def _reports(self, save: _Save) -> list[dict[str, Any]] | None:
        """Wait for the reports of all ranks and return them; None if a rank failed."""
        folder = (save.saving / report_file(0)).parent
        while len(files := sorted(folder.glob("*.json"))) < self._world.world_size:
            if save.abandoned.wait(_POLL_S):
                return None
        return [json.loads(file.read_text()) for file in files]


def _finish(save: _Save, reports: Sequence[dict[str, Any]]) -> None:
    """Write the manifest and rename the folder, in which all ranks' files are on disk, to a checkpoint."""
    shutil.rmtree((save.saving / report_file(0)).parent)
    manifest = save.manifest | {
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "files": dict(sorted(entry for report in reports for entry in report["files"].items())),
        "tensors": merge([report["tensors"] for report in reports]),
        # `motley submit` compares this with the time that Slurm gives a run to stop.
        "seconds": round(time.monotonic() - save.began, 3),
    }
    write_json(save.saving / MANIFEST, seal(manifest))
    for directory in (*(part for part in save.saving.rglob("*") if part.is_dir()), save.saving):
        sync(directory)
    os.rename(save.saving, save.path)
    sync(save.path.parent)


def _failure(path: Path) -> str:
    return f"checkpoint {path} cannot be written"
