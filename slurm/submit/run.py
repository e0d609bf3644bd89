"""`motley submit` for a run: it checks the run on the login node, writes down what it submits, and submits.

<run directory>/slurm/1/        the first submission; the next is slurm/2/
    config.json, profile.json   the resolved config, which the ranks read, and the site's resolved profile
    job.sbatch                  the script as given to sbatch
    code.json                   commit of the checkout, hash of the diff against it, names of changed files
    code.diff                   the diff itself, if keep_code_diff = true
    job.json                    the ids of the job and of the jobs of its chain
<run directory>/slurm/job_<id>.out, attempts.jsonl   the job's output, and its rows about attempts

This module imports no torch.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.files.atomic import write_json
from data_pipeline.files.lock import lock_directory
from data_pipeline.files.toml_config import ConfigError
from pretrain.config import RunConfig, check_run_layout, is_legal
from pretrain.lineage.begin import NOTHING_ELSE, Ask, Beginning, beginning, is_done
from pretrain.run_dir import check_config, check_writable, code_state
from pretrain.run_files import LOGS, METRICS, attempt_logs
from pretrain.train.checks import check_run
from slurm import commands
from slurm.profile import Profile, load_profile
from slurm.records import ATTEMPTS, FOLDER, JOB, job_names, last_submission, now, read_attempts, read_job
from slurm.script import render, sbatch_options
from slurm.submit import lead_time

POLL_S = 10.0


def submit(
    run_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    profile_path: str | Path,
    nodes: int | None = None,
    dry_run: bool = False,
    wait: bool = False,
    poll_s: float = POLL_S,
    ask: Ask = NOTHING_ELSE,
) -> int:
    """Submit a run, which begins as `ask` says, and return the exit code.

    `dry_run` prints the script instead; it needs no Slurm and writes nothing. `wait` returns when the job has
    ended for good, with the job's exit code. Raises ConfigError, with one message, for whatever would keep
    the run from starting, and if a job of the run is queued or running.
    """
    begins = beginning(run_path, overrides, ask)
    config, profile = begins.config, load_profile(profile_path, nodes=nodes)
    _prepare(begins, profile, ask, dry_run=dry_run)
    if is_done(config):
        return 0
    if not dry_run:
        require_slurm()
    check_sizes(config, profile)
    if (too_short := lead_time.warning(config, profile)) is not None:
        print(f"motley submit: warning: {too_short}", file=sys.stderr)
    folder = config.run_dir.absolute() / FOLDER
    if dry_run:
        print(_script(config, profile, folder / str(_next_number(folder))), end="")
        return 0
    with lock_submission(folder):
        check_not_queued(config.run_dir, folder)
        check_writable(config)
        with new_submission(folder) as submission:
            jobs = _submit(config, profile, submission)
    print(_submission_summary(config, profile, jobs), flush=True)
    return _wait(submission, poll_s) if wait else 0


def _prepare(begins: Beginning, profile: Profile, ask: Ask, *, dry_run: bool) -> None:
    """Do what was asked to the run's directory, so that jobs find it done. Raises ConfigError, before it is
    changed, if the run could not be submitted then."""
    config = begins.config
    if ask != NOTHING_ELSE:
        _check_change(config, profile, dry_run=dry_run)
    if not dry_run:
        begins.prepare_and_tell()
    check_config(config)


def _check_change(config: RunConfig, profile: Profile, *, dry_run: bool) -> None:
    """Raise ConfigError if the run could not be submitted once its directory was changed."""
    if dry_run:
        raise ConfigError(
            "--dry-run writes nothing, and --extend, --branch and --from-step change a run's directory; "
            "leave one or the other out"
        )
    require_slurm()
    check_sizes(config, profile)
    check_not_queued(config.run_dir, config.run_dir.absolute() / FOLDER)


def require_slurm() -> None:
    """Raise ConfigError on a machine without Slurm's commands."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH: this machine has no Slurm. Submit from a login node, look at the "
            "script with --dry-run, or train on this machine with `motley train`"
        )


def check_sizes(config: RunConfig, profile: Profile) -> None:
    """Raise ConfigError if the run could not start on the most or on the fewest nodes that it may get."""
    check_run(config, profile.world_size)
    if (least := profile.node_counts[0]) < profile.nodes:
        try:
            check_run_layout(config, least * profile.ranks_per_node)
        except ConfigError as error:
            raise ConfigError(f"min_nodes = {least}: {error}") from None


def legal_counts(config: RunConfig, profile: Profile) -> list[int]:
    """The numbers of nodes on which the layout is legal, of the numbers that Slurm may give."""
    return [count for count in profile.node_counts if is_legal(config, count * profile.ranks_per_node)]


def check_not_queued(run_dir: Path, folder: Path) -> None:
    """Raise ConfigError if a job of the run's last submission is queued or running."""
    submission = last_submission(folder)
    if submission is None:
        return
    for job in job_names(submission):
        if state := commands.state_in_queue(job, read_job(submission)["name"]):
            raise ConfigError(
                f"{run_dir} has job {job}, which is {state}: a run has one job at a time. "
                f"Wait for it, `motley cancel {run_dir}`, or give this run another name=..."
            )


def write_submission(submission: Path, config: RunConfig, profile: Profile) -> None:
    """Write the files that a job of the run reads."""
    write_json(submission / "config.json", config.model_dump(mode="json"))
    write_json(submission / "profile.json", profile.model_dump(mode="json"))


def keep_code(submission: Path, *, keep_diff: bool) -> None:
    """Write which code is submitted; `keep_diff`: also the text of what is not committed."""
    code = code_state()
    values = {"commit": code.commit, "diff": code.digest, "changed_files": code.changed_files}
    write_json(submission / "code.json", values)
    if keep_diff:
        (submission / "code.diff").write_text(code.diff)


def _script(config: RunConfig, profile: Profile, submission: Path) -> str:
    return render(profile, name=config.name, submission=submission, folder=Path.cwd(), python=sys.executable)


def _submit(config: RunConfig, profile: Profile, submission: Path) -> list[int]:
    """Write the submission and call sbatch once for every job of the chain; returns the ids."""
    write_submission(submission, config, profile)
    keep_code(submission, keep_diff=config.keep_code_diff)
    script = submission / "job.sbatch"
    script.write_text(_script(config, profile, submission))
    # The script's header has the same options, but the user's SBATCH_... variables would override those.
    options = sbatch_options(profile, name=config.name, logs=submission.parent, folder=Path.cwd())
    jobs: list[int] = []
    try:
        for _ in range(profile.chain):
            after = [f"--dependency=afterany:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
            jobs.append(commands.sbatch([*options, *after], script))
        values = {"job": jobs[0], "task": None, "chain": jobs[1:], "name": config.name, "submitted": now()}
        write_json(submission / JOB, values)
    except BaseException:
        if jobs:
            commands.cancel([str(job) for job in jobs])
        raise
    return jobs


@contextmanager
def new_submission(folder: Path) -> Iterator[Path]:
    """The next numbered folder; it is removed again if the block fails."""
    submission = folder / str(_next_number(folder))
    try:
        submission.mkdir()
        yield submission
    except BaseException as error:
        shutil.rmtree(submission, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{submission}: cannot be written: {error}") from None
        raise


@contextmanager
def lock_submission(folder: Path) -> Iterator[None]:
    """Keep a second `motley submit` out of `folder`, <directory>/slurm, while this one checks and submits."""
    directory = folder.parent
    with ExitStack() as stack:
        try:
            stack.enter_context(
                lock_directory(
                    folder, lambda holder: f"{directory}: another `motley submit` is working on it ({holder})"
                )
            )
        except OSError as error:
            raise ConfigError(
                f"{directory}: cannot be written: {error}; set runs_dir=... to a folder that can"
            ) from None
        yield


def _next_number(folder: Path) -> int:
    return 1 + max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=0)


def _submission_summary(config: RunConfig, profile: Profile, jobs: Sequence[int]) -> str:
    run_dir, job = config.run_dir, jobs[0]
    counts, legal = profile.node_counts, legal_counts(config, profile)
    nodes = f"{counts[0]}-{profile.nodes}" if len(counts) > 1 else str(profile.nodes)
    restarts = f"{profile.max_requeues} requeues at most"
    if followers := jobs[1:]:
        restarts = f"then {', '.join(map(str, followers))} until it is done"
    lines = [
        f"job {job}: {config.name} on {nodes} x {profile.ranks_per_node} ranks, "
        f"{profile.time_limit} an attempt, {restarts}",
        f"  status    motley status {run_dir}    (squeue -j {','.join(map(str, jobs))})",
        f"  logs      motley logs -f {run_dir}",
        f"  output    {run_dir / FOLDER / f'job_{job}.out'}",
        f"  attempts  {run_dir / FOLDER / ATTEMPTS}",
        f"  ranks     {run_dir / LOGS / attempt_logs(str(job), 0)}",
        f"  metrics   {run_dir / METRICS}",
        f"  stop      motley cancel {run_dir}",
    ]
    if idle := [count for count in counts if count not in legal]:
        legal_text, idle_text = (", ".join(map(str, numbers)) for numbers in (legal, idle))
        lines.append(f"  nodes     the layout is legal on {legal_text}; of {idle_text} some stay idle")
    return "\n".join(lines)


def _wait(submission: Path, poll_s: float) -> int:
    """Print how every attempt ends until no job of the submission is queued; the last attempt's exit code.

    squeue is polled because `sbatch --wait` polls ever more rarely (it took 138 s for a job of 114 s).
    """
    jobs, name = job_names(submission), read_job(submission)["name"]
    num_printed, code, queued = 0, 1, True
    last_state = "running"
    while queued:
        time.sleep(poll_s)
        queued = any(commands.state_in_queue(job, name) for job in jobs)
        attempts = [attempt for attempt in read_attempts(submission.parent) if str(attempt["job"]) in jobs]
        ended = [attempt for attempt in attempts if attempt["next"] != "running"]
        for attempt in ended[num_printed:]:
            where = f"job {attempt['job']}, attempt {attempt['attempt']}"
            print(f"{where}: {attempt['next']}: {attempt['reason']}", flush=True)
        num_printed = len(ended)
        if attempts:
            last_state, code = attempts[-1]["next"], attempts[-1]["exit_code"]
    if last_state in ("running", "requeued", "chained", "lost"):
        print(
            f"job {jobs[0]} left the queue without a record: cancelled, or its first node was lost",
            file=sys.stderr,
        )
        return 1
    return code
