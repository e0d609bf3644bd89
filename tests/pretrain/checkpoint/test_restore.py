"""Restoring with the real engine: damage is named, never all of them bad, what is in memory is verified."""

import errno
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.fragments import Fragment
from parallel.testing import RanksFailed, run_on_ranks
from pretrain.checkpoint import restore as restore_module
from pretrain.checkpoint.folder import CheckpointError, checkpoints, seal, shard_file, synced_file_digest
from pretrain.checkpoint.restore import Restored, restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.one_world import run_cases
from tests.pretrain.toy_run import flip_a_bit, restored_in, start, train, truncate


def _shard(path: Path) -> Path:
    return path / shard_file(0)


def _manifest(path: Path) -> Path:
    return path / "manifest.json"


def _rewrite(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: _manifest(path).write_text(_manifest(path).read_text().replace(old, new))


def _exchange(name: str) -> Callable[[Path], None]:
    """A folder in place of a file, or a file in place of a folder."""

    def exchange(path: Path) -> None:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
            (path / name).write_text("no folder")
        else:
            (path / name).unlink()
            (path / name).mkdir()

    return exchange


_CHANGED = r"manifest\.json: its content has changed \(SHA-256 differs\)"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is cut": (
        lambda path: truncate(_shard(path)), "rank_00000.safetensors: .* bytes, should be",
    ),
    "a bit of a shard": (
        lambda path: flip_a_bit(_shard(path)), "rank_00000.safetensors: its content has changed",
    ),
    "no shard": (lambda path: _shard(path).unlink(), "rank_00000.safetensors: missing"),
    "a bit of random states": (
        lambda path: flip_a_bit(path / "rng" / "rank_00000.pt"), "rank_00000.pt: its content has changed",
    ),
    "another count of steps": (_rewrite('"step": 4.0', '"step": 2.0'), _CHANGED),
    "another name": (_rewrite('"head.weight"', '"head.weighs"'), _CHANGED),
    "a manifest is cut": (lambda path: truncate(_manifest(path)), "manifest.json: not valid JSON"),
    "no manifest": (lambda path: _manifest(path).unlink(), "manifest.json: missing"),
    "an empty manifest": (lambda path: _manifest(path).write_text("{}"), "not a checkpoint's manifest"),
    "a folder for the manifest": (_exchange("manifest.json"), "manifest.json"),
    "a file for the folder of shards": (_exchange("engine"), "engine"),
    "a folder for the state": (_exchange("state.json"), "state.json"),
}  # fmt: skip
"""What happens to the newest checkpoint, and what is then said of it."""


def _tamper(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Change tensors and the manifest's entries of them, and make the hashes those of the changed file."""
    manifest = json.loads(_manifest(path).read_text())
    tensors = load_file(_shard(path))
    change(tensors, manifest["tensors"])
    save_file(tensors, _shard(path))
    manifest["files"][shard_file(0)] = synced_file_digest(_shard(path))
    _manifest(path).write_text(json.dumps(seal(manifest)))


def _drop_moments(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    for name in list(tensors):
        if name.endswith("/exp_avg_sq"):
            del tensors[name]


def _drop_moments_and_their_digests(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    _drop_moments(tensors, entries)
    for entry in entries.values():
        del entry["digest"]["exp_avg_sq"]


def _forget_a_tensor(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    del entries["head.weight"]


def _add_a_tensor(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    entries["tail.weight"] = entries["head.weight"]


def _change_the_shape(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    entries["head.weight"]["shape"] = [16, 5]


def _lose_elements(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    entries["head.weight"]["fragments"][0]["count"] -= 1


def _swap_two_elements(tensors: dict[str, torch.Tensor], entries: dict[str, Any]) -> None:
    moment = tensors["head.weight/exp_avg"]
    moment[[3, 4]] = moment[[4, 3]]


TAMPERED: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], None], str]] = {
    "no moments": (_drop_moments, r"rank_00000\.safetensors: .*/exp_avg_sq cannot be read"),
    "nor their digests": (_drop_moments_and_their_digests, r"manifest\.json: .* has no exp_avg_sq"),
    "a tensor is forgotten": (
        _forget_a_tensor, r"head\.weight of shape \[5, 16\] is wanted, there is no such tensor",
    ),
    "a tensor is added": (_add_a_tensor, r"parameter of tail\.weight is in no rank's memory"),
    "another shape": (
        _change_the_shape, r"there is shape \[16, 5\]: it was written by another model",
    ),
    "fewer elements": (
        _lose_elements, r"the files hold 79 of 80 elements of head\.weight/parameter",
    ),
    "swapped elements": (
        _swap_two_elements,
        r"what then stands in memory is not .* good: exp_avg of head\.weight \(copy 0\)$",
    ),
}  # fmt: skip
"""Changes under hashes that are good, and what is then said."""


def _leave_only_a_damaged_one(folder: Path) -> None:
    for step, path in checkpoints(folder):
        if step < 4:
            shutil.rmtree(path)
    truncate(_shard(folder / "step_00000004"))


def _write_another_format(folder: Path) -> None:
    _manifest(folder / "step_00000004").write_text('{"format": 1, "step": 4, "files": {}}')


def _leave_what_a_killed_run_leaves(folder: Path) -> None:
    (folder / "step_00000004").rename(folder / "saving.step_00000004")
    (folder / "step_00000002").rename(folder / "removing.step_00000002")


Answer = tuple[Restored | str | None, str]
"""What restore gave, or its error, and what it said."""


@pytest.fixture(scope="module")
def after(three: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Answer]]]:
    """Name of a change -> the changed folder, and the answers of two starts, by one process for all."""
    changes: dict[str, Callable[[Path], object]] = {
        "absent": shutil.rmtree,
        "none good": _leave_only_a_damaged_one,
        "another format": _write_another_format,
        "killed": _leave_what_a_killed_run_leaves,
    }
    for name, (damage, _) in DAMAGE.items():
        changes[name] = lambda folder, damage=damage: damage(folder / "step_00000004")
    for name, (change, _) in TAMPERED.items():
        changes[name] = lambda folder, change=change: _tamper(folder / "step_00000004", change)
    folders = {}
    for name, change in changes.items():
        folders[name] = tmp_path_factory.mktemp("changed") / "checkpoints"
        shutil.copytree(three, folders[name])
        change(folders[name])
    twice = [name for name in changes for _ in range(2)]
    answers = run_cases(restored_in, 1, [(folders[name],) for name in twice])
    found: dict[str, tuple[Path, list[Answer]]] = {name: (folders[name], []) for name in changes}
    for name, (answer,) in zip(twice, answers, strict=True):
        found[name][1].append(answer)
    return found


After = dict[str, tuple[Path, list[Answer]]]


def test_an_empty_folder_is_a_start(after: After) -> None:
    assert after["absent"][1] == [(None, "")] * 2


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_is_named_and_passed_over(after: After, name: str) -> None:
    folder, ((found, said), again) = after[name]
    assert found == Restored(3, {"step": 3, "tenth": 0.1}, folder / "step_00000003")
    assert f"{folder / 'step_00000004'} is damaged and passed over" in said
    assert re.search(DAMAGE[name][1], said), said
    assert again == (found, "")
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000002",
        "step_00000003",
        "step_00000004.corrupt",
    ]


def test_with_none_good_the_run_does_not_start_over_unasked(after: After) -> None:
    for found, _ in after["none good"][1]:  # nor at the next start
        assert isinstance(found, str)
        assert re.search(r"no good checkpoint, only damaged ones: step_00000004\.corrupt", found)


def test_another_format_is_refused_and_not_touched(after: After) -> None:
    folder, ((found, _), _) = after["another format"]
    assert isinstance(found, str) and "is of format 1, this version reads 2 to 4" in found
    assert (folder / "step_00000004").is_dir()


def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(after: After) -> None:
    folder, ((found, said), _) = after["killed"]
    assert isinstance(found, Restored) and found.step == 3
    assert said == ""
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("name", TAMPERED)
def test_what_hashes_cannot_see_is_seen(after: After, name: str) -> None:
    found, _ = after[name][1][0]
    assert isinstance(found, str) and re.search(TAMPERED[name][1], found), found


def _restore_where_one_rank_fails(folder: Path) -> str:
    w, engine = start()
    load = engine.load

    def failing(counters: Any, fill: Callable[[Sequence[Fragment]], None]) -> None:
        def broken(fragments: Sequence[Fragment]) -> None:
            # A name that no checkpoint has, on one rank.
            fill([Fragment(**{**vars(f), "name": "x"}) for f in fragments] if w.rank == 1 else fragments)

        load(counters, broken)

    engine.load = failing
    try:
        restore(folder, engine, w)
    except CheckpointError as error:
        return str(error)
    return "restored"


def test_a_rank_that_cannot_load_is_everybodys_error(three: Path) -> None:
    for message in run_on_ranks(_restore_where_one_rank_fails, 2, three):
        assert re.search(r"step_00000004 cannot be loaded \(rank 1\): .*x of shape", message)


def _restore_with_a_broken_copy(folder: Path) -> str:
    """Where ranks hold copies (stage 0), one that is wrong must not hide behind those that are right."""
    w, engine = start(0)
    load = engine.load

    def breaking(counters: Any, fill: Callable[[Sequence[Fragment]], None]) -> None:
        load(counters, fill)
        for fragment in engine.fragments():
            if fragment.name == "head.weight" and fragment.replica == 1:
                fragment.values["exp_avg"][7] *= 1 + 2**-20

    engine.load = breaking
    try:
        restore(folder, engine, w)
    except CheckpointError as error:
        return str(error)
    return "restored"


def test_every_copy_is_verified(three: Path) -> None:
    for message in run_on_ranks(_restore_with_a_broken_copy, 2, three):
        assert message.endswith("good: exp_avg of head.weight (copy 1)")


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _random_numbers(folder: Path, resume: bool) -> tuple[float, float, float]:
    w, engine = start()
    if resume:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(999)
        restore(folder, engine, w)
        return _draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(10 + w.rank)
    _draw()
    train(engine, w, 0, 1)
    with CheckpointWriter(folder, engine, w, keep=1) as writer:
        writer.save(1, None)
        return _draw()


def test_random_numbers_go_on_where_they_were_on_every_rank(tmp_path: Path) -> None:
    expected = run_on_ranks(_random_numbers, 2, tmp_path, False)
    assert run_on_ranks(_random_numbers, 2, tmp_path, True) == expected
    assert expected[0] != expected[1]
    other = run_on_ranks(_random_numbers, 1, tmp_path, True)  # another layout: the ranks are not the same
    assert other[0] not in expected


def test_a_folder_that_cannot_be_read_is_an_error_on_every_rank(copy: Path) -> None:
    with pytest.raises(RanksFailed, match=r"step_00000004 cannot be read \(rank 1\).*Input/output error"):
        run_on_ranks(_restore_where_reading_fails, 2, copy)
    assert [step for step, _ in checkpoints(copy)] == [2, 3, 4]  # it may be read tomorrow


def _restore_where_reading_fails(folder: Path) -> None:
    def failing(path: Path, share: slice) -> list[str]:
        raise OSError(errno.EIO, "Input/output error", str(path))

    w, engine = start()
    if w.rank == 1:
        restore_module.find_corruption = failing
    restore(folder, engine, w)
