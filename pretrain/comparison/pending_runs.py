"""The runs of a comparison that are still to be made, and their commands. This module imports no torch."""

import sys
from collections.abc import Callable, Sequence

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError
from parallel.launch import child_environment
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.rate_grid import has_diverged
from pretrain.comparison.run_queue import RunCommand
from pretrain.comparison.step_timing import rounds_to_make
from pretrain.config import RunConfig
from pretrain.run_dir import check_config, finished_step
from pretrain.run_files import COMPARE_LOG, LOGS, METRICS

START = (
    "import sys; from pretrain.train.launch import launch; "
    "raise SystemExit(launch(sys.argv[1], processes=int(sys.argv[2])))"
)


def unfinished(plan: ComparisonPlan) -> list[PlannedRun]:
    """The next runs that are not done, in order. A rate of a grid that made a run diverge is done with; of a
    timing round that was cut off all runs are to be made again.

    Raises ConfigError if another config made a run's directory.
    """
    if plan.first and plan.first[0].round is not None:
        return rounds_to_make(plan.first)
    todo = []
    for run in plan.next_runs:
        check_config(run.config)
        diverged = run.rate is not None and has_diverged(run.config)
        if finished_step(run.config) != run.config.num_steps and not diverged:
            todo.append(run)
    return todo


def check_runs(
    plan: ComparisonPlan, runs: Sequence[PlannedRun], check: Callable[[RunConfig], None], *, source: str
) -> None:
    """Raise ConfigError, naming the arm, if `check` does. `source` names what sets the number of ranks."""
    # One seed and one budget are enough: data, vocabulary and layout do not depend on them.
    for run in {(run.cell and run.cell.size, run.arm): run for run in runs}.values():
        try:
            check(run.config)
        except ConfigError as error:
            size = f'sizes."{run.cell.size}", ' if run.cell else ""
            raise ConfigError(f'{plan.path}: {size}arms."{run.arm}", with {source}: {error}') from None


def command_of(plan: ComparisonPlan, run: PlannedRun, concurrent_runs: int) -> RunCommand:
    """The command that trains one run; its config is written beside the plan."""
    config, processes = run.config, plan.config.processes_per_run
    run_file = plan.directory / "configs" / f"{run.name}.json"
    run_file.parent.mkdir(exist_ok=True)
    write_json(run_file, config.model_dump(mode="json"))
    return RunCommand(
        name=run.name,
        argv=(sys.executable, "-c", START, str(run_file), str(processes)),
        env=child_environment(concurrent_runs * processes, threads=plan.config.threads_per_run),
        log=config.run_dir / LOGS / COMPARE_LOG,
        metrics=config.run_dir / METRICS,
        num_steps=config.num_steps,
    )
