"""Checkpoints with the real engine: whole or absent, damage named, never all of them bad."""

import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import RanksFailed, run_on_ranks
from parallel.zero_engine import ZeroEngine
from pretrain.checkpoint import (
    CheckpointError,
    Restored,
    checkpoints,
    prune,
    restore,
    save,
    set_aside,
    verify,
)
from tests.numerics.test_zero_equals_one_process import engine_of
from tests.numerics.toy import Toy, toy_step


def _start() -> tuple[world.World, ZeroEngine]:
    w = world.start(ParallelConfig())
    return w, engine_of(Toy(), w, 1)


def _train(engine: ZeroEngine, w: world.World, first: int, last: int) -> None:
    for step in range(first, last):
        engine.train_step(toy_step(step, dp_size=w.dp_size)[w.dp_rank], step)


def _save_every_step(folder: Path, last: int, keep: int) -> list[list[str]]:
    w, engine = _start()
    seen = []
    for step in range(1, last + 1):
        _train(engine, w, step - 1, step)
        save(folder, step, {"step": step, "tenth": 0.1}, engine, w, keep=keep)
        seen.append(sorted(path.name for path in folder.iterdir()))
    return seen


def _restore(folder: Path) -> tuple[Restored | str | None, str]:
    """(what restore gave, or its error; what it said on stderr)."""
    w, engine = _start()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            found = restore(folder, engine, w)
        except CheckpointError as error:
            return str(error), said.getvalue()
    return found, said.getvalue()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 3, 4, written by one rank; copy before changing."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    run_on_ranks(_save_every_step, 1, folder, 4, 3)
    return folder


@pytest.fixture
def copy(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _optimizer_file(path: Path) -> Path:
    return next(file for file in path.rglob("*optim_states.pt"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_newest_are_kept_and_whole(tmp_path: Path, world_size: int) -> None:
    folder = tmp_path / "runs" / "checkpoints"  # made by the first save
    seen = run_on_ranks(_save_every_step, world_size, folder, 4, 2)[0]
    assert seen == [
        ["step_00000001"],
        ["step_00000001", "step_00000002"],
        ["step_00000002", "step_00000003"],
        ["step_00000003", "step_00000004"],
    ]
    for step, path in checkpoints(folder):
        assert verify(path) == []
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["step"] == step
        assert manifest["layout"]["dp"] == world_size
        assert manifest["versions"]["torch"] == torch.__version__
        on_disk = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert on_disk == {*manifest["files"], "manifest.json"}
    found, said = run_on_ranks(_restore, world_size, folder)[-1]
    assert found == Restored(4, {"step": 4, "tenth": 0.1}, folder / "step_00000004")
    assert said == ""


def test_an_empty_folder_is_a_start(tmp_path: Path) -> None:
    assert run_on_ranks(_restore, 1, tmp_path / "absent") == [(None, "")]


@pytest.mark.parametrize(
    ("file", "damage", "complaint"),
    [
        (_optimizer_file, _truncate, "optim_states.pt: .* bytes, should be"),
        (_optimizer_file, _flip_a_bit, "optim_states.pt: its content has changed"),
        (_optimizer_file, Path.unlink, "optim_states.pt: missing"),
        (lambda path: path / "rng" / "rank_00000.pt", _flip_a_bit, "rank_00000.pt: its content has changed"),
        (lambda path: path / "manifest.json", _truncate, "manifest.json: not valid JSON"),
        (lambda path: path / "manifest.json", Path.unlink, "manifest.json: missing"),
        (
            lambda path: path / "manifest.json",
            lambda file: file.write_text("{}"),
            "not a checkpoint's manifest",
        ),
    ],
)
def test_a_damaged_newest_is_named_and_passed_over(
    copy: Path, file: Callable[[Path], Path], damage: Callable[[Path], Any], complaint: str
) -> None:
    damage(file(copy / "step_00000004"))
    found, said = run_on_ranks(_restore, 1, copy)[0]
    assert found == Restored(3, {"step": 3, "tenth": 0.1}, copy / "step_00000003")
    assert str(copy / "step_00000004") in said
    assert re.search(complaint, said), said
    assert sorted(path.name for path in copy.iterdir()) == [
        "step_00000002",
        "step_00000003",
        "step_00000004.corrupt",
    ]


def test_with_none_good_the_run_does_not_start_over_unasked(copy: Path) -> None:
    for step, path in checkpoints(copy):
        if step < 4:
            shutil.rmtree(path)
    _truncate(_optimizer_file(copy / "step_00000004"))
    for _ in range(2):  # nor at the next start
        found, _ = run_on_ranks(_restore, 1, copy)[0]
        assert isinstance(found, str)
        assert re.search(r"no good checkpoint, only damaged ones: step_00000004\.corrupt", found)


def test_setting_aside_twice_overwrites_nothing(copy: Path) -> None:
    first = set_aside(copy / "step_00000004")
    (copy / "step_00000003").rename(copy / "step_00000004")
    second = set_aside(copy / "step_00000004")
    assert (first.name, second.name) == ("step_00000004.corrupt", "step_00000004.corrupt-2")
    assert first.is_dir() and second.is_dir()


def test_another_format_is_refused_and_not_touched(copy: Path) -> None:
    manifest = copy / "step_00000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    found, _ = run_on_ranks(_restore, 1, copy)[0]
    assert isinstance(found, str) and "is of format 2, this version reads 1" in found
    assert (copy / "step_00000004").is_dir()


def test_prune_never_counts_a_damaged_one_as_kept(copy: Path) -> None:
    _optimizer_file(copy / "step_00000004").unlink()
    assert [path.name for path in prune(copy, 1)] == ["step_00000002"]
    assert [path.name for _, path in checkpoints(copy)] == ["step_00000003", "step_00000004"]


def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(copy: Path) -> None:
    (copy / "step_00000004").rename(copy / "saving.step_00000004")
    (copy / "step_00000002").rename(copy / "removing.step_00000002")
    found, said = run_on_ranks(_restore, 1, copy)[0]
    assert isinstance(found, Restored) and found.step == 3
    assert said == ""
    assert [path.name for path in copy.iterdir()] == ["step_00000003"]


def _save_with_small_files(folder: Path, limited_rank: int) -> str:
    """Save where the operating system refuses files above 4 kB on one rank, as a full disk would."""
    w, engine = _start()
    _train(engine, w, 0, 1)
    if w.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        save(folder, 5, {}, engine, w, keep=1)
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if w.world_size > 1:
            raise
        return str(error)
    return "saved"


def test_a_disk_that_takes_no_more_leaves_the_others_and_no_rubbish(copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    message = run_on_ranks(_save_with_small_files, 1, copy, 0)[0]
    assert re.search(r"step_00000005 cannot be written \(rank 0\).*Other checkpoints are untouched", message)
    assert sorted(copy.rglob("*")) == before
    assert all(verify(path) == [] for _, path in checkpoints(copy))


def test_a_disk_that_takes_no_more_on_one_rank_is_named_and_ends_the_run(copy: Path) -> None:
    with pytest.raises(RanksFailed, match=r"step_00000005 cannot be written \(rank 1\)"):
        run_on_ranks(_save_with_small_files, 2, copy, 1)
    assert [step for step, _ in checkpoints(copy)] == [2, 3, 4]
    assert all(verify(path) == [] for _, path in checkpoints(copy))


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RanksFailed, match=r"cannot be written \(rank 0\)"):
        run_on_ranks(_save_every_step, 2, tmp_path / "checkpoints", 1, 1)


def _save_until_killed(folder: Path, after_s: float) -> None:
    w, engine = _start()
    found = restore(folder, engine, w)
    step = found.step if found else 0
    # SIGALRM is not handled: the kernel ends the process wherever it is, in a write as well as between two.
    signal.setitimer(signal.ITIMER_REAL, after_s)
    while True:
        _train(engine, w, step, step + 1)
        step += 1
        save(folder, step, {"step": step}, engine, w, keep=2)


def test_killed_at_any_moment_what_is_there_is_whole(tmp_path: Path) -> None:
    steps = [0]
    # A step and its save take 30 ms and more, most of it the save: these are different places in it.
    for after_ms in (31, 47, 59, 73, 97, 131, 500):
        with pytest.raises(RanksFailed, match="died without an answer"):
            run_on_ranks(_save_until_killed, 1, tmp_path, after_ms / 1000)
        found = checkpoints(tmp_path)
        assert all(verify(path) == [] for _, path in found)
        steps.append(found[-1][0] if found else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 0, f"no save was finished: {steps}"


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _random_numbers(folder: Path, resume: bool) -> tuple[float, float, float]:
    w, engine = _start()
    if resume:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(999)
        restore(folder, engine, w)
        return _draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(10 + w.rank)
    _draw()
    _train(engine, w, 0, 1)
    save(folder, 1, None, engine, w, keep=1)
    return _draw()


def test_random_numbers_go_on_where_they_were_on_every_rank(tmp_path: Path) -> None:
    expected = run_on_ranks(_random_numbers, 2, tmp_path, False)
    assert run_on_ranks(_random_numbers, 2, tmp_path, True) == expected
    assert expected[0] != expected[1]


def _save_again(folder: Path) -> float:
    w, engine = _start()
    found = restore(folder, engine, w)
    assert found is not None
    save(folder, found.step, {"other": True}, engine, w, keep=3)
    return (found.path / "manifest.json").stat().st_mtime


def test_a_step_that_is_saved_is_not_written_again(copy: Path) -> None:
    before = (copy / "step_00000004" / "manifest.json").stat().st_mtime
    assert run_on_ranks(_save_again, 1, copy) == [before]
