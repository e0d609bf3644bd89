"""Saving with the real engine: training goes on meanwhile, and what is there is whole or absent."""

import contextlib
import errno
import io
import json
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel import world
from parallel.testing import RanksFailed, run_on_ranks
from parallel.zero_engine import ZeroEngine
from pretrain.checkpoint import save
from pretrain.checkpoint.folder import CheckpointError, checkpoints, find_corruption
from pretrain.checkpoint.restore import Restored, restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.test_zero_equals_one_process import engine_of
from tests.numerics.toy import Toy
from tests.one_world import run_cases
from tests.pretrain.toy_run import restored, save_every_step, start, train


def test_the_newest_are_kept_and_whole(tmp_path: Path) -> None:
    """On two ranks; those of one are what test_restore.py begins with."""
    folder = tmp_path / "runs" / "checkpoints"  # made by the first save
    seen = run_on_ranks(save_every_step, 2, folder, 4, 2)[0]
    assert seen == [
        ["step_00000001"],
        ["step_00000001", "step_00000002"],
        ["step_00000002", "step_00000003"],
        ["step_00000003", "step_00000004"],
    ]
    for step, path in checkpoints(folder):
        assert find_corruption(path) == []
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["step"] == step
        assert manifest["optimizer"] == {"name": "adamw", "counters": {"step": float(step)}}
        assert manifest["layout"]["dp"] == 2
        assert manifest["versions"]["torch"] == metadata.version("torch")
        assert manifest["seconds"] > 0
        assert manifest["tensors"]["head.weight"]["shape"] == [5, 16]
        on_disk = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert on_disk == {*manifest["files"], "manifest.json"}
    found, said = run_on_ranks(restored, 2, folder)[-1]
    assert found == Restored(4, {"step": 4, "tenth": 0.1}, folder / "step_00000004")
    assert said == ""


def _with_an_engine(w: world.World, fn: Callable[..., Any], *args: Any) -> Any:
    return fn(w, engine_of(Toy(), w, 1), *args)


Saved = Callable[[str], tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def saved(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Name of one of CASES -> its folder, and what both ranks returned; all are run by the same two."""
    folders = {name: tmp_path_factory.mktemp("saved") / "checkpoints" for name in CASES}
    for name, folder in folders.items():
        if name.startswith("small files"):
            shutil.copytree(three, folder)
        else:
            folder.mkdir()
    cases = [(fn, folders[name], *further) for name, (fn, *further) in CASES.items()]
    found = dict(zip(CASES, run_cases(_with_an_engine, 2, cases), strict=True))
    return lambda name: (folders[name], found[name])


def _save_at_step_0(w: world.World, engine: ZeroEngine, folder: Path) -> list[str]:
    with CheckpointWriter(folder, engine, w, keep=1) as writer:
        writer.save(0, "none yet")
    return sorted({kind for fragment in engine.fragments() for kind in fragment.values})


def test_before_the_first_step_there_are_no_moments_to_save(saved: Saved) -> None:
    """A run that is told to stop before its first step saves too."""
    folder, ranks = saved("step 0")
    assert ranks == [["parameter"]] * 2
    found, _ = run_on_ranks(restored, 1, folder)[0]
    assert found == Restored(0, "none yet", folder / "step_00000000")


def _train_while_saving(
    w: world.World, engine: ZeroEngine, folder: Path
) -> tuple[list[str], list[str], dict[str, torch.Tensor]]:
    """Hold the thread back while training goes on; (folder meanwhile, and then; what was saved)."""
    train(engine, w, 0, 2)
    held, write_shard = threading.Event(), save.write_shard

    def waiting(*args):
        held.wait()
        return write_shard(*args)

    with (
        mock.patch.object(save, "write_shard", waiting),
        CheckpointWriter(folder, engine, w, keep=3) as writer,
    ):
        before = {f.name: f.values["parameter"].clone() for f in engine.fragments()}
        writer.save(2, {})
        train(engine, w, 2, 4)
        meanwhile = sorted(path.name for path in folder.iterdir())
        held.set()
        writer.save(4, {})  # after the first
        then = sorted(path.name for path in folder.iterdir() if path.name.startswith("step"))
    return meanwhile, then, before


def test_training_goes_on_while_it_is_written_and_the_next_save_waits(saved: Saved) -> None:
    folder, ranks = saved("while training")
    assert ranks[0][0] == ["saving.step_00000002"]
    assert "step_00000002" in ranks[0][1]
    assert [step for step, _ in checkpoints(folder)] == [2, 4]
    shutil.rmtree(folder / "step_00000004")
    loaded = run_on_ranks(_parameters_after_restore, 2, folder)
    for (_, _, saved), now in zip(ranks, loaded, strict=True):
        assert saved.keys() == now.keys()
        assert all(torch.equal(saved[name], now[name]) for name in saved)


def _parameters_after_restore(folder: Path) -> dict[str, torch.Tensor]:
    w, engine = start()
    restore(folder, engine, w)
    return {f.name: f.values["parameter"].clone() for f in engine.fragments()}


def _save_with_small_files(
    w: world.World, engine: ZeroEngine, folder: Path, limited_rank: int
) -> tuple[str, list[str]]:
    """Save where the operating system refuses files above 1 kB on one rank, as a full disk would; again."""
    train(engine, w, 0, 1)
    said = "saved"
    with CheckpointWriter(folder, engine, w, keep=4) as writer:
        if w.rank == limited_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        writer.save(5, {})
        try:
            writer.wait()
        except CheckpointError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = sorted(path.name for path in folder.iterdir())
        writer.save(6, {})
    return said, left


@pytest.mark.parametrize("limited", [0, 1])
def test_a_disk_that_takes_no_more_is_everybodys_error_and_leaves_the_others(
    saved: Saved, limited: int
) -> None:
    folder, ranks = saved(f"small files on rank {limited}")
    for message, left in ranks:
        assert re.search(
            rf"step_00000005 cannot be written \(rank {limited}\).*Other checkpoints are untouched", message
        )
        assert left == ["step_00000002", "step_00000003", "step_00000004"]
    # And once there is room again, the run can save.
    assert [step for step, _ in checkpoints(folder)] == [2, 3, 4, 6]
    assert all(find_corruption(path) == [] for _, path in checkpoints(folder))


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RanksFailed, match=r"cannot be written \(rank 0\)"):
        run_on_ranks(save_every_step, 2, tmp_path / "checkpoints", 1, 1)


def _save_without_memory(w: world.World, engine: ZeroEngine, folder: Path) -> tuple[str, list[str]]:
    with CheckpointWriter(folder, engine, w, keep=4) as writer:
        if w.rank == 1:
            engine.fragments = lambda: torch.empty(2**60)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            writer.save(1, {})
        except CheckpointError as error:
            return str(error), [path.name for path in folder.iterdir()]
    return "saved", []


def test_a_rank_without_memory_for_the_copy_is_everybodys_error(saved: Saved) -> None:
    for message, left in saved("without memory")[1]:
        assert re.search(r"step_00000001 cannot be written \(rank 1\): .*memory", message)
        assert left == []


def _save_where_nothing_can_be_renamed(w: world.World, engine: ZeroEngine, folder: Path) -> str:
    with CheckpointWriter(folder, engine, w, keep=4) as writer:
        writer.save(1, {})
        (folder / "step_00000001").write_text("in the way")  # seen only when all is written
        try:
            writer.wait()
        except CheckpointError as error:
            return str(error)
    return "saved"


def test_what_fails_at_the_end_is_everybodys_error_too(saved: Saved) -> None:
    folder, ranks = saved("nothing can be renamed")
    for message in ranks:
        assert re.search(r"step_00000001 cannot be written \(rank 0\)", message)
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]


def _fail_while_saving(folder: Path) -> None:
    w, engine = start()
    train(engine, w, 0, 1)
    try:
        with CheckpointWriter(folder, engine, w, keep=1) as writer:
            writer.save(1, {})
            raise ArithmeticError("the run fails")
    finally:
        # The rank that is done first would have the other one killed half a second later.
        deadline = time.monotonic() + 30
        while not checkpoints(folder) and time.monotonic() < deadline:
            time.sleep(0.01)


def test_a_run_that_fails_finishes_the_save_it_began(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="the run fails"):
        run_on_ranks(_fail_while_saving, 2, tmp_path)
    ((step, path),) = checkpoints(tmp_path)
    assert step == 1 and find_corruption(path) == []


def _save_until_killed(folder: Path, after_s: float) -> None:
    w, engine = start()
    found = restore(folder, engine, w)
    step = found.step if found else 0
    # SIGALRM is not handled: the kernel ends the process wherever it is, in a write as well as between two.
    signal.setitimer(signal.ITIMER_REAL, after_s)
    with CheckpointWriter(folder, engine, w, keep=2) as writer:
        while True:
            train(engine, w, step, step + 1)
            step += 1
            writer.save(step, {"step": step})


def test_killed_at_any_moment_what_is_there_is_whole(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    steps = [0]
    # A step and its save take 20 ms and more, most of it the save: these are different places in it.
    moments_ms = (23, 31, 47, 59, 73, 97, 131, 500) if request.config.getoption("full") else (31, 59, 97, 500)
    for after_ms in moments_ms:
        with pytest.raises(RanksFailed, match="died without an answer"):
            run_on_ranks(_save_until_killed, 1, tmp_path, after_ms / 1000)
        found = checkpoints(tmp_path)
        assert all(find_corruption(path) == [] for _, path in found)
        steps.append(found[-1][0] if found else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 0, f"no save was finished: {steps}"


def _die_while_writing(folder: Path, dying_rank: int) -> None:
    w, engine = start()
    train(engine, w, 0, 3)
    if w.rank == dying_rank:
        save.synced_file_digest = lambda file: signal.raise_signal(signal.SIGKILL)
    with CheckpointWriter(folder, engine, w, keep=3) as writer:
        writer.save(5, {})
        time.sleep(0.5)  # training
        writer.wait()


@pytest.mark.parametrize("dying_rank", [0, 1])
def test_killed_in_the_middle_of_a_write_the_run_goes_on_from_the_one_before(
    copy: Path, dying_rank: int
) -> None:
    with pytest.raises(RanksFailed, match="died without an answer"):
        run_on_ranks(_die_while_writing, 2, copy, dying_rank)
    assert (copy / "saving.step_00000005").is_dir()
    found, said = run_on_ranks(restored, 2, copy)[0]
    assert isinstance(found, Restored) and (found.step, said) == (4, "")
    assert [step for step, _ in checkpoints(copy)] == [2, 3, 4]
    assert not (copy / "saving.step_00000005").exists()


def _save_again(folder: Path) -> float:
    w, engine = start()
    found = restore(folder, engine, w)
    assert found is not None
    with CheckpointWriter(folder, engine, w, keep=3) as writer:
        writer.save(found.step, {"other": True})
    return (found.path / "manifest.json").stat().st_mtime


def test_a_step_that_is_saved_is_not_written_again(copy: Path) -> None:
    before = (copy / "step_00000004" / "manifest.json").stat().st_mtime
    assert run_on_ranks(_save_again, 1, copy) == [before]


def _save_through_failures(
    w: world.World, engine: ZeroEngine, folder: Path, failing: list[int]
) -> tuple[str, str]:
    """Four saves that do not stop the run, of which some fail: (error at the end, what was said)."""
    write_shard, ended = save.write_shard, "well"

    def sometimes(path: Path, rank: int, fragments):
        if rank == w.world_size - 1 and int(path.name[-8:]) in failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_shard(path, rank, fragments)

    said = io.StringIO()
    with contextlib.redirect_stderr(said), mock.patch.object(save, "write_shard", sometimes):
        try:
            with CheckpointWriter(folder, engine, w, keep=4, stop_on_failure=False) as writer:
                for step in range(1, 5):
                    writer.save(step, {})
        except CheckpointError as error:
            ended = str(error)
    return ended, said.getvalue()


def test_saves_that_may_fail_are_said_and_only_the_last_one_must_be_there(saved: Saved) -> None:
    """The run goes on after failures, keeps older checkpoints, and must not end without its last step."""
    good, ((ended, said), (other_ended, other_said)) = saved("failures in the middle")
    bad, ranks = saved("failure of the last")
    assert (ended, other_ended, other_said) == ("well", "well", "")
    assert [step for step, _ in checkpoints(good)] == [1, 4]
    assert [path.name for path in good.iterdir() if path.name.startswith("saving.")] == []
    lines = said.splitlines()
    assert len(lines) == 2 and all("WARNING" in line and "Training goes on" in line for line in lines)
    assert "step_00000002 cannot be written (rank 1)" in lines[0]
    for ended, _ in ranks:
        assert "step_00000004 cannot be written (rank 1)" in ended
    assert [step for step, _ in checkpoints(bad)] == [1, 3]


CASES: dict[str, tuple[Any, ...]] = {
    "step 0": (_save_at_step_0,),
    "while training": (_train_while_saving,),
    "small files on rank 0": (_save_with_small_files, 0),
    "small files on rank 1": (_save_with_small_files, 1),
    "without memory": (_save_without_memory,),
    "nothing can be renamed": (_save_where_nothing_can_be_renamed,),
    "failures in the middle": (_save_through_failures, [2, 3]),
    "failure of the last": (_save_through_failures, [2, 4]),
}
"""What two ranks do with an engine each and a folder, and further arguments of it."""
