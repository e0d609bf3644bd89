"""The runs that must end before the runs of a comparison begin: timing rounds and a grid of learning rates.

This module imports no torch.
"""

import shutil
from collections.abc import Sequence
from typing import TextIO

from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from pretrain.comparison.pending_runs import check_runs, command_of, unfinished
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.plan_file import write_plan
from pretrain.comparison.run_queue import lock_comparison, run_commands
from pretrain.train.checks import check_run


def check_startable(plan: ComparisonPlan, runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError, naming the arm, for a run that `motley compare` could not start on this machine."""
    ranks = plan.config.processes_per_run
    check_runs(plan, runs, lambda config: check_run(config, ranks), source=f"processes_per_run = {ranks}")


def first_line(plan: ComparisonPlan) -> str:
    """Say what the first runs are, and how many of them have ended."""
    config, todo = plan.config, unfinished(plan)
    if is_timing(plan):
        return (
            f"{config.rounds} timing rounds come first: {len(plan.first)} short runs, one at a time, and "
            "nothing else should run on this machine; "
            f"{len(plan.first) - len(todo)} have ended"
        )
    cells = f" x {len(plan.cells)} cells" if plan.cells else ""
    return (
        f"a grid of learning rates comes first: {len(config.arms)} arms{cells} x {len(config.rates)} rates x "
        f"{len(config.tuning_seeds)} tuning seed(s) = {len(plan.first)} runs; "
        f"{len(plan.first) - len(todo)} have ended"
    )


def is_timing(plan: ComparisonPlan) -> bool:
    """Whether the runs that come first are those of timing rounds."""
    return bool(plan.first) and plan.first[0].round is not None


def run_first(plan: ComparisonPlan, concurrent_runs: int, out: TextIO) -> int | None:
    """Make the runs that come first. None: all have ended; else the exit code of a command that must be given
    again."""
    todo = unfinished(plan)
    check_startable(plan, todo)
    with lock_comparison(plan.directory):
        write_plan(plan)
        if is_timing(plan):
            concurrent_runs = 1
            for run in todo:  # a round is one measurement, so no part of one that was cut off is kept
                shutil.rmtree(run.config.run_dir, ignore_errors=True)
        print(f"{plan.config.name}: {first_line(plan)}; {concurrent_runs} at a time", file=out, flush=True)
        commands = [command_of(plan, run, concurrent_runs) for run in todo]
        outcomes = run_commands(commands, concurrent_runs=concurrent_runs, out=out)
    left = {run.name for run in unfinished(plan)}
    failed = [o for o in outcomes if o.name in left and not o.stopped]
    for outcome in failed:
        print(f"{outcome.name} failed ({outcome.log}); the same command tries it again", file=out, flush=True)
    if failed:
        return ExitCode.FAILED
    if left:
        words = " ".join(["motley compare", str(plan.path), *plan.overrides])
        print(f"Stopped. To go on: {words}", file=out, flush=True)
        return ExitCode.REQUEUE
    return None


def check_first_runs(plan: ComparisonPlan) -> None:
    """Raise ConfigError if there can be no report because runs that come first have not all ended."""
    if plan.first:
        raise ConfigError(
            f"{plan.directory}: nothing to report on yet: {first_line(plan)}; leave out --report-only to go "
            "on"
        )
