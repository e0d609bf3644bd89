"""Run a comparison's arms x seeds and report which won, per modality and by how much. Imports no torch."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from parallel.launch import child_environment
from pretrain.comparison.config import ComparisonPlan, PlannedRun, check_same_plan, make_plan, write_plan
from pretrain.comparison.run_queue import Job, Outcome, only_one, run_jobs
from pretrain.config import RunConfig
from pretrain.run_dir import check_config, finished_step
from pretrain.run_files import COMPARE_LOG, LOGS, METRICS
from pretrain.train.checks import check_run

START = (
    "import sys; from pretrain.train.launch import launch; "
    "raise SystemExit(launch(sys.argv[1], processes=int(sys.argv[2])))"
)


def run_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    concurrent_runs: int | None = None,
    report_only: bool = False,
    to: TextIO | None = None,
) -> int:
    """`motley compare`: run what has not run yet, write the report, print the verdict.

    Returns 0 when all runs are done, 85 when a signal stopped them after a checkpoint (the same command goes
    on), 1 when a run failed; a report is still written for the seeds that are whole. Raises ConfigError
    before any run starts for a comparison that cannot be run.
    """
    out = to or sys.stderr
    plan = make_plan(path, overrides)
    if report_only:
        check_same_plan(plan)
        report(plan, out)
        return ExitCode.DONE
    if concurrent_runs is None:
        concurrent_runs = plan.config.concurrent_runs
    if concurrent_runs < 1:
        raise ConfigError(f"--concurrent-runs {concurrent_runs}: at least one run at a time")
    todo = unfinished(plan)
    ranks = plan.config.processes_per_run
    check_runs(plan, todo, lambda config: check_run(config, ranks), source=f"processes_per_run = {ranks}")
    with only_one(plan.directory):
        write_plan(plan)
        print(_announcement(plan, todo, concurrent_runs), file=out, flush=True)
        outcomes = run_jobs(
            [_job(plan, run, concurrent_runs) for run in todo], concurrent_runs=concurrent_runs, out=out
        )
    failed = [outcome for outcome in outcomes if not outcome.done and not outcome.stopped]
    if any(outcome.stopped for outcome in outcomes):
        print(
            f"Stopped. To go on: motley compare {path} {' '.join(overrides)}".rstrip(), file=out, flush=True
        )
        return ExitCode.FAILED if failed else ExitCode.REQUEUE
    _report_what_there_is(plan, todo, failed, out)
    for outcome in failed:
        print(f"{outcome.name} failed ({outcome.log}); the same command tries it again", file=out, flush=True)
    return ExitCode.FAILED if failed else ExitCode.DONE


def report(plan: ComparisonPlan, out: TextIO) -> Path:
    """Write the report on what has run, print its verdict, return the page. ConfigError: there is nothing."""
    # Matplotlib, Jinja and SciPy take seconds to import; a comparison that is refused needs none of them.
    from pretrain.comparison.findings import find
    from pretrain.comparison.report.page import write_report
    from pretrain.comparison.results import load_results

    page = write_report(find(plan, load_results(plan)), plan.directory / "report")
    print_verdict(plan, page, out)
    return page


def print_verdict(plan: ComparisonPlan, page: Path, out: TextIO) -> None:
    """Print what a report states: headlines, a sentence per modality, grave caveats and where its page is."""
    stated = json.loads((page.parent / "summary.json").read_text())
    modalities = plan.runs[0].config.model.modalities
    lines = [""]
    for arm, headline in stated["headlines"].items():
        sentences = [
            c["sentence"] for c in stated["contrasts"] if c["arm"] == arm and c["modality"] in modalities
        ]
        lines += [headline, *(f"  {sentence}" for sentence in sentences), ""]
    lines += [f"  Mind: {caveat['text']}" for caveat in stated["caveats"] if caveat["grave"]]
    lines.append(f"Report: {page.resolve()}")
    print("\n".join(lines), file=out, flush=True)


def finished_page(plan: ComparisonPlan) -> Path | None:
    """The report's page if it was written after the last row of every run; None if it has to be written."""
    page = plan.directory / "report" / "index.html"  # The page is the report's last file.
    metrics = [run.config.run_dir / "metrics.jsonl" for run in plan.runs]
    if not page.exists() or any(path.stat().st_mtime_ns > page.stat().st_mtime_ns for path in metrics):
        return None
    return page


def _report_what_there_is(
    plan: ComparisonPlan, todo: Sequence[PlannedRun], failed: Sequence[Outcome], out: TextIO
) -> None:
    if not todo and (page := finished_page(plan)):
        return print_verdict(plan, page, out)
    try:
        report(plan, out)
    except ConfigError as error:
        if not failed:  # all runs are done, and still there is no report
            raise
        print(f"No report: {error}", file=out, flush=True)


def unfinished(plan: ComparisonPlan) -> list[PlannedRun]:
    """Runs still to do, in order. Raises ConfigError if a run's directory was made by another config."""
    todo = []
    for run in plan.runs:
        check_config(run.config)
        if finished_step(run.config) != run.config.num_steps:
            todo.append(run)
    return todo


def check_runs(
    plan: ComparisonPlan, runs: Sequence[PlannedRun], check: Callable[[RunConfig], None], *, source: str
) -> None:
    """Raise ConfigError, naming the arm, where `check` does. `source`: what says how many ranks a run has."""
    for run in {run.arm: run for run in runs}.values():  # seeds do not matter to data, vocabulary and layout
        try:
            check(run.config)
        except ConfigError as error:
            raise ConfigError(f'{plan.path}: arms."{run.arm}", with {source}: {error}') from None


def _job(plan: ComparisonPlan, run: PlannedRun, concurrent_runs: int) -> Job:
    config, processes = run.config, plan.config.processes_per_run
    run_file = plan.directory / "configs" / f"{run.name}.json"
    run_file.parent.mkdir(exist_ok=True)
    write_json(run_file, config.model_dump(mode="json"))
    return Job(
        name=run.name,
        argv=(sys.executable, "-c", START, str(run_file), str(processes)),
        env=child_environment(concurrent_runs * processes, threads=plan.config.threads_per_run),
        log=config.run_dir / LOGS / COMPARE_LOG,
        metrics=config.run_dir / METRICS,
        num_steps=config.num_steps,
    )


def _announcement(plan: ComparisonPlan, todo: Sequence[PlannedRun], concurrent_runs: int) -> str:
    config, first = plan.config, plan.runs[0].config
    done = len(plan.runs) - len(todo)
    steps = {run.arm: run.config.num_steps for run in plan.runs}
    length = f"{first.num_steps} steps, {first.total_tokens:,} tokens each"
    if config.match == "train_flops":
        length = f"equal FLOPs ({', '.join(f'{arm}: {count} steps' for arm, count in steps.items())})"
    return (
        f"{config.name}: {config.question}\n"
        f"{len(config.arms)} arms ({', '.join(plan.arms)}) x {len(config.seeds)} seed(s) = "
        f"{len(plan.runs)} runs of {length}; "
        f"{concurrent_runs} at a time"
        + (f"; {done} done already" if done else "")
        + f"\nPlan: {plan.directory / 'comparison.json'}"
    )
