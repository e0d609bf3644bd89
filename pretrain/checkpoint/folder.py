"""The files of checkpoints: listing, checking, removing and quarantining them.

checkpoints/step_00000500/       a whole checkpoint; it is renamed to this when all files are on disk
    engine/rank_00000.safetensors  a rank's fragments of logical tensors: NAME/parameter, and NAME/exp_avg
                                 and so on, by the names of the optimizer's states
    rng/rank_00000.pt            a rank's states of random-number generators
    state.json                   step, and the state of the training loop
    manifest.json                size and SHA-256 of every file above; shape, digests and ranges of every
                                 logical tensor; name and counters of the optimizer; identity of the run
                                 (pretrain/run_identity.py); layout, versions, seconds that the save took; and
                                 a SHA-256 of all this
checkpoints/saving.step_.../     a checkpoint that is being written, or whose writer was killed
    reports/rank_00000.json      a rank's share of the manifest, written when its files are on disk
checkpoints/removing.step_.../   a checkpoint that is being removed
checkpoints/step_....corrupt/    a corrupt checkpoint, quarantined at a resume

The newest checkpoint is the one with the highest step; there is no pointer that could disagree. All ranks see
the same folder. This module imports no torch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files.os_errors import naming

FORMAT = 4
"""Format 3, which is read too, lacks "run" and "sha256", which all later formats keep. Format 2, which is
read too, has "adam_step" where 3 has "optimizer": {"name", "counters"}."""
MANIFEST, STATE = "manifest.json", "state.json"
SAVING, CORRUPT = "saving.", ".corrupt"
_REMOVING = "removing."


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the message says which, why, and what is left."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, oldest first; some may be corrupt."""
    result = []
    for path in folder.glob("step_*") if folder.is_dir() else ():
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and path.is_dir():
            result.append((int(digits), path))
    return sorted(result)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def rng_file(rank: int) -> str:
    """Name, in a checkpoint, of a rank's random-number states."""
    return f"rng/rank_{rank:05d}.pt"


def shard_file(rank: int) -> str:
    """Name, in a checkpoint, of a rank's tensors."""
    return f"engine/rank_{rank:05d}.safetensors"


def report_file(rank: int) -> str:
    """Name, in a checkpoint that is being written, of a rank's share of the manifest."""
    return f"reports/rank_{rank:05d}.json"


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with "sha256", a digest of all its other values."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    content = json.dumps(values, sort_keys=True)
    return values | {"sha256": hashlib.sha256(content.encode()).hexdigest()}


def read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(manifest, []), or ({}, problems). Raises CheckpointError for a manifest of another format."""
    try:
        with naming(path / MANIFEST):
            manifest = json.loads((path / MANIFEST).read_text())
        # The digest comes before the format, so a changed digit cannot make it one of an older format.
        if "sha256" in manifest and seal(manifest) != manifest:
            return {}, [f"{MANIFEST}: its content has changed (SHA-256 differs)"]
        manifest = _of_this_format(manifest)
        version, step = manifest["format"], manifest["step"]
        whole = version != FORMAT or (
            all({"bytes", "sha256"} <= entry.keys() for entry in manifest["files"].values())
            and STATE in manifest["files"]
            and {"tensors", "optimizer", "layout", "run", "sha256"} <= manifest.keys()
        )
    except FileNotFoundError:
        return {}, [f"{MANIFEST}: missing"]
    except IsADirectoryError:
        return {}, [f"{MANIFEST}: is a folder"]
    except ValueError as error:
        return {}, [f"{MANIFEST}: not valid JSON ({error})"]
    except (KeyError, TypeError, AttributeError):
        return {}, [f"{MANIFEST}: not a checkpoint's manifest"]
    if version != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} is of format {version}, this version reads 2 to {FORMAT}; "
            "resume with the version that wrote it"
        )
    if not whole or path.name != checkpoint_path(path.parent, step).name:
        return {}, [f"{MANIFEST}: not the manifest of {path.name}"]
    return manifest, []


def _of_this_format(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 2, which only AdamW wrote, or 3 as one of format 4; any other as it is."""
    if manifest["format"] == 2:
        updates = manifest["adam_step"]
        optimizer = {"name": "adamw", "counters": {"step": float(updates)} if updates else None}
        manifest = manifest | {"format": 3, "optimizer": optimizer}
    if manifest["format"] == 3:
        manifest = manifest | {"format": FORMAT, "run": None, "sha256": None}
    return manifest


def find_corruption(path: Path, share: slice = slice(None)) -> list[str]:
    """The problems of a share of a checkpoint's files, with their names; [] if there are none."""
    manifest, problems = read_manifest(path)
    files = list(manifest.get("files", {}).items())[share]
    return problems + [problem for name, entry in files for problem in _corruption_of_file(path, name, entry)]


def synced_file_digest(file: Path) -> dict[str, Any]:
    """The digest of a file for a manifest, after the file is synced to disk."""
    sync(file)
    return file_digest(file)


def file_digest(file: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file. It is not synced, which some read-only file systems refuse."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def quarantine(path: Path) -> Path:
    """Rename a corrupt checkpoint so that no run resumes from it; returns its new path."""
    aside, number = path.with_name(path.name + CORRUPT), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{CORRUPT}-{number}")
    return path.rename(aside)


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` whole checkpoints; returns the removed paths.

    A checkpoint is whole if all files of its manifest are there with their sizes. Others are neither counted
    nor removed.
    """
    assert keep >= 1, keep
    whole = [path for _, path in checkpoints(folder) if _is_complete(path)]
    removed = whole[:-keep]
    for path in removed:
        # The rename comes first, so an interrupted removal leaves no half checkpoint under a good name.
        removing = path.rename(path.with_name(_REMOVING + path.name))
        shutil.rmtree(removing)
    return removed


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing or removing. No other process may use the folder meanwhile."""
    for prefix in (SAVING, _REMOVING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _corruption_of_file(path: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    try:
        size = (path / name).stat().st_size
        if (path / name).is_dir():
            return [f"{name}: is a folder"]
        if size != entry["bytes"]:
            return [f"{name}: {size} bytes, should be {entry['bytes']}"]
        if _sha256(path / name) != entry["sha256"]:
            return [f"{name}: its content has changed (SHA-256 differs)"]
    except (FileNotFoundError, NotADirectoryError):
        # A training run may also have just removed it while `motley export` reads.
        return [f"{name}: missing"]
    return []


def _is_complete(path: Path) -> bool:
    try:
        manifest, _ = read_manifest(path)
        entries = manifest.get("files", {}).items()
        return bool(entries) and all((path / f).stat().st_size == entry["bytes"] for f, entry in entries)
    except (OSError, CheckpointError):
        return False


def _sha256(file: Path) -> str:
    with naming(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
