"""The results of a comparison's runs, read back as curves. This module imports no torch."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from data_pipeline.files.printable import first_names
from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.foreign.question import ForeignRun
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.run_documents import RunDocuments, read_documents
from pretrain.config import RunConfig
from pretrain.lineage.branch import rows_of_trunk
from pretrain.metrics import read_rows
from pretrain.run_dir import read_record
from pretrain.run_files import METRICS
from pretrain.run_identity import (
    check_files_are_there,
    check_resolved_config,
    check_rows_of_run,
    check_sealed_rows,
    identity_of,
)

HELD_OUT = "heldout/"
"""Prefix of a held-out metric of any run. It stands for eval/causal/ in runs whose rules look ahead, unless
eval/loss decides, and for eval/ in all other runs."""
AXES = ("steps", "tokens", "flops", "seconds")
"""Axes along which two curves are matched. In a comparison that Motley runs, tokens are steps times a number
that all arms share."""
CURVE_AXES = ("tokens", "flops", "seconds", "steps")
"""Axes against which curves are drawn."""
NAMES_SHOWN = 5
"""Number of documents that a sentence names; summary.json has all."""
_COLUMN = {"steps": "step", "tokens": "tokens", "flops": "compute/train_flops", "seconds": "time/train_s"}
_DIRECTION = re.compile(r"eval/loss/([A-Za-z0-9-]+)_to_([A-Za-z0-9-]+)\Z")


@dataclass(frozen=True)
class Curve:
    """One metric of one run, at the rows that hold it."""

    steps: Float[np.ndarray, " points"]
    tokens: Float[np.ndarray, " points"]
    flops: Float[np.ndarray, " points"]
    seconds: Float[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]

    def x(self, axis: str) -> Float[np.ndarray, " points"]:
        """The positions of the points along "steps", "tokens", "flops" or "seconds"."""
        return getattr(self, axis)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, steps: np.ndarray) -> "Curve":
        """The curve at the points whose step is in `steps`."""
        chosen = np.isin(self.steps, steps)
        return Curve(
            *(column[chosen] for column in (self.steps, self.tokens, self.flops, self.seconds, self.values))
        )


def aligned(curves: Sequence[Curve]) -> tuple[Curve, ...]:
    """The curves at the steps that all of them have. A row lacks the loss of a modality without targets."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    return tuple(curve.at(steps) for curve in curves)


@dataclass(frozen=True)
class RunResult:
    """The rows of metrics.jsonl and the record of one run."""

    planned: PlannedRun | ForeignRun
    rows: tuple[dict[str, Any], ...]
    record: dict[str, Any]
    prefix: str = "eval/"
    """The prefix in this run's rows that HELD_OUT stands for."""
    total: str = "eval/loss"
    """The metric that tells how far a run has been evaluated, and whether it diverged."""
    documents: RunDocuments | None = None
    """Its losses per held-out document after the last step; None if it kept none."""

    @property
    def arm(self) -> str:
        return self.planned.arm

    @property
    def seed(self) -> int:
        return self.planned.seed

    @property
    def config(self) -> RunConfig:
        """Its config. A run of which only a log is known has none."""
        assert isinstance(self.planned, PlannedRun), f"{self.planned.name}: only its log is known"
        return self.planned.config

    @property
    def last_eval_step(self) -> int:
        """Step of the last row with a held-out loss; 0 before the first."""
        return max((row["step"] for row in self.rows if self.total in row), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last step has been evaluated."""
        return self.last_eval_step >= self.planned.num_steps

    @property
    def unreadable(self) -> tuple[str, ...]:
        """The training documents that the run could not read, each once."""
        return tuple(name for row in self.rows for name in row.get("data/unreadable_documents", ()))

    def lost(self, metric: str, *, until: int | None = None) -> float:
        """The last value, up to step `until`, of a metric that counts spikes or what they lost; 0 if no row
        holds it, as in a run that does not look for spikes."""
        values = self.curve(metric, until=until).values
        return float(values[-1]) if len(values) else 0.0

    def curve(self, metric: str, *, until: int | None = None) -> Curve:
        """The curve of a metric up to step `until`; it is empty if no row holds the metric. Its seconds are
        those of timing rounds, and nan without them; of runs made elsewhere those of the log."""
        if metric.startswith(HELD_OUT):
            metric = self.prefix + metric.removeprefix(HELD_OUT)
        rows = [r for r in self.rows if metric in r and (until is None or r["step"] <= until)]
        columns = {
            axis: np.array([r.get(name, np.nan) for r in rows], float) for axis, name in _COLUMN.items()
        }
        if isinstance(self.planned, PlannedRun):  # its own seconds may be those of a shared machine
            columns["seconds"] = columns["steps"] * (self.planned.step_s or np.nan)
        return Curve(**columns, values=np.array([r[metric] for r in rows], float))

    def directions(self) -> list[tuple[str, str]]:
        """(a, b) of every eval/loss/<a>_to_<b> that the run measured."""
        names = {name for row in self.rows for name in row}
        return sorted(m.groups() for m in map(_DIRECTION.match, names) if m)  # type: ignore[misc]


def load_results(plan: ComparisonPlan) -> tuple[RunResult, ...]:
    """The results of all planned runs; a run that has not started has no rows.

    Raises ConfigError for files that a run cannot have written, or that have changed since.
    """
    causally = plan.config.deciding_metric == "eval/causal/loss"
    return tuple(load_run(planned, causally) for planned in plan.runs)


def load_run(planned: PlannedRun, causally: bool) -> RunResult:
    """The result of one run, judged by its causal form if `causally`. The rows of a branch begin with those
    of its trunk. Raises ConfigError as load_results."""
    folder = planned.config.run_dir
    rows = read_rows(folder / METRICS)
    steps = [row["step"] for row in rows]
    for before, after in pairwise(steps):
        if after <= before:
            raise ConfigError(
                f"{folder / METRICS}: a row of step {after} follows one of step {before}; "
                "a run writes each step once, so two runs have written here"
            )
    check_files_are_there(folder)
    record = read_record(folder)
    identity = identity_of(record)
    check_resolved_config(folder, identity)
    check_rows_of_run(folder / METRICS, rows, identity)
    check_sealed_rows(folder / METRICS, record)
    if steps and steps[-1] > planned.config.num_steps:
        raise ConfigError(
            f"{folder}: the run was extended to {steps[-1]} steps or more, and this comparison is of "
            f"{planned.config.num_steps}; set total_tokens to the longer one, or take the run out and train "
            "it again"
        )
    rows = [*map(json.loads, rows_of_trunk(folder, record).splitlines()), *rows]
    prefix = "eval/" if planned.config.model.is_causal or not causally else "eval/causal/"
    documents = read_documents(folder, record, prefix, planned.config.image_weights)
    return RunResult(planned=planned, rows=tuple(rows), record=record, prefix=prefix, documents=documents)


@dataclass(frozen=True)
class Fingerprints:
    """Evidence that arms read the same data in the same order: a run chains a hash over all it reads."""

    compared: dict[int, int]
    """By seed of two runs or more, the number of logged steps at which the hashes of all were compared."""
    last: dict[int, str]
    """By seed, the hash at the last of these steps."""
    broken: tuple[str, ...]
    """A sentence for every arm and seed whose hashes differ, with the documents that do, where known, and one
    if held-out data differ."""
    unreadable: dict[str, tuple[str, ...]]
    """By name of a run, the training documents that it could not read; runs without any are left out."""
    stated: bool = False
    """Whether the makers of logs without hashes state that all arms read the same data."""

    @property
    def proven(self) -> bool:
        """Whether hashes were compared for every such seed, and all were equal."""
        return not self.broken and bool(self.compared) and all(self.compared.values())

    @property
    def accepted(self) -> bool:
        """Whether the data counts as the same: it is proven, or stated and nothing speaks against it."""
        return self.proven or (self.stated and not self.broken)


def compare_fingerprints(results: Iterable[RunResult], *, stated: bool = False) -> Fingerprints:
    """Compare data/fingerprint between the runs of a seed, at every step that all of them logged."""
    by_seed: dict[int, list[tuple[RunResult, dict[int, str]]]] = {}
    for run in results:
        hashes = {r["step"]: str(r["data/fingerprint"]) for r in run.rows if "data/fingerprint" in r}
        by_seed.setdefault(run.seed, []).append((run, hashes))
    compared: dict[int, int] = {}
    last: dict[int, str] = {}
    broken = []
    for seed, runs in by_seed.items():
        if len(runs) == 1:
            continue
        common = sorted(set.intersection(*(set(hashes) for _, hashes in runs)))
        compared[seed] = len(common)
        (first, ours), *others = runs
        for run, theirs in others:
            differ = [step for step in common if ours[step] != theirs[step]]
            if differ:
                broken.append(
                    f"seed {seed}: {run.arm} and {first.arm} had read different data by step {differ[0]}; "
                    f"{_different_documents(run, first)}"
                )
        if common:
            last[seed] = ours[common[-1]]
    broken += _different_heldout([run for runs in by_seed.values() for run, _ in runs])
    unreadable = {run.planned.name: run.unreadable for runs in by_seed.values() for run, _ in runs}
    return Fingerprints(
        compared=compared,
        last=last,
        broken=tuple(broken),
        unreadable={name: documents for name, documents in unreadable.items() if documents},
        stated=stated,
    )


def _different_heldout(runs: Sequence[RunResult]) -> list[str]:
    """A sentence if runs were not all evaluated on the same held-out data, as far as their rows tell."""
    name = "data/heldout_fingerprint"
    by_print: dict[str, list[str]] = {}
    for run in runs:
        for value in {str(row[name]) for row in run.rows if name in row}:
            by_print.setdefault(value, []).append(run.planned.name)
    if len(by_print) < 2:
        return []
    groups = "; ".join(f"{', '.join(names)} on {value}" for value, names in sorted(by_print.items()))
    return [f"they were evaluated on different held-out data: {groups}"]


def _different_documents(run: RunResult, other: RunResult) -> str:
    """Why two runs read different data, as far as their rows and records tell."""
    parts = [
        f"{one.arm} went back to a checkpoint and on with later data (on_spike)"
        for one in (run, other)
        if any(event.get("back_to") is not None for event in one.record.get("spikes", {}).get("events", ()))
    ]
    parts += [
        f"{one.arm} alone could not read {len(names)} documents ({first_names(names, NAMES_SHOWN)})"
        for one, another in ((run, other), (other, run))
        if (names := [name for name in one.unreadable if name not in set(another.unreadable)])
    ]
    return ", ".join(parts) or "which documents differ is not known: none was unreadable in one of them alone"
