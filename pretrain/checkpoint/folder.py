"""Checkpoints as files: which there are, whether they are whole, how one is set aside or removed. No torch.

checkpoints/step_00000500/       renamed into place when all of it is on disk
    engine/rank_00000.safetensors  what a rank held of each logical tensor: NAME/parameter, and NAME/exp_avg
                                 and so on by the names of the optimizer's states
    rng/rank_00000.pt            random-number states of each rank
    state.json                   step, and whatever the loop wants back
    manifest.json                size and SHA-256 of every file above; of every logical tensor its shape, its
                                 digests, and which file holds which range of it; name and counters of the
                                 optimizer; layout, versions, seconds that the save took
checkpoints/saving.step_.../     being written; its writer was killed if it is still there at a start
    reports/rank_00000.json      that rank's share of the manifest, when its files are on disk
checkpoints/removing.step_.../   likewise, being removed
checkpoints/step_....corrupt/    found damaged at a resume, and passed over

The newest checkpoint is the one with the highest step: there is no pointer that could disagree with it. All
ranks see the same folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 3
"""Format 2, which is read too, has "adam_step" where 3 has "optimizer": {"name", "counters"}."""
MANIFEST, STATE = "manifest.json", "state.json"
SAVING, CORRUPT = "saving.", ".corrupt"
_REMOVING = "removing."


class CheckpointError(ValueError):
    """A checkpoint could not be written or read: says which, why, and what stands."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a run's folder, oldest first. Damaged ones may be among them."""
    found = []
    for path in folder.glob("step_*") if folder.is_dir() else ():
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and path.is_dir():
            found.append((int(digits), path))
    return sorted(found)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def rng_file(rank: int) -> str:
    """In a checkpoint."""
    return f"rng/rank_{rank:05d}.pt"


def shard_file(rank: int) -> str:
    """In a checkpoint."""
    return f"engine/rank_{rank:05d}.safetensors"


def report_file(rank: int) -> str:
    """In a checkpoint that is being written."""
    return f"reports/rank_{rank:05d}.json"


def read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(the manifest, what is wrong with it); {} if anything is. Raises CheckpointError for another format."""
    try:
        manifest = _of_this_format(json.loads((path / MANIFEST).read_text()))
        version, step = manifest["format"], manifest["step"]
        whole = version != FORMAT or (
            all({"bytes", "sha256"} <= entry.keys() for entry in manifest["files"].values())
            and STATE in manifest["files"]
            and {"tensors", "optimizer", "layout"} <= manifest.keys()
        )
    except FileNotFoundError:
        return {}, [f"{MANIFEST}: missing"]
    except ValueError as error:
        return {}, [f"{MANIFEST}: not valid JSON ({error})"]
    except (KeyError, TypeError, AttributeError):
        return {}, [f"{MANIFEST}: not a checkpoint's manifest"]
    if version != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} is of format {version}, this version reads 2 and {FORMAT}; "
            "resume with the version that wrote it"
        )
    if not whole or path.name != checkpoint_path(path.parent, step).name:
        return {}, [f"{MANIFEST}: not the manifest of {path.name}"]
    return manifest, []


def _of_this_format(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 2, which only AdamW wrote, as one of format 3; any other as it is."""
    if manifest["format"] != 2:
        return manifest
    updates = manifest["adam_step"]
    optimizer = {"name": "adamw", "counters": {"step": float(updates)} if updates else None}
    return manifest | {"format": FORMAT, "optimizer": optimizer}


def find_corruption(path: Path, share: slice = slice(None)) -> list[str]:
    """What is wrong with a share of a checkpoint's files, each problem naming its file; [] if nothing."""
    manifest, problems = read_manifest(path)
    files = list(manifest.get("files", {}).items())[share]
    return problems + [problem for name, entry in files for problem in _damage_of_file(path, name, entry)]


def synced_file_digest(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest. First brings the file to disk."""
    sync(file)
    return file_digest(file)


def file_digest(file: Path) -> dict[str, Any]:
    """What a file holds now. Reads only: some read-only file systems refuse to bring a file to disk."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither resumed from nor in the way. Returns its new path."""
    aside, number = path.with_name(path.name + CORRUPT), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{CORRUPT}-{number}")
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
    for prefix in (SAVING, _REMOVING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def write_json(path: Path, value: Any) -> None:
    """Write and bring to disk."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage_of_file(path: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    try:
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            return [f"{name}: {size} bytes, should be {entry['bytes']}"]
        if _sha256(path / name) != entry["sha256"]:
            return [f"{name}: its content has changed (SHA-256 differs)"]
    except FileNotFoundError:  # or just removed: a run that goes on prunes while `motley export` looks
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
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
