"""Saving a run while it goes on: training waits for a copy in host memory, a thread of each rank does more.

The threads use no collective: each leaves a report file beside what it wrote, and rank 0's waits for all of
them, writes the manifest and renames the folder into place. Killed at any moment, what is there is whole.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

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
    shard_file,
    sync,
    synced_file_digest,
    write_json,
)
from pretrain.checkpoint.random_states import random_states
from pretrain.checkpoint.rank_errors import error_text, on_all_ranks, on_rank_0
from pretrain.checkpoint.shards import HostCopy, merge, write_shard

_PACKAGES = ("torch", "deepspeed", "megatron-core", "motley", "numpy")
_GRACE_S = 60.0
"""How long a rank that ends with an error lets its unfinished save go on: others may be gone for good."""
_POLL_S = 0.02


@dataclass
class _Save:
    """A save under way on this rank."""

    path: Path
    saving: Path
    """The folder that becomes `path`."""
    state: str
    manifest: dict[str, Any]
    fragments: Sequence[Fragment]
    random: dict[str, Any]
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's share is on disk, or `error` says why not."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Another rank failed: its report will not come."""
    error: str | None = None
    began: float = field(default_factory=time.monotonic)


class CheckpointWriter:
    """Saves into a run's folder, one at a time. Leaving its context waits for the last."""

    def __init__(self, folder: Path, engine: Engine, world: World, *, keep: int) -> None:
        """`keep`: whole checkpoints that stay."""
        self._folder, self._engine, self._world, self._keep = folder, engine, world, keep
        self._host = HostCopy()
        self._running: tuple[_Save, threading.Thread] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._running is not None:
            self._running[1].join(_GRACE_S)

    def save(self, step: int, state: Any) -> Path:
        """Begin the checkpoint of `step`, once the one before is finished; returns its path to be.

        All ranks call it. `state` is any JSON value, equal on all ranks; rank 0's is stored. A checkpoint of
        this step that is already there is left as it is: the same step of the same run. Raises
        CheckpointError on all ranks where this save cannot begin or the last one failed; the checkpoints
        before it are then untouched, and nothing of it is left.
        """
        self.wait()
        path = checkpoint_path(self._folder, step)
        if self._world.broadcast(path.exists()):
            return path
        save = _Save(
            path,
            self._folder / f"{SAVING}{path.name}",
            json.dumps({"step": step, "state": state}, indent=1),
            {"format": FORMAT, "step": step, "optimizer": self._optimizer()},
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
        return path

    def wait(self) -> None:
        """Return when the last save is finished. All ranks call it; raises CheckpointError on all of them."""
        if self._running is None:
            return
        (save, thread), self._running = self._running, None
        save.written.wait()
        try:
            self._agree(save)  # now no rank writes any more
        except CheckpointError:
            save.abandoned.set()
            thread.join()
            self._remove(save)
            raise
        thread.join()
        self._agree(save)

    def _optimizer(self) -> dict[str, Any]:
        return {"name": self._engine.optimizer.name, "counters": self._engine.counters()}

    def _remove(self, save: _Save) -> None:
        if self._world.rank == 0:
            shutil.rmtree(save.saving, ignore_errors=True)
        self._world.barrier()

    def _agree(self, save: _Save) -> None:
        for error in self._world.gather(save.error):
            if error is not None:
                raise CheckpointError(error)

    def _write(self, save: _Save) -> None:
        """The thread of a save."""
        try:
            self._write_share(save)
        except Exception as error:  # reported by `wait`, on every rank
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
        rank, folder = self._world.rank, save.saving
        tensors = write_shard(folder, rank, save.fragments)
        torch.save(save.random, folder / rng_file(rank))
        names = [shard_file(rank), rng_file(rank)]
        if rank == 0:
            (folder / STATE).write_text(save.state + "\n")
            names.append(STATE)
        report = {"files": {name: synced_file_digest(folder / name) for name in names}, "tensors": tensors}
        unfinished = folder / f"{report_file(rank)}.tmp"
        unfinished.write_text(json.dumps(report))
        unfinished.rename(folder / report_file(rank))

    def _reports(self, save: _Save) -> list[dict[str, Any]] | None:
        """The shares of the manifest of all ranks, when they are there; None if one failed."""
        folder = (save.saving / report_file(0)).parent
        while len(found := sorted(folder.glob("*.json"))) < self._world.world_size:
            if save.abandoned.wait(_POLL_S):
                return None
        return [json.loads(file.read_text()) for file in found]


def _finish(save: _Save, reports: Sequence[dict[str, Any]]) -> None:
    """Turn the folder, in which every rank's files are on disk, into a checkpoint."""
    shutil.rmtree((save.saving / report_file(0)).parent)
    manifest = save.manifest | {
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "files": dict(sorted(entry for report in reports for entry in report["files"].items())),
        "tensors": merge([report["tensors"] for report in reports]),
        # What a stop has to wait for: `motley submit` holds the lead time of its signal against it.
        "seconds": round(time.monotonic() - save.began, 3),
    }
    write_json(save.saving / MANIFEST, manifest)
    for directory in (*(part for part in save.saving.rglob("*") if part.is_dir()), save.saving):
        sync(directory)
    os.rename(save.saving, save.path)
    sync(save.path.parent)


def _failure(path: Path) -> str:
    return f"checkpoint {path} cannot be written"
