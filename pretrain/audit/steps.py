"""Files of a run and the index of its data tell which sequences of the stream each step consumed.

step of the data    1  2  3  4  5  6  7  8       each takes the next sequences of the stream
step of the run     1  2  3  4  5  4  5  6       after a spike at 5 that led back to the checkpoint of 3
in the weights      x  x  x                x  x  x
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.stream.stream import BlockPlan, Stream, StreamState
from pretrain.checkpoint.folder import STATE, checkpoints
from pretrain.config import RunConfig, load
from pretrain.metrics import read_rows
from pretrain.run_dir import read_record
from pretrain.run_files import CHECKPOINTS, CONFIG, METRICS
from pretrain.training_stream import training_stream


class Went(NamedTuple):
    """A step of the data, and what became of it."""

    step: int
    """The number of the run's step."""
    is_kept: bool
    """Whether its update is in the weights; False for spikes, and for steps that the run went back behind."""


class SpikeAt(NamedTuple):
    """A spike of record.json."""

    step: int
    back_to: int | None


@dataclass(frozen=True)
class ConsumedStep:
    """A step of the data with the sequences that it holds."""

    went: Went
    first_sequence: int
    """The number of its first sequence in the stream."""
    plan: BlockPlan


@dataclass(frozen=True)
class RunData:
    """A run's data, and what its files say of the steps that were made."""

    folder: Path
    config: RunConfig
    stream: Stream
    start: StreamState
    went: tuple[Went, ...]
    """Of each step of the data."""
    rows: tuple[dict[str, object], ...]
    """Rows of metrics."""


def open_run(path: Path) -> RunData:
    """A run directory, or its TOML file. Raises ConfigError without a run, or where its data is gone."""
    folder = load(path).run_dir if path.is_file() else path
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no run directory (no {CONFIG}); legal: one, or the RUN.toml of one")
    config = load(folder / CONFIG)
    stream, rows = training_stream(config, config.data.remote), read_rows(folder / METRICS)
    saved = [
        json.loads((place / STATE).read_text())["state"] for _, place in checkpoints(folder / CHECKPOINTS)
    ]
    states = [StreamState.from_json(state["stream"]) for state in saved]
    for state in states:
        stream.check(state)
    order = states[-1].order if states else stream.start().order
    made = max([0, *(row["step"] for row in rows), *(state["step"] for state in saved)])
    events = read_record(folder).get("spikes", {}).get("events", [])
    spikes = [SpikeAt(event["step"], event["back_to"]) for event in events]
    start = replace(stream.start(), order=order)
    return RunData(folder, config, stream, start, tuple(what_went(made, spikes)), tuple(rows))


def what_went(last_step: int, spikes: Sequence[SpikeAt]) -> list[Went]:
    """Tell what became of each step of the data, of a run that stands at `last_step`. `spikes`: oldest first.
    Raises ConfigError for spikes that no run meets in this order."""
    found: list[Went] = []
    step, following = 0, list(spikes)
    while step < last_step or following:
        if following and following[0].step <= step:
            raise ConfigError(f"record.json: spikes: one at step {following[0].step} comes after step {step}")
        step += 1
        is_spike = bool(following) and following[0].step == step
        found.append(Went(step, not is_spike))
        if is_spike and (back_to := following.pop(0).back_to) is not None:
            found = [went if went.step <= back_to else went._replace(is_kept=False) for went in found]
            step = back_to
    return found


def consumed_steps(run: RunData, more: int = 0) -> Iterator[ConsumedStep]:
    """The steps of the data that a run made, in order, and `more` that come next."""
    state, last = run.start, run.went[-1].step if run.went else 0
    for went in (*run.went, *(Went(last + 1 + i, False) for i in range(more))):
        first = state.sequences
        plan, state = run.stream.plan_step(state)
        yield ConsumedStep(went, first, plan)
