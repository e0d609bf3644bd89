import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.atomic import write_json
from pretrain.checkpoint.folder import (
    CheckpointError,
    checkpoint_path,
    checkpoints,
    find_corruption,
    prune,
    quarantine,
    read_manifest,
    remove_leftovers,
    seal,
    synced_file_digest,
)


def _checkpoint(folder: Path, step: int, change: dict[str, Any] | None = None) -> Path:
    path = checkpoint_path(folder, step)
    (path / "engine").mkdir(parents=True)
    (path / "state.json").write_text("{}")
    (path / "engine" / "a").write_bytes(os.urandom(100))
    files = {name: synced_file_digest(path / name) for name in ("engine/a", "state.json")}
    optimizer = {"name": "adamw", "counters": {"step": 1.0 * step}}
    kept = {"format": 4, "step": step, "run": None, "optimizer": optimizer}
    kept |= {"layout": {}, "tensors": {}, "files": files}
    write_json(path / "manifest.json", seal(kept | (change or {})))
    return path


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10):
        _checkpoint(tmp_path, step)
    for other in ("step_x", "saving.step_00000011", "step_00000009.corrupt"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_00000012").write_text("a file")
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10, 100_000_000]
    assert checkpoints(tmp_path / "absent") == []


def test_damage_names_the_files_of_its_share(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 3)
    assert find_corruption(path) == []
    (path / "engine" / "a").write_bytes(bytes(100))
    (path / "state.json").unlink()
    assert find_corruption(path) == [
        "engine/a: its content has changed (SHA-256 differs)",
        "state.json: missing",
    ]
    assert find_corruption(path, slice(1, None, 2)) == ["state.json: missing"]
    (path / "engine" / "a").write_bytes(bytes(99))
    assert find_corruption(path)[0] == "engine/a: 99 bytes, should be 100"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"step": 4}, "not the manifest of step_00000003"),
        ({"files": {}}, "not the manifest of"),
        ({"files": {"state.json": {"bytes": 1}}}, "not the manifest of"),
        ({"files": 3}, "not a checkpoint's manifest"),
    ],
)
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = _checkpoint(tmp_path, 3, change)
    assert complaint in find_corruption(path)[0]
    assert read_manifest(path)[0] == {}


@pytest.mark.parametrize("number", [1, 5])
def test_another_format_is_an_error_and_not_damage(tmp_path: Path, number: int) -> None:
    path = _checkpoint(tmp_path, 3, {"format": number})
    with pytest.raises(CheckpointError, match=f"format {number}, this version reads 2 to 4; resume with"):
        find_corruption(path)


def test_a_manifest_of_the_first_format_has_no_tensors(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 3)
    write_json(path / "manifest.json", {"format": 1, "step": 3, "files": {}})
    with pytest.raises(CheckpointError, match="format 1"):
        read_manifest(path)


@pytest.mark.parametrize(("updates", "counters"), [(0, None), (3, {"step": 3.0})])
def test_a_manifest_of_format_2_is_read_as_one_of_adamw(
    tmp_path: Path, updates: int, counters: dict[str, float] | None
) -> None:
    path = _checkpoint(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    for key in ("optimizer", "run", "sha256"):
        del manifest[key]
    write_json(path / "manifest.json", manifest | {"format": 2, "adam_step": updates})
    assert find_corruption(path) == []
    assert read_manifest(path)[0]["run"] is None
    assert read_manifest(path)[0]["optimizer"] == {"name": "adamw", "counters": counters}


def test_a_manifest_of_format_3_has_no_digest_and_names_no_run(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    older = {key: manifest[key] for key in manifest if key not in ("run", "sha256")} | {"format": 3}
    write_json(path / "manifest.json", older)
    assert find_corruption(path) == []
    assert read_manifest(path)[0] == manifest | {"sha256": None}
    write_json(path / "manifest.json", older | {"format": 4, "run": None})
    assert find_corruption(path) == ["manifest.json: not the manifest of step_00000003"]


def test_no_digit_of_a_manifest_can_change_unseen(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 3)
    text = (path / "manifest.json").read_text()
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    assert len(digits) > 100
    for place in digits:
        other = "3" if text[place] != "3" else "2"
        (path / "manifest.json").write_text(text[:place] + other + text[place + 1 :])
        assert find_corruption(path), text[max(0, place - 20) : place + 20]


def test_prune_never_counts_a_damaged_one_as_kept(tmp_path: Path) -> None:
    two, three, four, six = (_checkpoint(tmp_path, step) for step in (2, 3, 4, 6))
    (four / "engine" / "a").unlink()
    (six / "engine" / "a").write_bytes(b"cut short")
    _checkpoint(tmp_path, 5, {"format": 1})
    assert prune(tmp_path, 1) == [two]
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 4, 5, 6]
    assert three.is_dir()


def test_setting_aside_twice_overwrites_nothing(tmp_path: Path) -> None:
    first = quarantine(_checkpoint(tmp_path, 4))
    second = quarantine(_checkpoint(tmp_path, 4))
    assert (first.name, second.name) == ("step_00000004.corrupt", "step_00000004.corrupt-2")
    assert json.loads((first / "manifest.json").read_text())["step"] == 4


def test_leftovers_are_what_was_being_written_or_removed(tmp_path: Path) -> None:
    kept = _checkpoint(tmp_path, 4)
    for prefix in ("saving.", "removing."):
        _checkpoint(tmp_path, 5).rename(tmp_path / f"{prefix}step_00000005")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
