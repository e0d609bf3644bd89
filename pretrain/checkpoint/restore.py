"""Restoring a run from its newest good checkpoint, on any layout.

Files are checked against the manifest before anything is loaded. The parameters and optimizer states that are
then in the engine are checked again, by the digest of every logical tensor.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parallel.digest import MODULUS, digests
from parallel.engine import Engine
from parallel.fragments import Fragment
from parallel.world import World
from pretrain.checkpoint.folder import (
    CORRUPT,
    STATE,
    CheckpointError,
    checkpoints,
    find_corruption,
    quarantine,
    read_manifest,
    remove_leftovers,
    rng_file,
)
from pretrain.checkpoint.random_states import set_random_states
from pretrain.checkpoint.rank_errors import on_all_ranks, on_rank_0
from pretrain.checkpoint.shards import ShardReader, TensorEntries
from pretrain.run_identity import RunIdentity, check_origin


@dataclass(frozen=True)
class Restored:
    """The point at which a run continues."""

    step: int
    state: Any
    """The state that `save` was given."""
    path: Path


def restore(folder: Path, engine: Engine, world: World, run: RunIdentity | None = None) -> Restored | None:
    """Load the newest good checkpoint into the engine; None if the folder holds none. All ranks call it.

    Half-written checkpoints of a killed run are removed first. A corrupt checkpoint is named on stderr,
    renamed to `.corrupt`, and the one before it is tried. Raises CheckpointError if all are corrupt (the run
    must not silently start over), if one cannot be read, or if the engine then holds other values than were
    saved. Raises ConfigError if the newest good one is not a checkpoint of `run`.
    """
    on_rank_0(
        world, lambda: remove_leftovers(folder), f"unfinished checkpoints in {folder} cannot be removed"
    )
    for step, path in reversed(world.broadcast(checkpoints(folder))):
        share = slice(world.rank, None, world.world_size)
        shares = on_all_ranks(
            world, partial(find_corruption, path, share), f"checkpoint {path} cannot be read"
        )
        if problems := list(dict.fromkeys(problem for share in shares for problem in share)):
            on_rank_0(world, partial(_quarantine, path, problems), f"{path} cannot be renamed")
            continue
        manifest, _ = read_manifest(path)
        if run is not None:
            check_origin(path, manifest["run"], run)
            if manifest["run"] is None and world.rank == 0:
                _say(f"checkpoint {path} is of an earlier version and does not name its run; later ones do")
        _load(path, manifest, engine, world)
        if manifest["layout"] == engine.layout:
            set_random_states(torch.load(path / rng_file(world.rank), weights_only=True))
        return Restored(step, json.loads((path / STATE).read_text())["state"], path)
    damaged = world.broadcast(sorted(path.name for path in folder.glob(f"step_*{CORRUPT}*")))
    if damaged:
        raise CheckpointError(
            f"{folder} holds no good checkpoint, only damaged ones: {', '.join(damaged)}. Mend one and take "
            f'"{CORRUPT}" off its name, or remove them to start this run over at step 0'
        )
    return None


def _load(path: Path, manifest: Mapping[str, Any], engine: Engine, world: World) -> None:
    """Load the tensors into the engine and check their digests."""
    tensors = manifest["tensors"]
    failure = f"checkpoint {path} cannot be loaded"
    saved, ours = manifest["optimizer"], engine.optimizer.name
    if saved["name"] != ours:
        raise CheckpointError(
            f"{failure}: it holds the states of optimizer {saved['name']}, and this run has {ours}; go on "
            f"with {saved['name']}, or start a new run"
        )

    def read(fragments: Sequence[Fragment]) -> None:
        with ShardReader(path, tensors) as reader:
            for fragment in fragments:
                reader.fill(fragment)

    def fill(fragments: Sequence[Fragment]) -> None:
        on_all_ranks(world, partial(read, fragments), failure)

    engine.load(saved["counters"], fill)
    if wrong := _differences(tensors, engine.fragments(), world):
        raise CheckpointError(
            f"{failure}: what then stands in memory is not what was saved, though the files are good: "
            + "; ".join(wrong)
        )


def _differences(tensors: TensorEntries, fragments: Sequence[Fragment], world: World) -> list[str]:
    """Names of the logical tensors, or copies, whose digest over all ranks is not the manifest's."""
    own = {(f.name, kind, f.replica): d for f in fragments for kind, d in digests(f).items()}
    totals: dict[tuple[str, str, int], int] = {}
    for share in world.gather(own):
        for key, part in share.items():
            totals[key] = (totals.get(key, 0) + part) % MODULUS
    saved = {(n, kind): int(d, 16) for n, entry in tensors.items() for kind, d in entry["digest"].items()}
    in_memory = {(name, kind) for name, kind, _ in totals}
    wrong = [f"{kind} of {name} is in no rank's memory" for name, kind in saved.keys() - in_memory]
    wrong += [f"{kind} of {n} (copy {c})" for (n, kind, c), d in totals.items() if d != saved.get((n, kind))]
    return sorted(wrong)


def _quarantine(path: Path, problems: Sequence[str]) -> None:
    """Quarantine a corrupt checkpoint and say so on stderr."""
    aside = quarantine(path)
    _say(f"checkpoint {path} is damaged and passed over (now {aside.name}): {'; '.join(problems)}")


def _say(text: str) -> None:
    print(f"motley: {text}", file=sys.stderr, flush=True)
