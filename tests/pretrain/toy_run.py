"""A run of a few seconds that saves and restores: the toy module in the real engine."""

import contextlib
import io
from pathlib import Path

from parallel import world
from parallel.layout import ParallelConfig
from parallel.zero_engine import ZeroEngine
from pretrain.checkpoint.folder import CheckpointError
from pretrain.checkpoint.restore import Restored, restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.test_zero_equals_one_process import Stage, engine_of
from tests.numerics.toy import Toy, toy_step


def start(stage: Stage = 1) -> tuple[world.World, ZeroEngine]:
    w = world.start(ParallelConfig())
    return w, engine_of(Toy(), w, stage)


def train(engine: ZeroEngine, w: world.World, first: int, last: int) -> None:
    for step in range(first, last):
        engine.train_step(toy_step(step, dp_size=w.dp_size)[w.dp_rank], step)


def save_every_step(folder: Path, last: int, keep: int, stage: Stage = 1) -> list[list[str]]:
    """What is in the folder after each save is finished."""
    w, engine = start(stage)
    seen = []
    with CheckpointWriter(folder, engine, w, keep=keep) as writer:
        for step in range(1, last + 1):
            train(engine, w, step - 1, step)
            writer.save(step, {"step": step, "tenth": 0.1})
            writer.wait()
            seen.append(sorted(path.name for path in folder.iterdir()))
    return seen


def restored(folder: Path, stage: Stage = 1) -> tuple[Restored | str | None, str]:
    """(what restore gave, or its error; what it said on stderr)."""
    return restored_in(world.start(ParallelConfig()), folder, stage)


def restored_in(w: world.World, folder: Path, stage: Stage = 1) -> tuple[Restored | str | None, str]:
    """The same of ranks that have met."""
    engine, said = engine_of(Toy(), w, stage), io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            found = restore(folder, engine, w)
        except CheckpointError as error:
            return str(error), said.getvalue()
    return found, said.getvalue()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
