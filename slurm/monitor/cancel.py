"""`motley cancel`: it cancels the jobs of a run or of a comparison. This module imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.quantities import duration
from slurm.commands import cancel, in_queue, kill_wait_s
from slurm.monitor.state import job_names, queued_jobs
from slurm.monitor.targets import ComparisonTarget, target
from slurm.records import FOLDER, JOB, last_submission, read_json, report_name


def cancel_jobs(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Cancel and name the jobs that are queued or running, chains and reports included. Returns 0.

    Raises ConfigError for a path that is neither a run nor a comparison, and where Slurm refuses.
    """
    named = target(path, overrides)
    runs = named.runs if isinstance(named, ComparisonTarget) else (named,)
    report = _report_job(named.directory) if isinstance(named, ComparisonTarget) else []
    queue = in_queue([*report, *(name for run in runs for name in job_names(run.directory))])
    # A job that waits for others is cancelled first, or it would start when they end.
    reports = report_name(named.directory.name)
    doomed = {job: (reports, queue[job]) for job in report if job in queue and queue[job].name == reports}
    for run in runs:
        doomed |= {
            job: (run.directory.name, queued)
            for job, queued in reversed(queued_jobs(run.directory, queue).items())
        }
    if not doomed:
        print(f"{named.directory}: nothing queued or running")
        return 0
    for job, (name, queued) in doomed.items():
        print(f"cancelling job {job}: {name}, {queued.state}", flush=True)
    cancel(list(doomed))
    if any(queued.state != "PENDING" for _, queued in doomed.values()):
        wait_s = kill_wait_s()
        limit = "" if wait_s is None else f", for which Slurm gives them {duration(wait_s)} (KillWait)"
        print(f"ranks that are running save and stop{limit}")
    print("the same `motley submit` goes on from the last step that was saved")
    return 0


def _report_job(directory: Path) -> list[str]:
    """The job that reports on the comparison, as a list of one; [] if none was submitted."""
    submission = last_submission(directory / FOLDER)
    job = read_json(submission / JOB).get("report_job") if submission else None
    return [] if job is None else [str(job)]
