"""What faults are injected into: a folder with data, a killed run, a comparison, weights and raw documents.

The folder always has the same path, which its files hold, and is put back from a pristine copy before each
fault. `outcome_of` says what a verb made of it, without times, for a comparison with a run without a fault.
"""

import hashlib
import json
import re
import shutil
import signal
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from pretrain.checkpoint.folder import checkpoints
from pretrain.comparison.config import make_plan
from pretrain.comparison.plan_file import write_plan
from pretrain.config import load
from pretrain.metrics import read_rows
from pretrain.run_dir import FREE_KEYS
from slurm.records import append
from tests.data_pipeline.raw_documents import CONFIG, write_raw
from tests.e2e import warm
from tests.faults.injected_disk import KILL, DiskFault
from tests.pretrain.tiny_data import CONTEXT_TOKENS, VOCABULARY, tiny_run, write_tiny_data
from tests.toml_text import toml_text

STEPS = 12
PROFILE = 'tasks_per_node = 1\ntime_limit = "01:00:00"\n'
MEASURED = ("train/", "eval/", "optim/", "data/", "compute/", "tokens", "step")
_FREE = {key for key in FREE_KEYS if "." not in key} | {"data"}
"""Tables and keys of a config that may change without another result; the stream's state covers the data."""


@dataclass(frozen=True)
class Arena:
    """`root` is the folder that faults are injected into; files beside it belong to the campaign."""

    root: Path
    pristine: Path
    output: Path
    """What the verb printed."""
    report: Path
    """The paths at which the injected disk failed, a line each; absent if it never did."""
    drawn: bool
    """Whether reports have figures."""

    def restore(self) -> None:
        """Put everything back."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.pristine, self.root, symlinks=True)
        self.output.unlink(missing_ok=True)
        self.report.unlink(missing_ok=True)


VERBS: dict[str, tuple[str, ...]] = {
    # By name of what is done: the verb and its arguments, where {} is the arena.
    "train": ("train", "{}/run.toml"),
    "train fresh": ("train", "{}/run.toml", "name=fresh"),
    "train weights": ("train", "{}/run.toml", "name=warm", "initial_weights={}/weights"),
    "describe": ("describe", "{}/run.toml"),
    "submit": ("submit", "{}/run.toml", "--profile", "{}/profile.toml", "--dry-run"),
    "status": ("status", "{}/runs/tiny"),
    "status file": ("status", "{}/compare.toml"),
    "status compare": ("status", "{}/runs/tiny_compare"),
    "logs": ("logs", "{}/runs/tiny"),
    "compare": ("compare", "{}/compare.toml"),
    "report": ("compare", "{}/compare.toml", "--report-only"),
    "report logs": ("compare", "baseline=dense", "runs_dir={}/logs", "--from", "{}/logs.csv"),
    "export": ("export", "{}/runs/tiny", "{}/exported"),
    "export weights": ("export", "{}/weights", "{}/exported"),
    "tokenize": ("tokenize", "{}/raw", "{}/tokens", "--config", "{}/data.toml", "--processes", "1"),
}


def start(arena: Arena, what: str, **how: Any) -> warm.Run:
    """Begin one of VERBS; `how`: as for warm.Run."""
    verb, *arguments = (text.format(arena.root) for text in VERBS[what])
    drawn = arena.drawn or verb != "compare"
    return warm.Run([*arguments, *how.pop("overrides", ())], arena.output, verb=verb, drawn=drawn, **how)


def build(folder: Path, *, whole: bool = True) -> Arena:
    """Make everything in `folder`, by the verbs themselves, which must all succeed.

    `whole`: whether raw documents, tokenizers and figures are wanted, which take most of the time.
    """
    arena = Arena(
        folder / "arena", folder / "pristine", folder / "output", folder / "fault.json", drawn=whole
    )
    root = arena.root
    root.mkdir(parents=True)
    write_tiny_data(root / "data")
    run = small_run(root)
    (root / "run.toml").write_text(toml_text(run))
    (root / "profile.toml").write_text(PROFILE)
    _done(arena, "train fresh")
    shutil.move(root / "runs" / "fresh", root / "runs" / "done")
    _write_comparison(arena, run)
    if whole:
        _write_raw(arena)
    source, weights = root / "runs" / "tiny_compare" / "mot_seed3", root / "weights"
    assert warm.Run([str(source), str(weights)], arena.output, verb="export").codes() == [0]
    _killed_run(arena)
    _write_submission(root / "runs" / "tiny" / "slurm", run)
    shutil.rmtree(root / "runs" / "done")
    shutil.copytree(root, arena.pristine, symlinks=True)
    return arena


def small_run(root: Path) -> dict[str, Any]:
    """Values of a run of 12 steps with few evaluations, which takes a tenth of a second to train."""
    values = tiny_run(root / "data", root / "runs")
    values["total_tokens"] = STEPS * 2 * CONTEXT_TOKENS
    values["tokens_per_step"] = 2 * CONTEXT_TOKENS
    values["every_steps"] = {"log": 1, "eval": 6, "checkpoint": 3}
    values["evaluate"] = {"heldout_sequences": 2, "conditional_documents": 2, "last_documents": 5}
    return values


def _done(arena: Arena, what: str, **how: Any) -> None:
    run = start(arena, what, **how)
    assert run.codes() == [0] * len(run.pids), run.text()


def _write_comparison(arena: Arena, run: dict[str, Any]) -> None:
    """compare.toml with two arms of one seed, trained by forked processes, and its report."""
    root = arena.root
    run = {**run, "parallel": {"micro_batch_sequences": 1}}
    (root / "base.toml").write_text(toml_text(run))
    values = {
        **{"name": "tiny_compare", "question": "Does it run?", "base": "base.toml", "baseline": "dense"},
        **{"vary": ["model.towers"], "seeds": [3, 4], "concurrent_runs": 2},
        "arms": {"dense": {"model": {"towers": {name: "all" for name in VOCABULARY.modalities}}}, "mot": {}},
    }
    (root / "compare.toml").write_text(toml_text(values))
    plan = make_plan(root / "compare.toml")
    write_plan(plan)
    for planned in plan.runs:
        file = plan.directory / "configs" / f"{planned.name}.json"
        file.parent.mkdir(exist_ok=True)
        write_json(file, planned.config.model_dump(mode="json"))
        warm.train([str(file)], arena.output)
    _done(arena, "compare")
    losses = [f"{arm},{seed},9,9e3,text,{3 + seed / 50}" for arm in ("dense", "mot") for seed in (3, 4)]
    (root / "logs.csv").write_text("\n".join(["arm,seed,step,tokens,modality,loss", *losses, ""]))


def _write_raw(arena: Arena) -> None:
    """Raw documents, and tokenizers that are fitted on them already: pictures are vectors."""
    root = arena.root
    write_raw(root / "raw", shards=2, documents=5)
    config = tomllib.loads(CONFIG) | {"image": {"kind": "patches", "size_px": 16, "patch_px": 4}}
    (root / "data.toml").write_text(toml_text(config))
    _done(arena, "tokenize")
    shutil.move(root / "tokens" / "tokenizers", root / "tokenizers")
    shutil.rmtree(root / "tokens")
    (root / "data.toml").write_text(f'tokenizers_from = "{root}/tokenizers"\nmax_bad_frac = 0.5\n')


def _killed_run(arena: Arena) -> None:
    """runs/tiny: killed when its checkpoint of step 9 was whole; that of step 12 waits for that one."""
    fault = DiskFault("fsync", 3, KILL, str(arena.root), str(arena.report), "^runs/tiny/checkpoints$")
    run = start(arena, "train", disk=fault.to_json())
    assert run.codes() == [-signal.SIGKILL], run.text()


def _write_submission(folder: Path, run: dict[str, Any]) -> None:
    """What a job of Slurm, which has ended, leaves in a run directory (slurm/records.py)."""
    (folder / "1").mkdir(parents=True)
    write_json(folder / "1" / "config.json", run)
    job = {"job": 812, "task": None, "chain": [], "name": "tiny", "submitted": "2026-01-31T12:00:00+00:00"}
    write_json(folder / "1" / "job.json", job)
    row = {
        **{"job": 812, "task": None, "attempt": 0, "nodes": "node1", "world_size": 1, "from_step": 0},
        **{"submitted": job["submitted"], "started": "2026-01-31T12:00:10+00:00"},
        **{"ended": "2026-01-31T12:09:10+00:00", "to_step": 9, "exit_code": 1, "ranks": [], "excluded": []},
        **{"cause": {"kind": "lost_peer", "rank": 0, "host": "node1", "message": "gone"}},
        **{"next": "ended", "reason": "a peer was lost"},
    }
    append(folder, row)


# ------------------------------------------------------------------------------------------------- outcomes


def outcome_of(arena: Arena, what: str) -> Any:
    """What a verb made that must not depend on faults: values that are equal for equal results."""
    root = arena.root
    if what.startswith("train"):
        name = {"train": "tiny", "train fresh": "fresh", "train weights": "warm"}[what]
        return trained(root / "runs" / name)
    if what in ("compare", "report"):
        return reported(root)
    if what.startswith("export"):
        return {path.name: _sha256(path) for path in (root / "exported").glob("*.safetensors")}
    if what == "tokenize":
        manifest = json.loads((root / "tokens" / "manifest.json").read_text())
        return {key: manifest[key] for key in ("vocabulary", "num_documents", "tokens", "shards", "skipped")}
    return None


def trained(run_dir: Path) -> dict[str, Any]:
    """Curve without times, digests of all tensors and position in the data of a finished run."""
    _, last = checkpoints(run_dir / "checkpoints")[-1]
    manifest, state = (json.loads((last / name).read_text()) for name in ("manifest.json", "state.json"))
    rows = read_rows(run_dir / "metrics.jsonl")
    return {
        "status": json.loads((run_dir / "record.json").read_text())["status"],
        "config": load(run_dir / "config.resolved.json").model_dump(mode="json", exclude=_FREE),
        "curve": [{name: row[name] for name in row if name.startswith(MEASURED)} for row in rows],
        "step": state["step"],
        "stream": state["state"]["stream"],
        "tensors": {name: entry["digest"] for name, entry in manifest["tensors"].items()},
        "optimizer": manifest.get("optimizer"),
    }


def reported(root: Path) -> dict[str, Any]:
    """The summary of the comparison, with the grave caveats' texts apart: they are what a report says."""
    summary = json.loads((root / "runs" / "tiny_compare" / "report" / "summary.json").read_text())
    return _without_times(summary)


_TIMES = (
    "seconds", "step_s", "tokens_per_s", "wait_frac", "mfu_frac", "peak_bytes", "train_s", "step_time_ratio",
)  # fmt: skip
"""Keys of a summary whose values differ whenever a run is trained again."""


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(below) for key, below in value.items() if key not in _TIMES}
    if isinstance(value, list):
        return [_without_times(below) for below in value]
    return re.sub(r" and \S+ % of the seconds", "", value) if isinstance(value, str) else value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
