"""One TensorBoard board with the curves of all arms: a folder of event files, one for every run.

    tensorboard --logdir runs/NAME/report/tensorboard

The tags are equal in all runs, so that a chart holds a modality's held-out losses of all arms. This module
imports no torch.
"""

import io
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file
from pretrain.comparison.findings import Findings, metric_name
from pretrain.comparison.results import HELD_OUT, RunResult

FOLDER = "tensorboard"
_EVENTS = "events.out.tfevents.0.motley"


def write_board(findings: Findings, folder: Path) -> None:
    """Write the event files of all runs in scope; those of runs that are no longer there are removed."""
    names = {run.planned.name for run in findings.results}
    for run in findings.results:
        (folder / run.planned.name).mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / run.planned.name / _EVENTS) as file:
            file.write(events(findings, run))
    for other in folder.iterdir():
        if other.name not in names:
            shutil.rmtree(other)


def events(findings: Findings, run: RunResult) -> bytes:
    """The event file of one run. Its wall time is the seconds of training, so that equal findings give equal
    bytes and TensorBoard's relative time is that of training."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    # protobuf creates the classes of these modules at import, where type checkers do not see them.
    event_pb2: Any = import_module("tensorboard.compat.proto.event_pb2")
    summary_pb2: Any = import_module("tensorboard.compat.proto.summary_pb2")
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(event_pb2.Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
    for tag, step, seconds, value in _scalars(findings, run):
        scalar = summary_pb2.Summary.Value(tag=tag, simple_value=value)
        event = event_pb2.Event(wall_time=seconds, step=step, summary=summary_pb2.Summary(value=[scalar]))
        writer.write(event.SerializeToString())
    writer.flush()
    return buffer.getvalue()


def _scalars(findings: Findings, run: RunResult) -> Iterator[tuple[str, int, float, float]]:
    """(tag, step, seconds of training as the run measured them, value) of all losses of a run."""
    metrics = [metric_name(m) for m in findings.outcomes]
    measured = {row["step"]: float(row.get("time/train_s", 0.0)) for row in run.rows}
    for metric in (*metrics, *(name.replace(HELD_OUT, "train/") for name in metrics)):
        curve = run.curve(metric, until=findings.scope.until(run))
        for step, value in zip(curve.steps, curve.values, strict=True):
            yield metric, int(step), measured[int(step)], float(value)
