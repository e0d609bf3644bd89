"""Checkpoints of a run: whole or absent, checked on the way in, never all of them bad.

    checkpoints/step_00000500/       renamed into place when all of it is on disk
        engine/...                   parameters and optimizer state, all ranks
        rng/rank_00000.pt            random-number states of each rank
        state.json                   step, and whatever the loop wants back
        manifest.json                size and SHA-256 of every file above, layout, versions
    checkpoints/saving.step_.../     being written; its writer was killed if it is still there at a start
    checkpoints/removing.step_.../   likewise, being removed
    checkpoints/step_....corrupt/    found damaged at a resume, and passed over

The newest checkpoint is the one with the highest step: there is no pointer that could disagree with it. All
ranks see the same folder.
"""

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.engine import Engine
from parallel.world import World

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_SAVING, _REMOVING, _CORRUPT = "saving.", "removing.", ".corrupt"
_UNTOUCHED = "Other checkpoints are untouched"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "motley", "numpy")


class CheckpointError(ValueError):
    """A checkpoint could not be written or read: says which, why, and what stands."""


@dataclass(frozen=True)
class Restored:
    """Where a run goes on."""

    step: int
    state: Any
    """What `save` was given."""
    path: Path


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a run's folder, oldest first. Damaged ones may be among them."""
    found = []
    for path in folder.glob("step_*") if folder.is_dir() else ():
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and path.is_dir():
            found.append((int(digits), path))
    return sorted(found)


def save(folder: Path, step: int, state: Any, engine: Engine, world: World, *, keep: int) -> Path:
    """Write the checkpoint of `step` and prune to the newest `keep`. All ranks call it and return together.

    `state` is any JSON value, equal on all ranks; rank 0's is stored. A checkpoint of this step that is
    already there is left as it is: the same step of the same run. Raises CheckpointError where it cannot be
    written; the checkpoints before it are then untouched, and nothing of it is left.
    """
    path = folder / f"step_{step:08d}"
    if world.broadcast(path.exists()):
        return path
    saving = folder / f"{_SAVING}{path.name}"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(saving, ignore_errors=True)
        (saving / "rng").mkdir(parents=True)

    def write_own() -> None:
        torch.save(_rng_states(), saving / "rng" / f"rank_{world.rank:05d}.pt")
        if world.rank == 0:
            _write_json(saving / STATE, {"step": step, "state": state})

    def finish() -> None:
        manifest = {"format": FORMAT, "step": step, "files": files, "layout": dict(engine.layout)}
        manifest["versions"] = {name: metadata.version(name) for name in _PACKAGES}
        _write_json(saving / MANIFEST, manifest)
        for directory in (*(part for part in saving.rglob("*") if part.is_dir()), saving):
            _sync(directory)
        os.rename(saving, path)
        _sync(folder)

    failure = f"checkpoint {path} cannot be written"
    try:
        _on_rank_0(world, begin, failure)
        try:
            engine.save(saving)
        except Exception as error:
            # No collective here: other ranks may wait inside the engine, where no message reaches them. This
            # process ends with the error, and whoever started the ranks ends the others.
            shutil.rmtree(saving, ignore_errors=True)
            raise CheckpointError(f"{failure} (rank {world.rank}): {error}. {_UNTOUCHED}") from error
        _on_all_ranks(world, write_own, failure)
        shares = _on_all_ranks(world, lambda: _hash_share(saving, world), failure)
        files = dict(sorted(item for share in shares for item in share.items()))
        _on_rank_0(world, finish, failure)
    except CheckpointError:
        if world.rank == 0:
            shutil.rmtree(saving, ignore_errors=True)
        raise
    _on_rank_0(world, lambda: prune(folder, keep), f"checkpoints before {path} cannot be removed")
    return path


def restore(folder: Path, engine: Engine, world: World) -> Restored | None:
    """Load the newest good checkpoint into the engine; None if the folder holds none. All ranks call it.

    First removes what a killed run left half-written. A damaged checkpoint is named on stderr, renamed to
    `.corrupt` and passed over for the one before. Raises CheckpointError if all are damaged (rather than
    start the run over unasked) or one cannot be read, and LayoutMismatch for one of another layout.
    """
    _on_rank_0(
        world, lambda: remove_leftovers(folder), f"unfinished checkpoints in {folder} cannot be removed"
    )
    for step, path in reversed(world.broadcast(checkpoints(folder))):
        shares = _on_all_ranks(world, partial(_damage, path, world), f"checkpoint {path} cannot be read")
        if problems := [problem for share in shares for problem in share]:
            _on_rank_0(world, partial(_pass_over, path, problems), f"{path} cannot be renamed")
            continue
        engine.load(path)
        rng = path / "rng" / f"rank_{world.rank:05d}.pt"
        _set_rng_states(torch.load(rng, weights_only=True))
        return Restored(step, json.loads((path / STATE).read_text())["state"], path)
    damaged = world.broadcast(sorted(path.name for path in folder.glob(f"step_*{_CORRUPT}*")))
    if damaged:
        raise CheckpointError(
            f"{folder} holds no good checkpoint, only damaged ones: {', '.join(damaged)}. Mend one and take "
            f'"{_CORRUPT}" off its name, or remove them to start this run over at step 0'
        )
    return None


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, each problem naming its file; [] if nothing. Reads all of it."""
    manifest, problems = _read_manifest(path)
    return problems + [p for name, entry in manifest.items() for p in _damage_of_file(path, name, entry)]


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither resumed from nor in the way. Returns its new path."""
    aside, number = path.with_name(path.name + _CORRUPT), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{_CORRUPT}-{number}")
    return path.rename(aside)


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` whole checkpoints; returns what was removed.

    Whole: every file of the manifest is there in its size. One that is not counts neither as kept nor as
    removable.
    """
    assert keep >= 1, keep
    whole = [path for _, path in checkpoints(folder) if _is_complete(path)]
    removed = whole[:-keep]
    for path in removed:
        # Renamed first: a removal that is cut short leaves no half checkpoint under a good name.
        removing = path.rename(path.with_name(_REMOVING + path.name))
        shutil.rmtree(removing)
    return removed


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing or removing. Only while no other process uses the folder."""
    for prefix in (_SAVING, _REMOVING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def _on_all_ranks(world: World, work: Callable[[], Any], failure: str) -> list[Any]:
    """Do the work on every rank; returns what each returned, in rank order. Where one fails, all raise."""
    result, error = None, None
    try:
        result = work()
    except (OSError, RuntimeError, ValueError) as caught:  # RuntimeError: torch.save's when a disk is full
        error = caught
    mine = None if error is None else f"{failure} (rank {world.rank}): {error}. {_UNTOUCHED}"
    outcomes = world.gather((result, mine))
    for _, message in outcomes:
        if message is not None:
            raise CheckpointError(message) from error
    return [result for result, _ in outcomes]


def _on_rank_0(world: World, work: Callable[[], Any], failure: str) -> None:
    """Do the work on rank 0. Where it fails, all ranks raise."""
    _on_all_ranks(world, work if world.rank == 0 else lambda: None, failure)


def _hash_share(path: Path, world: World) -> dict[str, dict[str, Any]]:
    """This rank's share of the files, each brought to disk: name -> {"bytes", "sha256"}."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    entries = {}
    for name in names[world.rank :: world.world_size]:
        _sync(path / name)
        entries[name] = {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)}
    return entries


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damage(path: Path, world: World) -> list[str]:
    """What is wrong with this rank's share of the files; rank 0 speaks for the manifest."""
    manifest, problems = _read_manifest(path)
    if problems:
        return problems if world.rank == 0 else []
    share = list(manifest.items())[world.rank :: world.world_size]
    return [problem for name, entry in share for problem in _damage_of_file(path, name, entry)]


def _damage_of_file(path: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    try:
        size = (path / name).stat().st_size
    except FileNotFoundError:
        return [f"{name}: missing"]
    if size != entry["bytes"]:
        return [f"{name}: {size} bytes, should be {entry['bytes']}"]
    if _sha256(path / name) != entry["sha256"]:
        return [f"{name}: its content has changed (SHA-256 differs)"]
    return []


def _pass_over(path: Path, problems: Sequence[str]) -> None:
    aside = set_aside(path)
    print(
        f"motley: checkpoint {path} is damaged and passed over (now {aside.name}): {'; '.join(problems)}",
        file=sys.stderr,
        flush=True,
    )


def _read_manifest(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(entries of the files, what is wrong with the manifest itself)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        whole = all({"bytes", "sha256"} <= entry.keys() for entry in files.values()) and STATE in files
    except FileNotFoundError:
        return {}, [f"{MANIFEST}: missing"]
    except ValueError as error:
        return {}, [f"{MANIFEST}: not valid JSON ({error})"]
    except (KeyError, TypeError, AttributeError):
        return {}, [f"{MANIFEST}: not a checkpoint's manifest"]
    if version != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} is of format {version}, this version reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    if not whole or path.name != f"step_{step:08d}":
        return {}, [f"{MANIFEST}: not the manifest of {path.name}"]
    return files, []


def _is_complete(path: Path) -> bool:
    try:
        files, problems = _read_manifest(path)
        return not problems and all((path / f).stat().st_size == entry["bytes"] for f, entry in files.items())
    except (OSError, CheckpointError):
        return False


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Bring a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
