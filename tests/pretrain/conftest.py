"""Synthetic comparisons: run directories in the format of pretrain/metrics.py, made from known loss
curves. And checkpoints of a real engine."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.testing import run_on_ranks
from pretrain.checkpoint.folder import file_digest
from pretrain.comparison.config import make_plan
from pretrain.comparison.findings import Findings, find
from pretrain.comparison.ladder_findings import LadderFindings, find_ladder
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.plan_file import write_plan
from pretrain.comparison.results import load_results
from pretrain.comparison.step_timing import StepTiming
from tests.pretrain.comparison.ladder_files import LADDER, falling, ladder_edit
from tests.undrawn import FIGURES, undrawn

BASE = """
name = "tiny"
total_tokens = 614_400
tokens_per_step = 1_024
runs_dir = "{runs}"
[model]
num_layers = 2
d_model = 64
num_heads = 2
context_tokens = 256
vocab_tokens = 2_816
[model.towers]
text = "text"
image = "image"
speech = "speech"
[data]
heldout = "{runs}/tokens/heldout"
train = [{{path = "{runs}/tokens/train"}}]
[optimizer]
learning_rate = 1e-3
[optimizer.schedule]
warmup_steps = 20
[every_steps]
log = 10
eval = 20
"""

COMPARISON = """
name = "dense_vs_mot"
question = "Do modality-specific weights help at equal compute?"
base = "base.toml"
baseline = "dense"
vary = ["model.towers"]
seeds = [1, 2, 3]
tuning = "Chosen for both arms by the same sweep."
[arms.dense.model]
towers = {text = "all", image = "all", speech = "all"}
[arms.mot]
"""

FLOOR = {"text": 1.9, "image": 2.6, "speech": 1.4}
MODALITIES = tuple(FLOOR)
START = 7.9


@dataclass(frozen=True)
class Files:
    comparison: Path
    base: Path


@pytest.fixture
def comparison_files(tmp_path: Path) -> Callable[..., Files]:
    """Writes base.toml and compare.toml; `edit` maps the texts to what a test wants instead."""

    def write(
        base_edit: Callable[[str], str] = lambda text: text, edit: Callable[[str], str] = lambda text: text
    ) -> Files:
        base, comparison = tmp_path / "base.toml", tmp_path / "compare.toml"
        base.write_text(base_edit(BASE.format(runs=tmp_path / "runs")))
        comparison.write_text(edit(COMPARISON))
        return Files(comparison, base)

    return write


def power_law(step: float, floor: float, multiplier: float) -> float:
    """Loss of a run that learns `multiplier` times as fast per step, started at START."""
    return floor + (START - floor) * (1 + step * multiplier / 15) ** -0.55


@pytest.fixture
def write_runs() -> Callable[..., None]:
    return _write_runs


def _write_runs(
    plan: ComparisonPlan,
    multiplier: Callable[[str, str], float] = lambda arm, modality: 1.0,
    *,
    noise: float = 0.0,
    seed_noise: float = 0.0,
    shift: Callable[[str, str, float], float] = lambda arm, modality, frac: 0.0,
    run_shift: Callable[[PlannedRun, str], float] = lambda run, modality: 0.0,
    step_s: Callable[[str], float] = lambda arm: 0.1,
    flops_per_token: Callable[[str], float] = lambda arm: 3e6,
    fingerprint_salt: Callable[[str], str] = lambda arm: "",
    commit: Callable[[str], str] = lambda arm: "0123456789abcdef",
    device: Callable[[str], str] = lambda arm: "cpu",
    arithmetic: Callable[[str], str | None] = lambda arm: "AVX512",
    until: Callable[[str, int], int | None] = lambda arm, seed: None,
    causal_cost: float = 0.25,
    lost_steps: Callable[[str], int] = lambda arm: 0,
) -> None:
    """Write comparison.json and every run's files. `multiplier(arm, modality)` is the speed of learning that
    step matching has to find; `noise` moves each evaluation, `seed_noise` a whole run; `shift(arm, modality,
    share of the run)` is added to the curve, and `run_shift(run, modality)` to all of it; `until(arm, seed)`
    stops a run early (0: not started). Models that look ahead have a causal loss too, `causal_cost` above the
    other. `lost_steps(arm)`: steps that the rows count as lost to spikes."""
    write_plan(plan)
    for run in plan.next_runs:
        config, arm, seed = run.config, run.arm, run.seed
        stop = until(arm, seed)
        if stop == 0:
            continue
        salt = int.from_bytes(hashlib.sha256(f"{arm}{seed}".encode()).digest()[:8], "big")
        generator = np.random.Generator(np.random.Philox(salt))
        offset = {m: seed_noise * generator.standard_normal() for m in MODALITIES}
        rows = []
        for step in range(1, (stop or config.num_steps) + 1):
            row: dict[str, Any] = {"step": step, "tokens": step * config.tokens_per_step}
            due_eval = step % config.every_steps.eval == 0 or step == config.num_steps
            if step % config.every_steps.log and not due_eval:
                continue
            filled = 0.95 * row["tokens"]
            losses = {m: power_law(step, FLOOR[m], multiplier(arm, m)) for m in MODALITIES}
            row |= {f"train/loss/{m}": v + 0.05 * generator.standard_normal() for m, v in losses.items()}
            row["train/loss"] = float(np.mean([row[f"train/loss/{m}"] for m in MODALITIES]))
            row |= {f"train/tokens/{m}": int(filled / 3) for m in MODALITIES}
            row |= {
                "optim/learning_rate": 1e-3,
                "optim/grad_norm": 1.0,
                "data/epoch": 0.4,
                "data/fill_frac": 0.95,
            }
            row |= {
                "time/step_s": step_s(arm),
                "time/data_wait_s": 0.001,
                "time/train_s": step * (step_s(arm) + 0.001),
            }
            row |= {"speed/tokens_per_s": config.tokens_per_step / step_s(arm), "speed/mfu_frac": 0.31}
            row |= {"compute/train_flops": filled * flops_per_token(arm), "memory/peak_bytes": 9e8}
            if lost := lost_steps(arm):
                row |= {"train/spikes": 1, "train/lost_steps": lost}
                row["compute/lost_flops"] = lost / config.num_steps * filled * flops_per_token(arm)
            text = f"{fingerprint_salt(arm)}{seed}-{step}"
            row["data/fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]
            if due_eval:
                for m, value in losses.items():
                    wobble = noise * generator.standard_normal()
                    row[f"eval/loss/{m}"] = (
                        value
                        + offset[m]
                        + wobble
                        + shift(arm, m, step / config.num_steps)
                        + run_shift(run, m)
                    )
                row["eval/loss"] = float(np.mean([row[f"eval/loss/{m}"] for m in MODALITIES]))
                for a in MODALITIES:
                    for b in MODALITIES:
                        if a != b:
                            row[f"eval/loss/{a}_to_{b}"] = row[f"eval/loss/{b}"] - 0.2
                            row[f"eval/gain/{a}_to_{b}"] = 0.6 * step / config.num_steps * multiplier(arm, b)
                if not config.model.is_causal and config.model.has_causal_form:
                    causal = {n: v + causal_cost for n, v in row.items() if n.startswith("eval/")}
                    row |= {n.replace("eval/", "eval/causal/"): v for n, v in causal.items()}
            rows.append(row)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (config.run_dir / "config.resolved.json").write_text(config.model_dump_json())
        attempt = {
            "started": "2025-01-01T00:00:00+00:00",
            "stopped": "2025-01-01T00:10:00+00:00",
            "to_step": rows[-1]["step"],
            "command": ["motley", "train"],
            "host": "machine",
            "device": device(arm),
            "processor": "a processor",
            "arithmetic": arithmetic(arm),
            "layout": {"dp": 1, "tp": 1, "pp": 1},
            "commit": commit(arm),
            "diff": None,
            "versions": {"python": "3.11.0", "torch": "2.13.0"},
        }
        status = "done" if stop is None else "stopped"
        record = {"status": status, "attempts": [attempt]}
        if stop is None:
            record["metrics"] = {
                "rows": len(rows),
                "sha256": file_digest(config.run_dir / "metrics.jsonl")["sha256"],
            }
        (config.run_dir / "record.json").write_text(json.dumps(record))


@pytest.fixture
def synthetic_plan(comparison_files: Callable[..., Files]) -> Callable[..., ComparisonPlan]:
    """A plan of dense against mot, 600 steps, 3 seeds; keyword `seeds` and comparison edits."""

    def make(
        seeds: tuple[int, ...] = (1, 2, 3), edit: Callable[[str], str] = lambda text: text
    ) -> ComparisonPlan:
        files = comparison_files(edit=edit)
        return make_plan(files.comparison, [f"comparison.seeds={list(seeds)}"])

    return make


def timed(plan: ComparisonPlan, step_s: Callable[[str], float]) -> ComparisonPlan:
    """The plan as timing rounds leave it, which all took `step_s(arm)` a step."""
    timing = {run.size_arm: StepTiming((step_s(run.arm),) * 5) for run in plan.runs}
    runs = tuple(replace(run, step_s=step_s(run.arm)) for run in plan.runs)
    return replace(plan, timing=timing, runs=runs)


@pytest.fixture
def make_findings(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> Callable[..., Findings]:
    """Findings of a synthetic comparison: arguments of synthetic_plan, and of write_runs. With `step_s` it
    has timing rounds."""

    def make(
        seeds: tuple[int, ...] = (1, 2, 3), edit: Callable[[str], str] = lambda text: text, **how: Any
    ) -> Findings:
        plan = synthetic_plan(seeds=seeds, edit=edit)
        write_runs(plan, **how)
        if "step_s" in how:
            plan = timed(plan, lambda arm: how["step_s"](arm) + 0.001)
        return find(plan, load_results(plan))

    return make


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures (tests/undrawn.py)."""
    for name, figure in FIGURES.items():
        monkeypatch.setattr(name, undrawn(figure))


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 3, 4, written by one rank; copy before changing."""
    from tests.pretrain.toy_run import save_every_step  # the real engine: seconds of imports

    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    run_on_ranks(save_every_step, 1, folder, 4, 3)
    return folder


@pytest.fixture
def copy(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


@pytest.fixture(scope="session")
def turning_ladder(tmp_path_factory: pytest.TempPathFactory) -> LadderFindings:
    """Findings of a synthetic ladder in which mot is lower from 4 tokens per parameter on.

    Tests share it, so they may write nothing but its report.
    """
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "base.toml").write_text(BASE.format(runs=folder / "runs"))
    (folder / "compare.toml").write_text(COMPARISON + LADDER)
    plan = make_plan(folder / "compare.toml")
    _write_runs(plan, seed_noise=0.002, run_shift=falling)
    return find_ladder(plan, load_results(plan))


@pytest.fixture
def make_ladder(
    comparison_files: Callable[..., Files], write_runs: Callable[..., None]
) -> Callable[..., LadderFindings]:
    """Findings of a synthetic ladder of two sizes with three and two budgets; arguments of write_runs."""

    def make(ladder: str = LADDER, **how: Any) -> LadderFindings:
        plan = make_plan(comparison_files(edit=ladder_edit(ladder)).comparison)
        write_runs(plan, **how)
        return find_ladder(plan, load_results(plan))

    return make
