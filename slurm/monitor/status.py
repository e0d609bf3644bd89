"""`motley status`: a table of runs, or a page about one run.

This module imports no torch, and reads only the ends of files that grow.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from data_pipeline.files.printable import printable
from data_pipeline.files.toml_config import ConfigError
from pretrain.models.accounting import aligned
from pretrain.newest_rows import heldout_text
from pretrain.quantities import count, duration, percent
from pretrain.run_files import METRICS
from slurm.monitor.past import past
from slurm.monitor.state import RunState, ask_queue, read_state, seconds
from slurm.monitor.targets import ComparisonTarget, RunTarget, target, targets_under
from slurm.records import Attempt

RUNS = Path("runs")
_COLUMNS = [
    "run",
    "state",
    "job",
    "step",
    "of",
    "done",
    "tokens/s",
    "loss",
    "left",
    "attempts",
    "queue wait",
    "goodput",
]
_WHY_CHARACTERS = 72
_LEGEND = """\
loss: nats/token since the row before. left: steps to go at the pace of the last rows, with waits for data
and evaluation, without time in the queue. queue wait: of all attempts. goodput: seconds of the steps that
count over seconds of all attempts; the rest went into starting, evaluating, saving and lost steps."""


def status(
    paths: Sequence[str | Path] = (), overrides: Sequence[str] = (), *, to: TextIO | None = None
) -> int:
    """Print the state of runs and comparisons; without `paths`, of all in ./runs. Returns 0.

    Raises ConfigError for a path that is neither. If Slurm does not answer, the output says so and shows what
    the runs' records tell.
    """
    out = to or sys.stdout
    if not paths and (overrides or not RUNS.is_dir()):
        raise ConfigError("name a run's or a comparison's file or directory: there is no folder runs/ here")
    targets = [target(path, overrides) for path in paths] if paths else targets_under(RUNS)
    alone = [item for item in targets if isinstance(item, RunTarget)]
    groups = [item for item in targets if isinstance(item, ComparisonTarget)]
    queue, trouble = ask_queue([*alone, *(run for group in groups for run in group.runs)])
    now = time.time()
    blocks = []
    if len(targets) == len(alone) == 1:
        blocks.append(page(read_state(alone[0], queue, now=now)))
    elif alone:
        blocks.append(table([read_state(run, queue, now=now) for run in alone]))
    for group in groups:
        states = [read_state(run, queue, now=now) for run in group.runs]
        blocks.append([f"{group.directory}", *table(states), *_totals(group, states)])
    if not targets:
        blocks.append([f"no runs in {RUNS}/"])
    blocks.append(_LEGEND.splitlines())
    if trouble:
        blocks.append([f"{trouble.splitlines()[-1]}; this is from the records of the runs alone"])
    print("\n\n".join("\n".join(map(printable, block)) for block in blocks), file=out)
    return 0


def table(states: Sequence[RunState]) -> list[str]:
    """The lines of a table with a row per run."""
    rows = [[*_COLUMNS], *map(_cells, states)]
    whys = ["why it waits, or last stopped; what it lost", *map(_remarks, states)]
    return [f"{line}  {why}".rstrip() for line, why in zip(aligned(rows), whys, strict=True)]


def _cells(state: RunState) -> list[str]:
    of = state.num_steps
    return [
        state.directory.name,
        state.state,
        state.job or "-",
        count(state.step),
        "?" if of is None else count(of),
        "-" if of is None else percent(state.step / of),
        _speed(state),
        f"{state.row['train/loss']:.4f}" if "train/loss" in state.row else "-",
        "-" if state.left_s is None else duration(state.left_s),
        str(len(state.attempts)),
        duration(state.queue_wait_s),
        "-" if state.goodput_frac is None else percent(state.goodput_frac),
    ]


def _remarks(state: RunState) -> str:
    """Why a run waits or last stopped, after the data and the steps that it lost."""
    return _short("; ".join(filter(None, (_lost(state), _spikes(state), state.waits or state.why))))


def _lost(state: RunState) -> str | None:
    """The training documents that a run could not use, by its last row; None if it used all."""
    words = {"data/unreadable": "unreadable", "data/too_long": "longer than the context"}
    counts = [f"{count(state.row[name])} {what}" for name, what in words.items() if state.row.get(name)]
    return f"documents: {', '.join(counts)}" if counts else None


def _spikes(state: RunState) -> str | None:
    """What spikes of loss or gradient cost a run, by its last row; None if it met none."""
    row = state.row
    if not row.get("train/spikes"):
        return None
    share = percent(row["compute/lost_flops"] / row["compute/train_flops"], 1)
    return (
        f"spikes: {count(row['train/spikes'])}, {count(row['train/lost_steps'])} steps lost, {share} of FLOPs"
    )


def _totals(group: ComparisonTarget, states: Sequence[RunState]) -> list[str]:
    kinds = Counter(state.state for state in states)
    done, of = sum(state.step for state in states), sum(state.num_steps or 0 for state in states)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    share = f" ({percent(done / of)})" if of else ""
    report = group.directory / "report" / "index.html"
    return [
        f"{len(states)} runs: {counts}; {count(done)} of {count(of)} steps{share}",
        f"report: {report if report.exists() else 'not written yet'}",
    ]


def page(state: RunState) -> list[str]:
    """The lines of a page about one run and its attempts."""
    row, of = state.row, state.num_steps
    share = "" if of is None else f" of {count(of)} ({percent(state.step / of)})"
    lines = [f"{state.directory}: {state.state}" + (f", job {state.job}" if state.job else "")]
    facts = {"waits for": state.waits, "step": f"{count(state.step)}{share}"}
    if state.step_s is not None:
        pace = f"{_speed(state)} tokens/s; {state.step_s:.3g} s a step with waits and evaluation"
        facts["speed"] = pace
    if "train/loss" in row:
        parts = [
            f"{name.removeprefix('train/loss/')} {row[name]:.4f}"
            for name in row
            if name.startswith("train/loss/")
        ]
        facts["loss"] = (
            f"{row['train/loss']:.4f} nats/token ({', '.join(parts)}) at step {count(row['step'])}"
        )
    facts["held-out"] = heldout_text(state.directory / METRICS)
    facts["lost data"] = _lost(state)
    facts["lost steps"] = _spikes(state)
    facts["left"] = None if state.left_s is None else duration(state.left_s)
    facts["queue wait"] = f"{duration(state.queue_wait_s)} in all"
    facts["goodput"] = None if state.goodput_frac is None else percent(state.goodput_frac)
    facts["last stop"] = state.why
    lines += [f"  {name:<12}{value}" for name, value in facts.items() if value]
    lines += [f"  {'past':<12}{line}" for line in past(state.directory)]
    if state.attempts:
        lines += ["", "attempts"]
    for number, attempt in enumerate(state.attempts):
        lines += _attempt(number, attempt)
    return [*lines, "", f"logs: motley logs {state.directory} [-f] [--rank R] [--attempt K]"]


def _attempt(number: int, attempt: Attempt) -> list[str]:
    job = "without Slurm" if attempt["job"] is None else f"job {attempt['job']}"
    if attempt["task"] is not None:
        job += f"_{attempt['task']}"
    start, end = seconds(attempt["started"]), seconds(attempt["ended"])
    took = "" if start is None or end is None else f", {duration(end - start)}"
    ended = "" if attempt["exit_code"] is None else f", exit code {attempt['exit_code']}"
    cause = f", cause: {attempt['cause']['kind']}" if attempt.get("cause") else ""
    excluded = f", nodes found bad: {', '.join(attempt['excluded'])}" if attempt.get("excluded") else ""
    steps = (
        f"steps {attempt['from_step'] or 0} -> {'?' if attempt['to_step'] is None else attempt['to_step']}"
    )
    lines = [
        f"  {number}  {job} on {attempt['nodes']}, {steps}{took}{ended}{cause}{excluded}: {attempt['next']}"
    ]
    return [*lines, f"     {attempt['reason']}"] if attempt["reason"] else lines


def _speed(state: RunState) -> str:
    return count(state.row["speed/tokens_per_s"]) if "speed/tokens_per_s" in state.row else "-"


def _short(text: str) -> str:
    return text if len(text) <= _WHY_CHARACTERS else f"{text[: _WHY_CHARACTERS - 3]}..."
