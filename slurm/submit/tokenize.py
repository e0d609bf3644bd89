"""`motley tokenize ... --profile`: the tokenizers, then parts of the shards as an array, then what is left.

<out>/slurm/<n>/    of each submission: tokenizers.sbatch, parts.sbatch, finish.sbatch, job.json
<out>/slurm/job_*.out   what the jobs printed

Imports no torch.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import INDEX
from data_pipeline.shards.tar import MANIFEST
from data_pipeline.tokenize.claim import LOCK, claimed
from data_pipeline.tokenize.prepare import HOLDS, SETTINGS, read_source, unfinished_parts
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS
from slurm.commands import cancel, sbatch, state_in_queue
from slurm.profile import Profile, load_profile
from slurm.records import FOLDER, JOB, last_submission, now, read_job
from slurm.script import command_options, render_command
from slurm.submit.run import new_submission, only_one, require_slurm


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
    """Submit what is missing of OUT as up to three jobs, each after the one before, or print their scripts.

    `parts`: jobs that the token shards are spread over; `processes` of each: None: the profile's
    cpus_per_task. Raises ConfigError as `tokenize` does where one sees it before any work, and if jobs of an
    earlier call are queued or running.
    """
    out, profile = Path(out).absolute(), load_profile(profile_path)
    config, splits, facts = read_source(src, config_path)
    folders = [out / split.name for split in splits]
    if all((folder / MANIFEST).exists() and (folder / INDEX).exists() for folder in folders):
        print(f"{out} is done; `motley tokenize` without --profile checks it")
        return 0
    words = ["-m", "tools.cli", "tokenize", src, str(out), "--config", str(Path(config_path).absolute())]
    plain = shlex.join([*words, "--processes", str(processes or profile.cpus_per_task)])
    steps: dict[str, tuple[str, str | None]] = {}
    if not (out / TOKENIZERS).is_dir():
        steps["tokenizers"] = (f"{plain} --tokenizers-only", None)
    if missing := unfinished_parts(splits, out, config, parts):
        throttle = "" if concurrent_parts is None else f"%{concurrent_parts}"
        steps["parts"] = (f"{plain} --part $SLURM_ARRAY_TASK_ID/{parts}", f"{_ranges(missing)}{throttle}")
    steps["finish"] = (plain, None)
    if dry_run:
        for step, (arguments, array) in steps.items():
            print(_script(profile, out, step, arguments, array), end="")
        return 0
    require_slurm()
    with _begun(out, facts), only_one(out / FOLDER), new_submission(out / FOLDER) as submission:
        _check_not_queued(out)
        jobs = _submit(profile, out, submission, steps)
    for step, job in jobs.items():
        print(f"job {job}: {step}" + (f" {steps[step][1]} of {parts}" if steps[step][1] else ""))
    print(f"  queue     squeue -j {','.join(map(str, jobs.values()))}")
    print(f"  output    {out / FOLDER}/job_*.out")
    print(f"  stop      scancel {' '.join(map(str, jobs.values()))}; the same command goes on", flush=True)
    return 0


def _submit(
    profile: Profile, out: Path, submission: Path, steps: dict[str, tuple[str, str | None]]
) -> dict[str, int]:
    """Step -> its job. Nothing is left in the queue if one is refused."""
    jobs: dict[str, int] = {}
    with ExitStack() as kept:
        for step, (arguments, array) in steps.items():
            script = submission / f"{step}.sbatch"
            script.write_text(_script(profile, out, step, arguments, array))
            options = command_options(
                profile, name=_name(out, step), logs=out / FOLDER, folder=Path.cwd(), array=array
            )
            # Parts that failed are done by the last job; without tokenizers there is nothing to be done.
            after = [f"afterok:{jobs['tokenizers']}"] if "tokenizers" in jobs else []
            after += [f"afterany:{jobs['parts']}"] if "parts" in jobs else []
            if after:
                options += [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"]
            jobs[step] = job = sbatch(options, script)
            kept.push(lambda kind, *_, job=job: cancel([str(job)]) if kind else None)
        write_json(submission / JOB, {"jobs": jobs, "submitted": now()})
    return jobs


def _check_not_queued(out: Path) -> None:
    submission = last_submission(out / FOLDER)
    jobs = {} if submission is None else read_job(submission)["jobs"]
    for step, job in jobs.items():
        if state := state_in_queue(str(job), _name(out, step)):
            raise ConfigError(
                f"{out}: its job {job} ({step}) is {state}; wait for it, or "
                f"`scancel {' '.join(map(str, jobs.values()))}` first"
            )


@contextmanager
def _begun(out: Path, facts: dict[str, object]) -> Iterator[None]:
    """Begin or continue OUT as `motley tokenize` does; where it is begun here and that fails, undo it."""
    fresh = not (out / SETTINGS).exists()
    with claimed(out, SETTINGS, facts, HOLDS):
        pass  # and not held: its jobs may start at once
    try:
        yield
    except BaseException:
        if fresh:
            with suppress(OSError):  # a job that was taken before another was refused may have written there
                for path in (out / SETTINGS, out / LOCK, out / FOLDER / "lock"):
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
