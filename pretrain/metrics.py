"""The metrics of a run: the table of their names, the sums behind a row, and metrics.jsonl.

metrics.jsonl is the record of a run; the TensorBoard files are a view of it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.files.os_errors import naming
from data_pipeline.files.toml_config import ConfigError
from pretrain import run_files
from pretrain.run_identity import RunIdentity, check_rows_of_run
from pretrain.tensorboard_view import TensorBoardView

Sums = dict[str, float]
"""Sums over optimizer steps by name. They are plain numbers, so a checkpoint holds them unchanged."""

RouterSums = dict[str, Sums]
"""Name of a router, such as "blocks.3.depth.image" -> its sums, by the names of its counts
(pretrain/models/router_report.py)."""

SPENT = ("steps", "tokens", "flops", "step_s", "wait_s", "fill")
"""What a step consumes and costs, whether its update is kept or not."""
STEP_KEYS = (*SPENT, "grad_norm")


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    `name` may hold placeholders: <m>, <a> and <b> for modalities, <tower> for a tower, <layer> for a number
    from 0, <quarter> for one from 1 to 4.
    """

    name: str
    unit: str
    reduction: str
    meaning: str


_SINCE = "since the last row"
_UNWEIGHTED = "(unweighted: loss_weights act on the objective alone)"
_IMAGES = "; with vectors: the mean over ids plus loss_weights times the mean over images"
_VECTORS = "(of vectors: mean squared error per number, mean over images)"
METRICS = (
    Metric("step", "steps", "last", "optimizer steps done"),
    Metric("run", "hex", "last", "id of the run, as in its record.json and checkpoints"),
    Metric("tokens", "slots", "cumulative", "slots of the global batches consumed, padding included"),
    Metric(
        "train/loss",
        "nats/token",
        "sum/count",
        f"training loss of all targets {_UNWEIGHTED} {_SINCE} {_IMAGES}",
    ),
    Metric(
        "train/loss/<m>",
        "nats/token",
        "sum/count",
        f"training loss of the modality's targets {_SINCE} {_VECTORS}",
    ),
    Metric("train/tokens/<m>", "targets", "cumulative", "targets of the modality that updates learned from"),
    Metric(
        "eval/loss",
        "nats/token",
        "sum/count",
        f"loss of all targets of the fixed held-out sequences {_UNWEIGHTED} {_IMAGES}",
    ),
    Metric("eval/loss/<m>", "nats/token", "sum/count", f"loss of the modality's held-out targets {_VECTORS}"),
    Metric(
        "eval/loss/<m>/time_<quarter>",
        "squared error",
        "sum/count",
        "of a modality of vectors: loss of the images with times in this quarter, 1 with the least noise",
    ),
    Metric(
        "eval/loss/<a>_to_<b>", "nats/token", "sum/count", "loss of held-out parts of b after their own a"
    ),
    Metric(
        "eval/gain/<a>_to_<b>",
        "nats/token",
        "difference",
        "loss of b after a foreign a minus loss after its own a",
    ),
    Metric(
        "eval/documents/loss",
        "nats/token",
        "sum/count",
        "loss of all targets of the documents of documents.json, after the last step",
    ),
    Metric("eval/documents/loss/<m>", "nats/token", "sum/count", "loss of the modality's targets in these"),
    Metric("eval/causal/documents/loss", "nats/token", "sum/count", "eval/documents/loss by thresholds"),
    Metric(
        "eval/causal/documents/loss/<m>", "nats/token", "sum/count", "eval/documents/loss/<m> by thresholds"
    ),
    Metric("eval/causal/loss", "nats/token", "sum/count", "eval/loss with all tokens chosen by thresholds"),
    Metric(
        "eval/causal/loss/<m>",
        "nats/token",
        "sum/count",
        "eval/loss/<m> with all tokens chosen by thresholds",
    ),
    Metric(
        "eval/causal/loss/<m>/time_<quarter>",
        "squared error",
        "sum/count",
        "eval/loss/<m>/time_<quarter> with all tokens chosen by thresholds",
    ),
    Metric("eval/causal/loss/<a>_to_<b>", "nats/token", "sum/count", "eval/loss/<a>_to_<b> by thresholds"),
    Metric("eval/causal/gain/<a>_to_<b>", "nats/token", "difference", "eval/gain/<a>_to_<b> by thresholds"),
    Metric(
        "eval/facts/<a>_to_<b>/exact",
        "1",
        "mean",
        "share of generated parts b that state exactly the digits of their part a (evaluate.generate)",
    ),
    Metric(
        "eval/facts/<a>_to_<b>/per_digit", "1", "sum/sum", "digits in common over the larger number of digits"
    ),
    Metric(
        "eval/facts/<a>_to_<b>/foreign_exact", "1", "mean", "the same against the part a of the next sample"
    ),
    Metric("eval/facts/<a>_to_<b>/foreign_per_digit", "1", "sum/sum", "the same against the next part a"),
    Metric(
        "eval/facts/<a>_to_<b>/judge_exact", "1", "mean", "the judge's own share on what was not generated"
    ),
    Metric(
        "eval/facts/<a>_to_<b>/judge_per_digit", "1", "sum/sum", "the judge's own on what was not generated"
    ),
    Metric(
        "eval/facts/<a>_to_<b>/frechet",
        "1",
        "distance",
        "Frechet distance, over features of the judge of digits, of samples to pictures of held-out scans",
    ),
    Metric("eval/facts/<a>_to_<b>/truth_frechet", "1", "distance", "the same of the prompts' true pictures"),
    Metric("depth/ratio/<m>", "1", "mean", "mean of depth/ratio/<m>/<layer> over the layers with a router"),
    Metric("depth/ratio/<m>/<layer>", "1", "sum/count", f"share of tokens that may skip which ran {_SINCE}"),
    Metric("depth/gate_std/<m>", "1", "sum/count", f"standard deviation of the depth gates {_SINCE}"),
    Metric(
        "experts/load_max_over_mean/<tower>",
        "1",
        "mean",
        f"load of a layer's busiest expert over the mean load {_SINCE}",
    ),
    Metric("experts/drop_frac/<tower>", "1", "mean", f"share of tokens that no expert took {_SINCE}"),
    Metric(
        "experts/load_balance/<tower>", "1", "mean", "load-balance loss before its weight; 1 for even loads"
    ),
    Metric(
        "experts/router_z/<tower>",
        "1",
        "mean",
        "router z-loss before its weight: log^2 of the summed exponentials",
    ),
    Metric("optim/learning_rate", "1", "last", "base learning rate of the step, before factors of towers"),
    Metric("optim/grad_norm", "1", "mean", f"L2 norm of the gradient before clipping, {_SINCE}"),
    Metric("optim/grad_norm/<tower>", "1", "mean", f"the norm over the weights of a tower, {_SINCE}"),
    Metric("time/step_s", "s", "mean", f"forward, backward and update {_SINCE}"),
    Metric("time/data_wait_s", "s", "mean", f"waiting for the batch, slowest rank, {_SINCE}"),
    Metric("time/eval_s", "s", "last", "evaluating after this step, held-out and conditional losses"),
    Metric(
        "time/train_s",
        "s",
        "cumulative",
        "steps and waits, over all attempts, but for steps that a kill lost",
    ),
    Metric("speed/tokens_per_s", "slots/s", "ratio", f"slots over step and wait time {_SINCE}"),
    Metric("speed/mfu_frac", "1", "ratio", "model FLOPs over step and wait time and peak of all devices"),
    Metric("compute/train_flops", "FLOP", "cumulative", "model FLOPs of slots with a token, backward = 2x"),
    Metric("train/spikes", "steps", "cumulative", "steps whose loss or gradient leapt (on_spike)"),
    Metric("train/lost_steps", "steps", "cumulative", "steps left out or taken back because of spikes"),
    Metric("train/lost_tokens", "slots", "cumulative", "the part of tokens that lost steps consumed"),
    Metric("compute/lost_flops", "FLOP", "cumulative", "the part of compute/train_flops in lost steps"),
    Metric("time/lost_s", "s", "cumulative", "the part of time/train_s in lost steps"),
    Metric("train/inherited_tokens", "slots", "last", "of a branch: the part of tokens in its trunk"),
    Metric("compute/inherited_flops", "FLOP", "last", "of a branch: the part of compute/train_flops there"),
    Metric("time/inherited_s", "s", "last", "of a branch: the part of time/train_s there"),
    Metric("memory/peak_bytes", "byte", "max", "rank 0: allocated on the GPU, or resident on a CPU"),
    Metric("data/fill_frac", "1", "mean", f"share of slots that hold a token {_SINCE}"),
    Metric("data/epoch", "epochs", "last", "passes over the source that has been read most often"),
    Metric("data/fingerprint", "hex", "last", "chained hash of all bytes that were read, in order"),
    Metric("data/heldout_fingerprint", "hex", "last", "hash of all held-out ids that an evaluation reads"),
    Metric("data/too_long", "documents", "last", "documents left out, a span is longer than the context"),
    Metric("data/masked_targets", "targets", "cumulative", "targets of context, without loss"),
    Metric("data/unreadable", "documents", "cumulative", "documents not read as indexed, over all attempts"),
    Metric("data/unreadable_documents", "names", "list", f"those of data/unreadable that were new {_SINCE}"),
)
METRICS += tuple(
    Metric(f"eval/ema{m.name[4:]}", m.unit, m.reduction, f"{m.name} of the moving average of weights")
    for m in METRICS
    if m.name.startswith("eval/")
)

_NAME = "[A-Za-z0-9-]+"
_PATTERNS = tuple(
    (
        re.compile(
            re.sub(r"<(m|a|b)>", _NAME, metric.name)
            .replace("<tower>", ".+")
            .replace("<layer>", "[0-9]+")
            .replace("<quarter>", "[1-4]")
            + r"\Z"
        ),
        metric,
    )
    for metric in METRICS
)


def metric(name: str) -> Metric:
    """The row of METRICS for a concrete name. Raises KeyError for a name that has none."""
    for pattern, metric in _PATTERNS:
        if pattern.match(name):
            return metric
    raise KeyError(f'"{name}" is not in METRICS (pretrain/metrics.py)')


MASKED = "masked_targets"
"""The name of a sum that only data with context parts has."""


def add(total: Mapping[str, float], more: Mapping[str, float]) -> Sums:
    """The sums of two mappings by name; a name that one of them lacks counts as 0."""
    return {name: total.get(name, 0.0) + more.get(name, 0.0) for name in total.keys() | more.keys()}


def add_by_router(total: Mapping[str, Sums], more: Mapping[str, Sums]) -> RouterSums:
    """Sums of routers with `more` added; routers that are missing count as 0."""
    return {name: add(total.get(name, {}), more.get(name, {})) for name in total.keys() | more.keys()}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A half-written last line, from a process that was killed, is ignored.

    Raises ConfigError, naming the line, for any other line that is not a row.
    """
    rows, _ = _parse(Path(path), _content(Path(path)))
    return rows


def rows_up_to(path: Path, step: int) -> tuple[bytes, bytes]:
    """The bytes of a metrics.jsonl: (rows up to `step`, what stands behind them)."""
    content = _content(path)
    rows, ends = _parse(path, content)
    kept = sum(row["step"] <= step for row in rows)
    end = ends[kept - 1] if kept else 0
    return content[:end], content[end:]


def _content(path: Path) -> bytes:
    with naming(path):
        return path.read_bytes() if path.exists() else b""


def _parse(path: Path, content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows, the byte offsets at which they end)."""
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    end = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        end += len(line)
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
            if row is not None:
                rows.append(row | {"step": int(row["step"])})
                ends.append(end)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}, line {number}: not a row of metrics ({error}); was it edited?"
            ) from None
    return rows, ends


class MetricsLog:
    """The writer of metrics.jsonl, one flushed line a row, and of the TensorBoard files beside it.

    It is opened by an attempt (a number from 0) of a run at `step` with `num_rows` rows, whose bytes have the
    digest `sha256`, if that is known. Rows that a killed attempt wrote after that step are dropped, here and
    in TensorBoard, so that steps have no gap and no duplicate. Raises ConfigError if rows are of another run,
    or if those that the checkpoint counted are missing or changed.
    """

    def __init__(
        self, run_dir: Path, run: RunIdentity, *, attempt: int, step: int, num_rows: int, sha256: str
    ) -> None:
        self.path, self._run = run_dir / run_files.METRICS, run
        self._drop_after(step, num_rows, sha256)
        self._file: TextIO = self.path.open("a")
        self.tensorboard = TensorBoardView(
            run_dir / run_files.TENSORBOARD, attempt=attempt, purge_from_step=step + 1
        )

    def go_back(self, *, step: int, num_rows: int, sha256: str) -> None:
        """Drop the rows after `step`, which the attempt itself has written, as one that starts there does."""
        self._drop_after(step, num_rows, sha256)
        self.tensorboard.purge(step + 1)

    def _drop_after(self, step: int, num_rows: int, sha256: str) -> None:
        content = _content(self.path)
        rows, ends = _parse(self.path, content)
        check_rows_of_run(self.path, rows, self._run)
        kept = sum(row["step"] <= step for row in rows)
        content = content[: ends[kept - 1] if kept else 0]
        self._digest = hashlib.sha256(content)
        if kept != num_rows or (sha256 and self.sha256 != sha256):
            there = f"{kept} rows" if kept != num_rows else "other rows (SHA-256 differs)"
            raise ConfigError(
                f"{self.path}: holds {there} up to step {step}, but the checkpoint of that step was made "
                f"after {num_rows}; put the file back, or start again under another name=..."
            )
        if self.path.exists():
            os.truncate(self.path, len(content))
        self.num_rows = num_rows
        self.train_losses = [row["train/loss"] for row in rows[:kept] if "train/loss" in row]
        """Training loss of every row that has one, in nats/token, oldest first."""

    @property
    def sha256(self) -> str:
        """The digest of all rows that were written."""
        return self._digest.hexdigest()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row. Raises KeyError for a name that is not in METRICS."""
        row = {"step": step, "run": self._run.id, **values}
        for name in row:
            metric(name)
        line = json.dumps(row, allow_nan=False) + "\n"
        with naming(self.path):
            self._file.write(line)
            self._file.flush()
        self._digest.update(line.encode())
        self.num_rows += 1
        self.train_losses += [values["train/loss"]] if "train/loss" in values else []
        self.tensorboard.write(step, values)

    def sync(self) -> str:
        """Sync the rows to disk, before a checkpoint that counts them is written; returns their digest."""
        with naming(self.path):
            os.fsync(self._file.fileno())
        return self.sha256

    def close(self) -> None:
        with naming(self.path):
            self._file.close()
        self.tensorboard.close()
