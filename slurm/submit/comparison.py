"""`motley submit COMPARE.toml`: a comparison's unfinished runs as one array of jobs, then a job that reports.

<comparison directory>/slurm/1/     the first submission; the next is slurm/2/
    job.sbatch, report.sbatch       the scripts as given to sbatch
    elements.json                   by index of the array, the folder of the run's submission
    profile.json, code.json, code.diff  as for a run
    job.json                        {"job": the array's id or null, "report_job", "submitted"}
<comparison directory>/slurm/job_<id>_<index>.out, job_<id>.out   what the jobs printed
<run directory>/slurm/<n>/          config.json, profile.json, job.json, as for a run that is submitted alone

This module imports no torch.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.pending_runs import check_runs, unfinished
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.plan_file import PLAN, write_plan
from pretrain.comparison.run import detectable_line, run_comparison
from pretrain.comparison.run_queue import lock_comparison
from pretrain.comparison.step_timing import check_timed
from pretrain.run_dir import check_writable
from slurm.commands import cancel, in_queue, sbatch, state_in_queue
from slurm.profile import Profile, load_profile
from slurm.records import ELEMENTS, FOLDER, JOB, job_names, last_submission, now, read_job, report_name
from slurm.script import command_options, render, render_command, sbatch_options
from slurm.submit import lead_time
from slurm.submit.run import (
    POLL_S,
    check_sizes,
    keep_code,
    lock_submission,
    new_submission,
    require_slurm,
    write_submission,
)


def submit_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    profile_path: str | Path,
    nodes: int | None = None,
    concurrent_runs: int | None = None,
    dry_run: bool = False,
    wait: bool = False,
    poll_s: float = POLL_S,
) -> int:
    """Submit the unfinished runs of a comparison and return the exit code.

    `dry_run` prints the array's script instead. If all runs are done, the report is made in this process.
    `concurrent_runs`: the number of runs at a time; None: the comparison file's. `wait` returns when the job
    that reports has ended, with 1 if runs are unfinished then. Raises ConfigError, with one message and
    before anything is written, for whatever would keep one of the runs from starting.
    """
    profile = _without_chain(load_profile(profile_path, nodes=nodes), profile_path)
    plan = make_plan(path, overrides)
    check_timed(plan, "motley submit")
    missing = unfinished(plan)
    if not missing:
        return run_comparison(path, overrides, report_only=(plan.directory / PLAN).exists())
    size = f"{profile.nodes} x {profile.ranks_per_node} ranks"
    check_runs(plan, missing, lambda config: check_sizes(config, profile), source=f"{profile_path}: {size}")
    if warnings := [text for run in missing if (text := lead_time.warning(run.config, profile))]:
        print(f"motley submit: warning: {warnings[0]}", file=sys.stderr)
    concurrent_runs = plan.config.concurrent_runs if concurrent_runs is None else concurrent_runs
    folder = plan.directory.absolute() / FOLDER
    if dry_run:
        print(_script(plan, profile, folder / "N", _indices(len(missing), concurrent_runs)), end="")
        return 0
    require_slurm()
    try:
        with lock_comparison(plan.directory):
            queued = _queued(missing)
            todo = [run for run in missing if run.name not in queued]
            jobs = _submit(plan, profile, todo, queued, concurrent_runs)
    except OSError as error:
        raise ConfigError(f"{plan.directory}: cannot be written: {error}") from None
    print(
        _submission_summary(plan, todo, queued, jobs, f"{size} each, {concurrent_runs} at a time"), flush=True
    )
    return _wait(plan, jobs["report_job"], poll_s) if wait else 0


def _without_chain(profile: Profile, path: str | Path) -> Profile:
    """The profile with one job instead of a chain; if that is a change, a line says so."""
    if profile.chain > 1:
        print(
            f"motley submit: a comparison makes no chains: what its jobs have not done at their time limit "
            f"is submitted by the same command again ({path}: chain = {profile.chain})",
            file=sys.stderr,
        )
    return profile.model_copy(update={"chain": 1})


def _queued(runs: Sequence[PlannedRun]) -> dict[str, tuple[str, str]]:
    """Name of a run -> (its job, the job's state), for the runs that have a job in the queue."""
    jobs: dict[str, tuple[str, str]] = {}  # job -> (run, Slurm's name of the job)
    for run in runs:
        if (submission := last_submission(run.config.run_dir / FOLDER)) is not None:
            name = read_job(submission)["name"]
            jobs |= {job: (run.name, name) for job in job_names(submission)}
    queue = in_queue(list(jobs))
    return {
        run: (job, queue[job].state)
        for job, (run, name) in jobs.items()
        if job in queue and queue[job].name == name
    }


def _queued_report(plan: ComparisonPlan) -> int | None:
    """The id of the job that will report, if it is in the queue; else None."""
    submission = last_submission(plan.directory / FOLDER)
    job = None if submission is None else read_object(submission / JOB, {"report_job": int})["report_job"]
    return job if job is not None and state_in_queue(str(job), report_name(plan.config.name)) else None


def _submit(
    plan: ComparisonPlan,
    profile: Profile,
    todo: Sequence[PlannedRun],
    queued: Mapping[str, tuple[str, str]],
    concurrent_runs: int,
) -> dict[str, Any]:
    """Submit an array of the runs `todo`, and a job that reports when these and the queued runs have ended.

    If Slurm refuses one of the two, the other is cancelled and all files are removed. Returns the content of
    job.json.
    """
    waiting = _queued_report(plan)
    if not todo and waiting is not None:
        return {"job": None, "report_job": waiting}
    folder, name = plan.directory.absolute() / FOLDER, plan.config.name
    with ExitStack() as undo:
        if not (plan.directory / PLAN).exists():
            undo.push(lambda kind, *_: (plan.directory / PLAN).unlink(missing_ok=True) if kind else None)
        write_plan(plan)
        undo.enter_context(lock_submission(folder))
        submission = undo.enter_context(new_submission(folder))
        elements = [_new_element(undo, run, profile) for run in todo]
        write_json(submission / "profile.json", profile.model_dump(mode="json"))
        write_json(submission / ELEMENTS, [str(element) for element in elements])
        keep_code(submission, keep_diff=plan.runs[0].config.keep_code_diff)
        array = None
        if todo:
            array = _submit_array(plan, profile, submission, _indices(len(todo), concurrent_runs))
            undo.push(lambda kind, *_: cancel([str(array)]) if kind else None)
            for task, element in enumerate(elements):
                own = {"job": array, "task": task, "chain": [], "name": name, "submitted": now()}
                write_json(element / JOB, own)
        after = [*(job for job, _ in queued.values()), *([] if array is None else [str(array)])]
        report_job = _submit_report(plan, profile, submission, after)
        jobs = {"job": array, "report_job": report_job, "submitted": now()}
        write_json(submission / JOB, jobs)
    if waiting is not None:  # it waits for fewer jobs than the new report
        cancel([str(waiting)])
    return jobs


def _new_element(undo: ExitStack, run: PlannedRun, profile: Profile) -> Path:
    """The submission of one run of an array; its folder is locked, and removed if the caller fails."""
    folder = run.config.run_dir.absolute() / FOLDER
    undo.enter_context(lock_submission(folder))
    check_writable(run.config)
    submission = undo.enter_context(new_submission(folder))
    write_submission(submission, run.config, profile)
    return submission


def _submit_array(plan: ComparisonPlan, profile: Profile, submission: Path, indices: str) -> int:
    """Submit the array of runs; returns its job id."""
    script = submission / "job.sbatch"
    script.write_text(_script(plan, profile, submission, indices))
    logs, here = submission.parent, Path.cwd()
    return sbatch(
        sbatch_options(profile, name=plan.config.name, logs=logs, folder=here, array=indices), script
    )


def _submit_report(plan: ComparisonPlan, profile: Profile, submission: Path, after: Sequence[str]) -> int:
    """Submit the job that reports when the jobs `after` have ended; returns its id."""
    script, logs = submission / "report.sbatch", submission.parent
    script.write_text(_report_script(plan, profile, logs))
    options = command_options(profile, name=report_name(plan.config.name), logs=logs, folder=Path.cwd())
    return sbatch([*options, f"--dependency=afterany:{':'.join(after)}"], script)


def _indices(count: int, concurrent_runs: int) -> str:
    return f"0-{count - 1}%{concurrent_runs}"


def _script(plan: ComparisonPlan, profile: Profile, submission: Path, indices: str) -> str:
    return render(
        profile,
        name=plan.config.name,
        submission=submission,
        folder=Path.cwd(),
        python=sys.executable,
        array=indices,
    )


def _report_script(plan: ComparisonPlan, profile: Profile, logs: Path) -> str:
    words = ["-m", "tools.cli", "compare", str(plan.path.absolute()), *plan.overrides, "--report-only"]
    return render_command(
        profile,
        name=report_name(plan.config.name),
        logs=logs,
        folder=Path.cwd(),
        python=sys.executable,
        arguments=shlex.join(words),
    )


def _submission_summary(
    plan: ComparisonPlan,
    todo: Sequence[PlannedRun],
    queued: Mapping[str, tuple[str, str]],
    jobs: Mapping[str, Any],
    how: str,
) -> str:
    ids = [str(jobs[key]) for key in ("job", "report_job") if jobs[key] is not None]
    done = len(plan.next_runs) - len(todo) - len(queued)
    folder = plan.directory / FOLDER
    first = f"job {ids[0]}: {len(todo)} runs of {plan.config.name} on {how}"
    grid = "the runs above choose learning rates; the same command then submits those of the arms"
    return "\n".join(
        [
            first if todo else f"{plan.config.name}: nothing to submit",
            *([f"  done      {done} of {len(plan.next_runs)} runs, left alone"] if done else []),
            *(f"  {state.lower():9} {run}, job {job}: left alone" for run, (job, state) in queued.items()),
            f"  then      job {jobs['report_job']} reports: {plan.directory / 'report' / 'index.html'}",
            f"  status    motley status {plan.directory}    (squeue -j {','.join(ids)})",
            f"  output    {folder}/job_*.out; attempts: <run>/{FOLDER}/attempts.jsonl",
            f"  stop      motley cancel {plan.directory}; the same command then submits what is missing",
            *([f"  first     {grid}"] if plan.first else []),
            f"  verdict   {detectable_line(plan)}",
        ]
    )


def _wait(plan: ComparisonPlan, report_job: int, poll_s: float) -> int:
    while state_in_queue(str(report_job), report_name(plan.config.name)):
        time.sleep(poll_s)
    left = [run.name for run in unfinished(plan)]
    count = len(plan.next_runs)
    print(f"{count - len(left)} of {count} runs are done", *left, sep="\n  unfinished: ")
    return 1 if left else 0
