"""A plan tells its cost before it runs: every run, its tokens, training FLOPs and hours.

FLOPs are those of the ledger for the average token of the training shards, as match = "train_flops" counts
them. Evaluations and padding are not counted. This module imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.matched_flops import Mix, expected_mix, step_flops
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.rate_grid import tuning_runs
from pretrain.config import RunConfig
from pretrain.models.accounting import aligned
from pretrain.quantities import count, duration, flops, with_prefix
from pretrain.train.peak_table import PEAKS, table_peak_flops

UNTIMED = "steps: those of the base run; timing rounds, which come first, give every arm its own"
"""Line about runs of equal seconds whose lengths are not known."""
HOUR_S = 3600
HIGHEST_MFU = 1.0


@dataclass(frozen=True)
class RunSpeed:
    """The speed at which a rank trains: measured FLOP/s, or a share of the peak of a GPU in the table."""

    flops_per_s: float | None = None
    gpu: str | None = None
    mfu: float = math.nan

    def of(self, config: RunConfig) -> float:
        """Training FLOP/s of a rank that runs a config."""
        if self.flops_per_s is not None:
            return self.flops_per_s
        return self.mfu * (table_peak_flops(str(self.gpu), config.precision) or math.nan)

    @property
    def text(self) -> str:
        """Say what the hours are of, for people."""
        if self.flops_per_s is not None:
            return f"{with_prefix(self.flops_per_s, 'FLOP/s')} a rank, as given"
        return f"{self.gpu} at {100 * self.mfu:g} % of its peak, as given"


def run_speed(
    flops_per_s: float | None, gpu: str | None, mfu: float | None, *, needs_dry_run: bool
) -> RunSpeed | None:
    """The speed that options of the command line name, or None. Raises ConfigError for illegal ones."""
    if flops_per_s is None and gpu is None and mfu is None:
        return None
    if needs_dry_run:
        raise ConfigError("--flops-per-s, --gpu and --mfu tell the hours of --dry-run; add it")
    if flops_per_s is not None and (gpu is not None or mfu is not None):
        raise ConfigError("give --flops-per-s, or --gpu with --mfu: not both")
    if flops_per_s is not None:
        if not 0 < flops_per_s < math.inf:
            raise ConfigError(f"--flops-per-s {flops_per_s:g}: expected a number above 0, such as 4e14")
        return RunSpeed(flops_per_s=flops_per_s)
    if gpu is None or mfu is None:
        raise ConfigError("--gpu needs --mfu, the share of its peak that runs reach, and the other way round")
    if gpu not in PEAKS:
        raise ConfigError(
            f'--gpu "{gpu}": not in the table; legal: {", ".join(PEAKS)}; or give --flops-per-s'
        )
    if not 0 < mfu <= HIGHEST_MFU:
        raise ConfigError(f"--mfu {mfu:g}: expected a share above 0 and up to 1, such as 0.4")
    return RunSpeed(gpu=gpu, mfu=mfu)


def cost_text(plan: ComparisonPlan, speed: RunSpeed | None, concurrent_runs: int) -> str:
    """A table of all runs and their cost, the sums, and the cost of one more seed.

    Raises ConfigError where the training data, whose mix decides what a token costs, cannot be read.
    """
    mix = expected_mix(plan.runs[0].config)
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in plan.runs:
        groups.setdefault((run.cell.name if run.cell else "", run.arm), []).append(run)
    ladder = bool(plan.cells)
    head = [*(["cell"] if ladder else []), "arm", "seeds", "steps", "tokens"]
    head += [*(["per parameter"] if ladder else []), "FLOPs a run", *(["a run"] if speed else [])]
    rows = [head, *(_row(runs, mix, plan, speed) for runs in groups.values())]
    ranks = plan.config.processes_per_run
    total = sum(_flops(run.config, mix) for run in plan.runs)
    grid = tuning_runs(plan) if plan.config.rates else ()
    one_more = sum(_flops(runs[0].config, mix) for runs in groups.values())
    untimed = plan.config.match == "seconds" and not plan.timing
    lines = [
        *aligned(rows),
        "",
        *([UNTIMED] if untimed else []),
        *(f"solved {plan.config.solve}: {line}" for line in solved_lines(plan)),
        f"{len(plan.runs)} runs: {flops(total)}, {count(sum(run.config.total_tokens for run in plan.runs))} "
        f"tokens{_time_text(plan.runs, mix, speed, ranks, concurrent_runs)}",
        *(
            [
                f"grid of rates, before them: {len(grid)} runs, "
                f"{flops(sum(_flops(run.config, mix) for run in grid))}"
                + _time_text(grid, mix, speed, ranks, concurrent_runs)
            ]
            if grid
            else []
        ),
        f"one more seed: {len(groups)} runs, {flops(one_more)}"
        + _time_text([runs[0] for runs in groups.values()], mix, speed, ranks, concurrent_runs),
    ]
    if speed is None:
        lines.append("hours: unknown; --flops-per-s, or --gpu with --mfu, tells them")
    return "\n".join(lines)


def solved_lines(plan: ComparisonPlan) -> list[str]:
    """A line for every arm whose size was solved, such as "moe: d_model 64 -> 48 (-0.12 % of the FLOPs)"."""
    return [f"{name}: {size.text}" for name, size in plan.solved.items()]


def _row(runs: Sequence[PlannedRun], mix: Mix, plan: ComparisonPlan, speed: RunSpeed | None) -> list[str]:
    """The row of the runs of one arm in one cell, which differ in their seed alone."""
    run, config = runs[0], runs[0].config
    row = [run.cell.name] if run.cell else []
    row += [run.arm, str(len(runs)), f"{config.num_steps:,}", f"{config.total_tokens:,}"]
    row += [f"{run.cell.tokens_per_parameter:.3g}"] if run.cell else []
    row.append(flops(_flops(config, mix)))
    if speed:
        row.append(duration(_seconds(config, mix, speed, plan.config.processes_per_run)))
    return row


def _flops(config: RunConfig, mix: Mix) -> float:
    """Training FLOPs of a run."""
    return float(config.num_steps * step_flops(config, mix))


def _seconds(config: RunConfig, mix: Mix, speed: RunSpeed, ranks: int) -> float:
    """Seconds that a run trains."""
    return _flops(config, mix) / (ranks * speed.of(config))


def _time_text(
    runs: Sequence[PlannedRun], mix: Mix, speed: RunSpeed | None, ranks: int, concurrent_runs: int
) -> str:
    """Say how long runs take a few at a time, in days too if that is more than one; "" without a speed."""
    if speed is None:
        return ""
    seconds = sum(_seconds(run.config, mix, speed, ranks) for run in runs)
    rank_hours, wall_s = seconds * ranks / HOUR_S, seconds / min(concurrent_runs, len(runs))
    days = f", {wall_s / (24 * HOUR_S):.1f} days" if wall_s > 24 * HOUR_S else ""
    return (
        f"; {rank_hours:.3g} hours of a rank, {duration(wall_s)}{days} with {concurrent_runs} runs at a time "
        f"({speed.text})"
    )
