"""Run directories with records, rows and checkpoints of the true form, which nobody trained."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import validate
from pretrain.checkpoint.folder import FORMAT, MANIFEST, STATE, checkpoint_path, file_digest, seal
from pretrain.config import RunConfig
from pretrain.run_dir import new_record
from pretrain.run_files import CHECKPOINTS, CONFIG, METRICS, RECORD
from pretrain.run_identity import RunIdentity, draw_identity

STEP_TOKENS = 128
KILLED = 9


def run_config(runs_dir: Path | str, **changes: Any) -> RunConfig:
    """A config; `changes`: name, steps, schedule, depth, and further values of its first level."""
    values = {
        "name": changes.pop("name", "tiny"),
        "total_tokens": changes.pop("steps", 20) * STEP_TOKENS,
        "tokens_per_step": STEP_TOKENS,
        "runs_dir": str(runs_dir),
        "model": {
            "num_layers": 2,
            "d_model": 32,
            "num_heads": 2,
            "context_tokens": 64,
            "vocab_tokens": 100,
            "towers": {"text": "all", "image": "all"},
            "depth": changes.pop("depth", {}),
        },
        "data": {"train": [{"path": "data/train"}]},
        "optimizer": {"learning_rate": 1e-3, "schedule": changes.pop("schedule", {"kind": "constant"})},
    }
    return validate(RunConfig, values | changes, source="test")


def make_run(config: RunConfig, steps: Sequence[int], *, spikes: Sequence[int] = ()) -> Path:
    """The directory of a run that is done and has a row and a checkpoint at each of `steps`, and left out the
    steps `spikes`."""
    run_dir = config.run_dir
    run_dir.mkdir(parents=True)
    _write(run_dir / CONFIG, config.model_dump(mode="json"))
    run, content = draw_identity(run_dir), ""
    events = [{"step": step, "why": "so", "back_to": None} for step in spikes]
    for number, step in enumerate(steps, start=1):
        content += json.dumps({"step": step, "run": run.id, **_spent(step)}) + "\n"
        known = [event for event in events if event["step"] <= step]
        _write_checkpoint(run_dir, run, step, number, content, known)
    (run_dir / METRICS).write_text(content)
    attempt = {"stopped": "2026-11-29T12:00:00+00:00", "to_step": max(steps, default=0)}
    fields = {"run": run.to_json(), "attempts": [attempt], "status": "done"}
    fields |= {"spikes": {"events": events, "train/lost_steps": len(events)}} if events else {}
    digest = hashlib.sha256(content.encode()).hexdigest()
    _write(run_dir / RECORD, new_record(config) | fields | {"metrics": {"sha256": digest}})
    return run_dir


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _spent(step: int) -> dict[str, float]:
    return {"tokens": step * STEP_TOKENS, "compute/train_flops": 1e6 * step, "time/train_s": 0.5 * step}


def _write_checkpoint(
    run_dir: Path, run: RunIdentity, step: int, num_rows: int, rows: str, spikes: list[dict[str, Any]]
) -> None:
    path = checkpoint_path(run_dir / CHECKPOINTS, step)
    (path / "engine").mkdir(parents=True)
    total = {
        "lost_steps": len(spikes),
        "tokens": step * STEP_TOKENS,
        "flops": 1e6 * step,
        "step_s": 0.4 * step,
        "wait_s": 0.1 * step,
    }
    state = {"num_rows": num_rows, "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(), "total": total}
    state |= {"spikes": spikes}
    (path / STATE).write_text(json.dumps({"step": step, "state": state}))
    weights = "engine/rank_00000.safetensors"
    (path / weights).write_bytes(b"weights %d" % step)
    fields = {"format": FORMAT, "step": step, "run": run.to_json(), "tensors": {}, "layout": {}}
    files = {name: file_digest(path / name) for name in (STATE, weights)}
    _write(path / MANIFEST, seal(fields | {"optimizer": {}, "files": files}))


def killed_at(moment: int, work: Callable[[], Any]) -> bool:
    """Do `work` in a process that is killed before its call number `moment` of those that change a
    directory; whether it was."""
    child = os.fork()
    if child == 0:
        left = [moment]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def count(*args: Any, **keywords: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(KILLED)
                return call(*args, **keywords)

            return count

        for name in ("rename", "replace", "link", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def files_of(run_dir: Path) -> dict[str, bytes]:
    """Name -> content of all files of a run but its record, whose times differ, and its lock."""
    paths = (path for path in run_dir.rglob("*") if path.is_file())
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in paths
        if path.name not in ("record.json", "lock") and not path.name.endswith(".tmp")
    }
