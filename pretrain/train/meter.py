"""What a step costs and shows: sums over all ranks, rows of the run's metrics, the line on the terminal."""

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from data_pipeline.files.progress import Progress
from data_pipeline.stream.loader import StepBatch
from parallel.engine import StepResult
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.evaluation.losses import HeldoutImages
from pretrain.evaluation.selection_picture import sheet
from pretrain.metric_rows import inherited_row, step_sums, train_row
from pretrain.metrics import MASKED, MetricsLog, Sums
from pretrain.models import modality_sums
from pretrain.models.accounting import train_flops
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport
from pretrain.run_dir import RunDir
from pretrain.tensorboard_view import TensorBoardView
from pretrain.train import depth_steps, expert_steps
from pretrain.train.device_peak import device_name, measure_peak_flops, peak_key
from pretrain.train.peak_table import table_peak_flops
from pretrain.train.rising_loss import stays_above_start, warning
from pretrain.train.spikes import lost_row
from pretrain.train.state import TrainState

LOG_EVERY_S = 10.0


class Meter:
    """Measures on every rank, writes and shows on rank 0. Use as a context manager."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        run: RunDir | None,
        state: TrainState,
        *,
        num_too_long: int,
    ) -> None:
        """`run`: the open run directory on rank 0, None on the others. `num_too_long`: as in Stream."""
        self._config, self._world, self._run = config, world, run
        self._num_too_long = num_too_long
        self._step_s = 0.0
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        if run is not None:
            self._log = MetricsLog(
                run.path,
                run.identity,
                attempt=len(run.record["attempts"]) - 1,
                step=state.step,
                num_rows=state.num_rows,
                sha256=state.rows_sha256,
            )
            self._has_warned = stays_above_start(self._log.train_losses)
            self._progress = Progress(
                config.name, config.num_steps, "step", done=state.step, log_every_s=LOG_EVERY_S
            )
            self._inherited = inherited_row(run.record)
            self._peak_flops = world.world_size * _peak_flops(config, world.device, run)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time one step. It ends in a result that the host has read, so the device has ended too."""
        began = time.perf_counter()
        yield
        self._step_s = time.perf_counter() - began

    def sums(
        self,
        batch: StepBatch,
        inputs: Sequence[ModelInputs],
        result: StepResult,
        report: RouterReport,
    ) -> Sums:
        """What the step that was timed last adds, over all ranks. All call it; times are each rank's own.
        `report`: that of the routers of all ranks."""
        config, modalities = self._config, self._config.model.modalities
        mine = [0.0] * (3 + len(modalities))
        for each in inputs:
            vectors = each.vectors.values()
            masked = (
                sum(each.input_tokens) - sum(each.weight_per_modality) - sum(v.num_slots for v in vectors)
            )
            images = sum(len(each.vectors[m].times) for m in config.model.learned_vectors)
            counts = (masked, each.visible_pairs, images, *each.input_tokens)
            mine = [total + count for total, count in zip(mine, counts, strict=True)]
        masked_targets, pairs, num_images, *summed = map(int, self._world.sum_over_dp(mine))
        tokens = dict(zip(modalities, summed, strict=True))
        skipped = depth_steps.skipped(config.model, report, pairs)
        expert_rows = expert_steps.rows_taken(config.model, report)
        flops = train_flops(config.model, tokens, pairs, expert_rows, skipped, num_images=num_images)
        return step_sums(
            targets=modality_sums.unpack(result.stats, modalities),
            tokens=config.tokens_per_step,
            flops=flops,
            step_s=self._step_s,
            wait_s=batch.wait_s,
            fill_frac=batch.fill_frac,
            grad_norm=result.grad_norm,
            grad_norm_by_tower=result.grad_norm_by_group,
            masked_targets=masked_targets,
        )

    def log(self, state: TrainState, result: StepResult, evaluation: Mapping[str, Any]) -> TrainState:
        """Write the row of `state.step`; returns the state with its window closed."""
        if self._log is not None:
            row: dict[str, Any] = train_row(
                state.window,
                state.total,
                peak_flops=self._peak_flops,
                image_weights=self._config.image_weights,
            )
            row |= depth_steps.row(self._config.model, state.router_window)
            row |= expert_steps.row(self._config.model, state.router_window)
            row |= evaluation
            row |= self._inherited
            if self._config.on_spike != "stop" or state.spikes:
                row |= {"train/spikes": len(state.spikes), **lost_row(state.total)}
            row["optim/learning_rate"] = result.learning_rate
            row["memory/peak_bytes"] = _peak_bytes(self._world.device)
            row["data/epoch"] = max(state.epochs)
            row["data/fingerprint"] = f"{state.fingerprint:016x}"
            row["data/too_long"] = self._num_too_long
            if MASKED in state.total:
                row["data/masked_targets"] = int(state.total[MASKED])
            row["data/unreadable"] = len(state.unreadable)
            if new := state.unreadable[state.unreadable_in_rows :]:
                row["data/unreadable_documents"] = list(new)
            self._log.write(state.step, row)
            self._warn_if_loss_rises(state.step, self._log.train_losses)
        return state.logged()

    def _warn_if_loss_rises(self, step: int, losses: Sequence[float]) -> None:
        """Print one line, once an attempt. A run whose earlier attempt said so does not say it again."""
        if not self._has_warned and stays_above_start(losses):
            self._has_warned = True
            print(warning(losses, step), flush=True)

    def picture(self, step: int, name: str, images: HeldoutImages, ran: Mapping[int, np.ndarray]) -> None:
        """What runs of `images`, into TensorBoard. A run does not end because that fails."""
        if self._log is not None:
            try:
                self._log.tensorboard.picture(step, name, sheet(images.texts, ran, images.source))
            except Exception as error:
                print(f"step {step}: {name} is not drawn: {type(error).__name__}: {error}", flush=True)

    @property
    def view(self) -> TensorBoardView | None:
        """The run's TensorBoard files on rank 0, None on others."""
        return None if self._log is None else self._log.tensorboard

    def keep_documents(self, content: Mapping[str, Any]) -> None:
        """Write documents.json, on rank 0."""
        if self._run is not None:
            self._run.keep_documents(content)

    def show(self, state: TrainState) -> None:
        """Count the step on the terminal, with losses and speed since the last row."""
        if self._progress is not None:
            window = state.window
            modalities = [m for m in self._config.model.modalities if window.get(f"weight/{m}")]
            means = {m: window[f"loss/{m}"] / window[f"weight/{m}"] for m in modalities}
            speed = round(window["tokens"] / (window["step_s"] + window["wait_s"]))
            self._progress.advance(1, **means, **{"tokens/s": speed})

    def go_back(self, state: TrainState) -> None:
        """Drop the rows behind `state`, to which the run goes back, here and on the terminal."""
        if self._log is not None and self._progress is not None:
            self._log.go_back(step=state.step, num_rows=state.num_rows, sha256=state.rows_sha256)
            self._progress.advance(state.step - self._progress.done)

    def sync(self) -> str:
        """All rows to disk; returns their SHA-256 on rank 0, whose state a checkpoint holds, "" on others."""
        return "" if self._log is None else self._log.sync()

    def __enter__(self) -> "Meter":
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)
        if self._log is not None:
            if self._run is not None and error[0] is None:  # an error may have torn the last row
                self._run.seal_rows(self._log.num_rows, self._log.sha256)
            self._log.close()


def _peak_flops(config: RunConfig, device: torch.device, run: RunDir) -> float:
    """FLOP/s of one device: from the table, else as measured by the run's first attempt."""
    known = table_peak_flops(device_name(device), config.precision)
    if known is not None:
        return known
    key = peak_key(device, config.precision)
    if key not in run.record["peak_flops"]:
        run.keep_peak(key, measure_peak_flops(device, config.precision))
    return run.record["peak_flops"][key]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
