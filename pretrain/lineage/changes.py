"""A change of a run that has begun: it is extended, or goes back to an earlier checkpoint.

record.json holds the change, as "change", before anything else is done about it. Whoever starts the run next
finishes it, so a process that is killed at any moment leaves a run that goes on. A change that is finished
stands in the list "changes". What the run did behind the checkpoint that it goes on from is moved to
checkpoints/aside_1, aside_2 and so on: nothing is deleted. Imports no torch.
"""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file, write_json
from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError, set_key, validate
from pretrain.checkpoint.folder import (
    STATE,
    CheckpointError,
    checkpoint_path,
    checkpoints,
    file_digest,
    find_corruption,
    read_manifest,
    sync,
)
from pretrain.config import RunConfig, differences
from pretrain.dotted_keys import value_at
from pretrain.lineage import costs
from pretrain.metrics import rows_up_to
from pretrain.run_dir import FREE_KEYS, is_free, lock_run, read_record
from pretrain.run_files import ASIDE, CHECKPOINTS, CONFIG, METRICS, RECORD


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the run's checkpoints, oldest first."""
    return [step for step, _ in checkpoints(run_dir / CHECKPOINTS)]


def whole_checkpoint(run_dir: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """(path, manifest) of the run's checkpoint of `step`, all of whose files are found good. Raises
    ConfigError for a damaged one."""
    path = checkpoint_path(run_dir / CHECKPOINTS, step)
    try:
        problems, (manifest, _) = find_corruption(path), read_manifest(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if problems:
        raise ConfigError(f"{path} is damaged, so nothing goes on from there: {'; '.join(problems)}")
    return path, manifest


def change_of(
    kind: str, run_dir: Path, *, step: int, old: RunConfig | None = None, new: RunConfig | None = None
) -> dict[str, Any]:
    """The change of a run that goes on from its checkpoint of `step`, with the config `new` in place of `old`
    if they are given. `kind`: "extend" or "go back". Raises ConfigError if the checkpoint is damaged and
    later ones would be set aside."""
    changed = [] if old is None or new is None else differences(old, new)
    changed = [item for item in changed if not is_free(item[0])]
    names = [path.name.removeprefix(ASIDE) for path in (run_dir / CHECKPOINTS).glob(f"{ASIDE}*")]
    numbers = [int(name) for name in names if name.isdecimal()]
    later, config = has_later(run_dir, step), None
    if later:
        whole_checkpoint(run_dir, step)
    if changed and new is not None:
        config = read_object(run_dir / CONFIG)
        values = new.model_dump(mode="json")
        for key, _, _ in changed:
            set_key(config, key, value_at(values, key))
    return {
        "kind": kind,
        "asked": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "aside": f"{ASIDE}{1 + max(numbers, default=0)}" if later else None,
        "set_aside": costs.behind(run_dir, step)._asdict() if later else None,
        "before": {key: before for key, before, _ in changed},
        "after": {key: after for key, _, after in changed},
        "config_sha256": file_digest(run_dir / CONFIG)["sha256"],
        "config": config,
    }


def has_later(run_dir: Path, step: int) -> bool:
    """Whether the run has a checkpoint or a row of metrics behind `step`."""
    return max(saved_steps(run_dir), default=0) > step or bool(rows_up_to(run_dir / METRICS, step)[1])


def make_change(run_dir: Path, change: Mapping[str, Any]) -> None:
    """Change the run. Raises ConfigError if another process writes its directory."""
    with lock_run(run_dir):
        record = read_record(run_dir)
        record |= {"change": dict(change), "status": "stopped"}
        record.pop("metrics", None)  # its digest speaks of rows that may go
        write_json(run_dir / RECORD, record)
        _finish(run_dir, record)


def finish_change(run_dir: Path) -> None:
    """Finish the change of a run whose process was killed in the middle of it; of another run, do nothing."""
    if "change" in read_record(run_dir):
        with lock_run(run_dir):
            record = read_record(run_dir)
            if "change" in record:
                _finish(run_dir, record)


def _finish(run_dir: Path, record: dict[str, Any]) -> None:
    """Do what record["change"] says. Any part of it may be done already."""
    change = record["change"]
    if change["aside"] is not None:
        _set_aside(run_dir, change["step"], run_dir / CHECKPOINTS / change["aside"])
        state = read_object(checkpoint_path(run_dir / CHECKPOINTS, change["step"]) / STATE)["state"]
        record.pop("spikes", None)
        record |= costs.spikes_of(state)
    if change["config"] is not None:
        write_json(run_dir / CONFIG, change["config"])
        if "run" in record:  # a version without identities may have begun the run
            record["run"]["config_sha256"] = file_digest(run_dir / CONFIG)["sha256"]
    record.setdefault("changes", []).append({key: change[key] for key in change if key != "config"})
    del record["change"]
    write_json(run_dir / RECORD, record)


def _set_aside(run_dir: Path, step: int, folder: Path) -> None:
    """Move checkpoints and rows behind `step` to `folder`."""
    folder.mkdir(exist_ok=True)
    rows, later = rows_up_to(run_dir / METRICS, step)
    if later:
        for path, content in ((folder / METRICS, later), (run_dir / METRICS, rows)):
            with atomic_file(path) as file:
                file.write(content)
    for saved, path in checkpoints(run_dir / CHECKPOINTS):
        if saved > step:
            os.rename(path, folder / path.name)
    sync(folder)
    sync(folder.parent)


def as_extended(config: RunConfig) -> RunConfig:
    """The config of the run whose directory `config` names, if `config` is what the run had before it was
    extended, or has now; else `config`. Keys that a later attempt may change are those of `config`.

    So the file of a run that was extended on the command line continues it.
    """
    record = read_record(config.run_dir)
    changes = [*record.get("changes", ()), *([record["change"]] if "change" in record else [])]
    changes = [change for change in changes if change["after"]]
    if not changes:
        return config
    values = changes[-1].get("config") or read_object(config.run_dir / CONFIG)
    wanted = config.model_dump(mode="json")
    for key in FREE_KEYS:
        set_key(values, key, value_at(wanted, key))
    extended = validate(RunConfig, values | {"name": config.name}, source=str(config.run_dir / CONFIG))
    earlier = [(key, before) for change in changes for key, before in change["before"].items()]
    other = [(key, theirs) for key, _, theirs in differences(extended, config)]
    return config if any(item not in earlier for item in other) else extended
