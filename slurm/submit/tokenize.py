"""`motley tokenize ... --profile`: jobs that fit tokenizers, write parts of the shards, and finish.

<out>/slurm/<n>/        a submission: tokenizers.sbatch, parts.sbatch, finish.sbatch, job.json
<out>/slurm/job_*.out   what the jobs printed

This module imports no torch.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path

from data_pipeline.files.atomic import write_json
from data_pipeline.files.json_file import read_object
from data_pipeline.files.lock import LOCK
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index_file import INDEX
from data_pipeline.shards.tar import MANIFEST
from data_pipeline.tokenize.claim import CLAIM_LOCK, claimed
from data_pipeline.tokenize.prepare import HOLDS, SETTINGS, read_source, unfinished_parts
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS
from slurm.commands import cancel, sbatch, state_in_queue
from slurm.profile import Profile, load_profile
from slurm.records import FOLDER, JOB, last_submission, now
from slurm.script import command_options, render_command
from slurm.submit.run import lock_submission, new_submission, require_slurm


def submit_tokenize(
    src: str,
    out: str | Path,
    *,
    config_path: str | Path,
    profile_path: str | Path,
    parts: int,
    processes: int | None = None,
    concurrent_parts: int | None = None,
    dry_run: bool = False,
) -> int:
    """Submit what is missing of OUT as up to three jobs, or print their scripts (`dry_run`).

    `parts`: the number of jobs that share the token shards; `processes`: worker processes of a job (None: the
    profile's cpus_per_task). Raises ConfigError for the mistakes that `tokenize` sees before any work, and if
    jobs of an earlier call are queued or running.
    """
    out, profile = Path(out).absolute(), load_profile(profile_path)
    config, splits, facts = read_source(src, config_path)
    folders = [out / split.name for split in splits]
    if all((folder / MANIFEST).exists() and (folder / INDEX).exists() for folder in folders):
        print(f"{out} is done; `motley tokenize` without --profile checks it")
        return 0
    words = ["-m", "tools.cli", "tokenize", src, str(out), "--config", str(Path(config_path).absolute())]
    command = shlex.join([*words, "--processes", str(processes or profile.cpus_per_task)])
    missing = unfinished_parts(splits, out, config, parts)
    steps = _steps(command, not (out / TOKENIZERS).is_dir(), missing, parts, concurrent_parts)
    if dry_run:
        for step, (arguments, array) in steps.items():
            print(_script(profile, out, step, arguments, array), end="")
        return 0
    require_slurm()
    with _begun(out, facts), lock_submission(out / FOLDER), new_submission(out / FOLDER) as submission:
        _check_not_queued(out)
        jobs = _submit(profile, out, submission, steps)
    for step, job in jobs.items():
        print(f"job {job}: {step}" + (f" {steps[step][1]} of {parts}" if steps[step][1] else ""))
    print(f"  queue     squeue -j {','.join(map(str, jobs.values()))}")
    print(f"  output    {out / FOLDER}/job_*.out")
    print(f"  stop      scancel {' '.join(map(str, jobs.values()))}; the same command goes on", flush=True)
    return 0


def _steps(
    command: str, tokenizers: bool, missing: Sequence[int], parts: int, concurrent_parts: int | None
) -> dict[str, tuple[str, str | None]]:
    """Name of a step -> (its command, its indices as an array or None), in order.

    `tokenizers`: whether they must be fitted; `missing`: the numbers of the parts that are not done.
    """
    steps: dict[str, tuple[str, str | None]] = {}
    if tokenizers:
        steps["tokenizers"] = (f"{command} --tokenizers-only", None)
    if missing:
        throttle = "" if concurrent_parts is None else f"%{concurrent_parts}"
        steps["parts"] = (f"{command} --part $SLURM_ARRAY_TASK_ID/{parts}", f"{_ranges(missing)}{throttle}")
    return steps | {"finish": (command, None)}


def _submit(
    profile: Profile, out: Path, submission: Path, steps: dict[str, tuple[str, str | None]]
) -> dict[str, int]:
    """Submit the steps; returns the job of every step. If Slurm refuses one, the others are cancelled."""
    jobs: dict[str, int] = {}
    with ExitStack() as undo:
        for step, (arguments, array) in steps.items():
            script = submission / f"{step}.sbatch"
            script.write_text(_script(profile, out, step, arguments, array))
            options = command_options(
                profile, name=_name(out, step), logs=out / FOLDER, folder=Path.cwd(), array=array
            )
            # The last job does the parts that failed; without tokenizers no job can do anything.
            after = [f"afterok:{jobs['tokenizers']}"] if "tokenizers" in jobs else []
            after += [f"afterany:{jobs['parts']}"] if "parts" in jobs else []
            if after:
                options += [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"]
            jobs[step] = job = sbatch(options, script)
            undo.push(lambda kind, *_, job=job: cancel([str(job)]) if kind else None)
        write_json(submission / JOB, {"jobs": jobs, "submitted": now()})
    return jobs


def _check_not_queued(out: Path) -> None:
    submission = last_submission(out / FOLDER)
    jobs = {} if submission is None else read_object(submission / JOB, {"jobs": dict})["jobs"]
    for step, job in jobs.items():
        if state := state_in_queue(str(job), _name(out, step)):
            raise ConfigError(
                f"{out}: its job {job} ({step}) is {state}; wait for it, or "
                f"`scancel {' '.join(map(str, jobs.values()))}` first"
            )


@contextmanager
def _begun(out: Path, facts: dict[str, object]) -> Iterator[None]:
    """Begin or continue OUT as `motley tokenize` does; undo a beginning if the block fails."""
    fresh = not (out / SETTINGS).exists()
    with claimed(out, SETTINGS, facts, HOLDS):
        pass  # the lock is released, for the jobs may start at once
    try:
        yield
    except BaseException:
        if fresh:
            with suppress(OSError):  # a job accepted before another was refused may have written there
                for path in (out / SETTINGS, out / CLAIM_LOCK, out / FOLDER / LOCK):
                    path.unlink(missing_ok=True)
                (out / FOLDER).rmdir()
                out.rmdir()
        raise


def _script(profile: Profile, out: Path, step: str, arguments: str, array: str | None) -> str:
    return render_command(
        profile,
        name=_name(out, step),
        logs=out / FOLDER,
        folder=Path.cwd(),
        python=sys.executable,
        arguments=arguments,
        array=array,
    )


def _name(out: Path, step: str) -> str:
    return f"tokenize-{out.name}-{step}"


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3,7"."""
    runs = [
        [number for _, number in group] for _, group in groupby(enumerate(numbers), lambda p: p[1] - p[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
