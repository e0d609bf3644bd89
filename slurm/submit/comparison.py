"""`motley submit COMPARE.toml`: a comparison's unfinished runs as one array of jobs, then a job that reports.

<comparison directory>/slurm/1/     of the first submission, and so on
    job.sbatch, report.sbatch       as given to sbatch
    elements.json                   for each index of the array, the folder of its run's submission
    profile.json, code.json, code.diff
    job.json                        {"job": of the array or null, "report_job", "submitted"}
<comparison directory>/slurm/job_<id>_<index>.out, job_<id>.out   what its jobs printed
<run directory>/slurm/<n>/          config.json, profile.json, job.json: as of a run that has a job to itself

Imports no torch.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import PLAN, ComparisonPlan, PlannedRun, make_plan, write_plan
from pretrain.comparison.run import check_runs, run_comparison, unfinished
from pretrain.comparison.run_queue import only_one
from pretrain.run_dir import check_writable
from slurm.commands import cancel, in_queue, sbatch, state_in_queue
from slurm.profile import Profile, load_profile
from slurm.records import ELEMENTS, FOLDER, JOB, job_names, last_submission, now, read_job, report_name
from slurm.script import command_options, render, render_command, sbatch_options
from slurm.submit import lead_time
from slurm.submit.run import POLL_S, check_sizes, keep_code, new_submission, require_slurm, write_submission
from slurm.submit.run import only_one as only_submitter


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
    """Submit what is missing of a comparison, or print the array's script (`dry_run`): the exit code.

    Where nothing is missing the report is made, here. `concurrent_runs`: runs at a time; None: the file's.
    `wait`: stay until the job that reports has ended; 1 if runs are unfinished then. Raises ConfigError, one
    message, before anything is written, for whatever would keep one of the runs from starting.
    """
    profile = load_profile(profile_path, nodes=nodes)
    if profile.chain > 1:
        print(
            f"motley submit: a comparison makes no chains: what its jobs have not done at their time limit "
            f"is submitted by the same command again ({profile_path}: chain = {profile.chain})",
            file=sys.stderr,
        )
        profile = profile.model_copy(update={"chain": 1})
    plan = make_plan(path, overrides)
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
        with only_one(plan.directory):
            queued = _queued(missing)
            todo = [run for run in missing if run.name not in queued]
            jobs = _submit(plan, profile, todo, queued, concurrent_runs)
    except OSError as error:
        raise ConfigError(f"{plan.directory}: cannot be written: {error}") from None
    print(
        _submission_summary(plan, todo, queued, jobs, f"{size} each, {concurrent_runs} at a time"), flush=True
    )
    return _wait(plan, jobs["report_job"], poll_s) if wait else 0


def _queued(runs: Sequence[PlannedRun]) -> dict[str, tuple[str, str]]:
    """Run -> (job, its state), of those that have one in the queue."""
    jobs: dict[str, tuple[str, str]] = {}  # job -> (run, what Slurm calls the job)
    for run in runs:
        if (submission := last_submission(run.config.run_dir / FOLDER)) is not None:
            name = read_job(submission)["name"]
            jobs |= {job: (run.name, name) for job in job_names(submission)}
    found = in_queue(list(jobs))
    return {
        run: (job, found[job].state)
        for job, (run, name) in jobs.items()
        if job in found and found[job].name == name
    }


def _queued_report(plan: ComparisonPlan) -> int | None:
    """The job that is to report, while it is in the queue."""
    submission = last_submission(plan.directory / FOLDER)
    job = None if submission is None else read_job(submission)["report_job"]
    return job if job is not None and state_in_queue(str(job), report_name(plan.config.name)) else None


def _submit(
    plan: ComparisonPlan,
    profile: Profile,
    todo: Sequence[PlannedRun],
    queued: Mapping[str, tuple[str, str]],
    concurrent_runs: int,
) -> dict[str, Any]:
    """Submit an array of the runs to do, and a job that reports when they and the queued ones have ended.

    Nothing stays if Slurm refuses one of them. Returns job.json.
    """
    waiting = _queued_report(plan)
    if not todo and waiting is not None:
        return {"job": None, "report_job": waiting}
    folder, here, name = plan.directory.absolute() / FOLDER, Path.cwd(), plan.config.name
    with ExitStack() as kept:
        fresh = not (plan.directory / PLAN).exists()
        write_plan(plan)
        if fresh:
            kept.push(lambda kind, *_: (plan.directory / PLAN).unlink() if kind else None)
        kept.enter_context(only_submitter(folder))
        submission = kept.enter_context(new_submission(folder))
        elements = []
        for run in todo:
            of_run = run.config.run_dir.absolute() / FOLDER
            kept.enter_context(only_submitter(of_run))
            check_writable(run.config)
            elements.append(kept.enter_context(new_submission(of_run)))
            write_submission(elements[-1], run.config, profile)
        write_json(submission / "profile.json", profile.model_dump(mode="json"))
        write_json(submission / ELEMENTS, [str(element) for element in elements])
        keep_code(submission)
        after = [job for job, _ in queued.values()]
        array = None
        if todo:
            indices = _indices(len(todo), concurrent_runs)
            script = submission / "job.sbatch"
            script.write_text(_script(plan, profile, submission, indices))
            array = sbatch(
                sbatch_options(profile, name=name, logs=folder, folder=here, array=indices), script
            )
            kept.push(lambda kind, *_: cancel([str(array)]) if kind else None)
            for task, element in enumerate(elements):
                ours = {"job": array, "task": task, "chain": [], "name": name, "submitted": now()}
                write_json(element / JOB, ours)
            after.append(str(array))
        script = submission / "report.sbatch"
        script.write_text(_report_script(plan, profile, folder))
        options = command_options(profile, name=report_name(plan.config.name), logs=folder, folder=here)
        report_job = sbatch([*options, f"--dependency=afterany:{':'.join(after)}"], script)
        jobs = {"job": array, "report_job": report_job, "submitted": now()}
        write_json(submission / JOB, jobs)
    if waiting is not None:  # for less than the new one waits for
        cancel([str(waiting)])
    return jobs


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
    done = len(plan.runs) - len(todo) - len(queued)
    folder = plan.directory / FOLDER
    first = f"job {ids[0]}: {len(todo)} runs of {plan.config.name} on {how}"
    return "\n".join(
        [
            first if todo else f"{plan.config.name}: nothing to submit",
            *([f"  done      {done} of {len(plan.runs)} runs, left alone"] if done else []),
            *(f"  {state.lower():9} {run}, job {job}: left alone" for run, (job, state) in queued.items()),
            f"  then      job {jobs['report_job']} reports: {plan.directory / 'report' / 'index.html'}",
            f"  status    motley status {plan.directory}    (squeue -j {','.join(ids)})",
            f"  output    {folder}/job_*.out; attempts: <run>/{FOLDER}/attempts.jsonl",
            f"  stop      motley cancel {plan.directory}; the same command then submits what is missing",
        ]
    )


def _wait(plan: ComparisonPlan, report_job: int, poll_s: float) -> int:
    while state_in_queue(str(report_job), report_name(plan.config.name)):
        time.sleep(poll_s)
    left = [run.name for run in unfinished(plan)]
    print(f"{len(plan.runs) - len(left)} of {len(plan.runs)} runs are done", *left, sep="\n  unfinished: ")
    return 1 if left else 0
