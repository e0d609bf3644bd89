"""Branches: a new run that begins at a checkpoint of another one, its trunk. Imports no torch.

A branch has the weights, the optimizer's states, the position in the data and the thresholds of that
checkpoint. Its directory holds hard links to the checkpoint's files, or copies on another file system, and
the trunk's rows of metrics up to there (trunk.jsonl), so it needs nothing of its trunk any more. Its own rows
(metrics.jsonl) begin behind the checkpoint. Sums in them are since step 0, as in any run; which part of them
is the trunk's stands beside them (costs.py). The trunk is only read: it may be training meanwhile.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file, atomic_folder, write_json
from data_pipeline.files.toml_config import ConfigError, apply_override, validate
from pretrain.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    STATE,
    checkpoint_path,
    file_digest,
    seal,
    sync,
    synced_file_digest,
)
from pretrain.config import RunConfig, differences
from pretrain.dotted_keys import covers
from pretrain.lineage import extend
from pretrain.lineage.changes import saved_steps, whole_checkpoint
from pretrain.lineage.costs import Costs, spikes_of
from pretrain.metrics import rows_up_to
from pretrain.quantities import count, flops
from pretrain.run_dir import check_config, is_free, new_record, read_record
from pretrain.run_files import CHECKPOINTS, CONFIG, METRICS, RECORD, TRUNK
from pretrain.run_identity import RunIdentity, check_origin, draw_identity, identity_of
from pretrain.train.schedule import first_difference

LENGTH_KEYS = (*extend.KEYS, "name")
"""Patterns of keys under which a branch may still make the steps of one run without a trunk."""
OTHER_KEYS = (
    *("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.max_grad_norm", "optimizer.eps"),
    *("optimizer.beta1", "optimizer.beta2", "optimizer.muon.learning_rate", "optimizer.muon.weight_decay"),
    *("loss_weights", "loss_weights.*"),
)
"""Patterns of further keys that a branch may change."""
FIXED = {
    "seed": "the order of the data and the masks of dropout follow from it",
    "tokens_per_step": "steps before and behind the checkpoint would be of two sizes",
    "precision": "the trunk's steps were made in it",
    "initial_weights": "a branch begins with the weights of its checkpoint",
    "model": "the weights of the checkpoint are those of the trunk's model",
    "data": "the position in the data is the trunk's",
    "optimizer": "its states are the trunk's; rates, decay and schedule may change",
}
"""Key or table that a branch may not change -> why. What neither FIXED nor the patterns name is in
pretrain.run_dir.FREE_KEYS."""


def branch_config(trunk: RunConfig, name: str, overrides: Sequence[str]) -> RunConfig:
    """The config of a branch of the run of `trunk`. Raises ConfigError, naming it, for a key that a branch
    may not change."""
    values = trunk.model_dump(mode="json")
    for override in overrides:
        if override.partition("=")[0].strip() == "name":
            raise ConfigError(f"{override}: --branch {name} names the new run; leave one of them out")
        apply_override(values, override)
    config = validate(RunConfig, values | {"name": name}, source=f"--branch {name}")
    for key, before, after in differences(trunk, config):
        if not is_free(key) and not _matches(key, (*LENGTH_KEYS, *OTHER_KEYS)):
            table = max((fixed for fixed in FIXED if covers(fixed, key)), key=len)
            raise ConfigError(
                f"{key} = {json.dumps(after)}: a branch keeps {json.dumps(before)}, for {FIXED[table]}; "
                "leave it out, or begin a run of its own (initial_weights takes weights alone)"
            )
    return config


def check_branch(trunk: RunConfig, config: RunConfig, step: int | None) -> int:
    """The step of the trunk's checkpoint at which the run of `config` branches off. Raises ConfigError if
    there is no such checkpoint, or if nothing would be left to train."""
    steps = saved_steps(trunk.run_dir)
    if not steps:
        raise ConfigError(f"{trunk.run_dir} has no checkpoint that a branch could begin at; train it first")
    listed = ", ".join(map(str, steps))
    if step is None:
        raise ConfigError(
            f"--branch {config.name}: say with --from-step at which checkpoint of {trunk.run_dir} the branch "
            f"begins; there are {listed}"
        )
    if step not in steps:
        raise ConfigError(
            f"--from-step {step}: {trunk.run_dir} has no checkpoint of that step; there are {listed}. A run "
            "keeps its last keep_checkpoints of them"
        )
    if config.num_steps <= step:
        raise ConfigError(
            f"total_tokens = {config.total_tokens} is {config.num_steps} steps, and the branch begins behind "
            f"step {step}; set total_tokens to more than {step * config.tokens_per_step}"
        )
    if config.optimizer.schedule.start_step > step:
        raise ConfigError(
            f"optimizer.schedule.start_step = {config.optimizer.schedule.start_step}, and the branch begins "
            f"behind step {step}: set it to {step} or less"
        )
    return step


def exists(config: RunConfig, trunk: RunConfig, step: int | None) -> bool:
    """Whether the branch has been made already, so that the same command continues it. Raises ConfigError if
    its directory holds another run."""
    run_dir = config.run_dir
    if not run_dir.exists():
        return False
    there = read_record(run_dir).get("branch")
    ours = identity_of(read_record(trunk.run_dir))
    if there is None or ours is None or (there["run"], there["step"]) != (ours.id, step):
        what = "another run" if there is None else f"a branch of {there['parent']} at step {there['step']}"
        raise ConfigError(
            f"{run_dir} exists and holds {what}; give the branch another name, or continue what is there: "
            f"motley train {run_dir}"
        )
    check_config(config)
    return True


def make_branch(trunk: RunConfig, config: RunConfig, step: int) -> str:
    """Make the directory of a branch, which is whole or absent; returns one sentence for people. Raises
    ConfigError if the trunk's checkpoint or rows are damaged or not its own."""
    parent, record = trunk.run_dir, read_record(trunk.run_dir)
    source, manifest = whole_checkpoint(parent, step)
    identity = identity_of(record)
    if identity is None:
        raise ConfigError(f"{parent} was made by a version without run ids; continue it once, then branch")
    check_origin(source, manifest["run"], identity)
    state = json.loads((source / STATE).read_text())["state"]
    rows = _trunk_rows(parent, record, step, state)
    entry = {
        "parent": str(parent),
        "run": identity.id,
        "step": step,
        "manifest_sha256": manifest["sha256"] or file_digest(source / MANIFEST)["sha256"],
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "changed": {key: [old, new] for key, old, new in differences(trunk, config) if key != "name"},
        "as_without_trunk": _as_without_trunk(trunk, config, record, step),
        "rows_sha256": hashlib.sha256(rows).hexdigest(),
        "inherited": _costs(step, state["total"])._asdict(),
    }
    with atomic_folder(config.run_dir) as folder:
        write_json(folder / CONFIG, config.model_dump(mode="json"))
        own = draw_identity(folder)
        fields = {"run": own.to_json(), "branch": entry, "status": "stopped", **spikes_of(state)}
        write_json(folder / RECORD, new_record(config) | fields)
        with atomic_file(folder / TRUNK) as file:
            file.write(rows)
        _link_checkpoint(source, checkpoint_path(folder / CHECKPOINTS, step), manifest, state, own)
        sync(folder)
    sync(config.run_dir.parent)
    return _told(config.run_dir, entry)


def _told(run_dir: Path, branch: Mapping[str, Any]) -> str:
    """Say what a branch is, for people. `branch`: the entry of its record."""
    costs = Costs(**branch["inherited"])
    return (
        f"{run_dir}: a branch of {branch['parent']} (run {branch['run']}) at step {count(branch['step'])}, "
        f"of which it inherits {count(costs.tokens)} tokens and {flops(costs.flops)}"
    )


def _costs(step: int, total: Mapping[str, float]) -> Costs:
    """The costs in the sums of a training state since step 0."""
    return Costs(step, int(total["tokens"]), total["flops"], total["step_s"] + total["wait_s"])


def _trunk_rows(parent: Path, record: Mapping[str, Any], step: int, state: Mapping[str, Any]) -> bytes:
    """The rows up to `step` of the run and its own trunk. Raises ConfigError if they are not those that the
    checkpoint of `step`, whose state is `state`, was made after."""
    rows, _ = rows_up_to(parent / METRICS, step)
    expected = state.get("rows_sha256")
    if expected and hashlib.sha256(rows).hexdigest() != expected:
        raise ConfigError(
            f"{parent / METRICS}: the rows up to step {step} are not those that the checkpoint of that step "
            "was made after (SHA-256 differs); put the file back"
        )
    return rows_of_trunk(parent, record) + rows


def rows_of_trunk(run_dir: Path, record: Mapping[str, Any]) -> bytes:
    """The rows of metrics of the trunk of the run in `run_dir`; b"" for a run without one. Raises ConfigError
    if they are missing or have changed."""
    if "branch" not in record:
        return b""
    path = run_dir / TRUNK
    rows = path.read_bytes() if path.exists() else None
    if rows is None or hashlib.sha256(rows).hexdigest() != record["branch"]["rows_sha256"]:
        what = "is missing" if rows is None else f"has changed (SHA-256 differs from {RECORD})"
        raise ConfigError(f"{path} {what}; put the file back")
    return rows


def _as_without_trunk(trunk: RunConfig, config: RunConfig, record: Mapping[str, Any], step: int) -> bool:
    """Whether a run of `config` that begins at step 0 makes its first steps as the trunk made them."""
    starts = trunk.optimizer.schedule.start_step, config.optimizer.schedule.start_step
    if any(starts) or not record.get("branch", {}).get("as_without_trunk", True):
        return False
    changed = [key for key, _, _ in differences(trunk, config)]
    if not all(is_free(key) or _matches(key, LENGTH_KEYS) for key in changed):
        return False
    return first_difference(trunk, config, until=step) is None


def _link_checkpoint(
    source: Path, target: Path, manifest: Mapping[str, Any], state: Mapping[str, Any], run: RunIdentity
) -> None:
    """Make the checkpoint `source` one of the branch `run`, which has no rows of metrics yet."""
    target.mkdir(parents=True)
    for name in manifest["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name != STATE:
            _link(source / name, target / name)
    own = {**state, "num_rows": 0, "rows_sha256": hashlib.sha256(b"").hexdigest()}
    (target / STATE).write_text(json.dumps({"step": manifest["step"], "state": own}, indent=1) + "\n")
    changed = {STATE: synced_file_digest(target / STATE)}
    fields = {"format": FORMAT, "run": run.to_json(), "files": manifest["files"] | changed}
    write_json(target / MANIFEST, seal({**manifest, **fields}))
    for folder in (*(part for part in target.rglob("*") if part.is_dir()), target):
        sync(folder)


def _link(source: Path, target: Path) -> None:
    """A hard link, so that the file outlives its run; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
