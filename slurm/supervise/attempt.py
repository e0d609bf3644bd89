"""The supervisor of one attempt of a job: what the batch script executes, on the job's first node.

    python -m slurm.attempt SUBMISSION      or the folder of an array's owner

It looks at the nodes, starts ranks by srun, watches them, finds out how they ended, decides what comes next
(slurm/supervise/decide.py) and has Slurm do it. Imports no torch: ranks may run in a container, this runs on
the host.
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TypeVar

from data_pipeline.files.toml_config import ConfigError
from parallel.launch import LaunchError
from pretrain.config import is_legal
from slurm import commands
from slurm.records import Attempt, append, now, read_attempts, saved_step
from slurm.supervise import preflight
from slurm.supervise.cause import Cause, end_of_log, find_cause, rank_ends
from slurm.supervise.decide import PREEMPTED, End, decide, decide_bad_nodes, ended_by_slurm, is_restarted
from slurm.supervise.job import Job, environment, open_job, srun_command
from slurm.supervise.watchdog import WAIT_S, run_step, watch

PATIENCE_S = 600.0
"""How long Slurm's controller may be away (it is updated, it moves) when it must be asked or told."""
_ALL_RANKS = 64
"""Up to so many ranks each has its end in an attempt's row; of more, those that did not end well."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Outcome:
    """What an attempt came to, and what is to be done about it."""

    next: str
    reason: str
    exit_code: int
    cause: Cause | None = None
    excluded: tuple[str, ...] = ()
    restarts: bool = False
    """Slurm has put the job back into the queue itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the attempt; the job's exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurm.attempt")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--failed", metavar="WHY", help="record that the batch script failed, and start nothing"
    )
    args = parser.parse_args(argv)
    # Slurm sends SIGTERM at the time limit, at scancel and at a preemption, also to this process; it has to
    # outlive that, to say how the ranks ended.
    signal.signal(signal.SIGTERM, _note)
    try:
        job = open_job(args.folder)
        if (code := _over_before(job)) is not None:
            return code
        return _attempt(job, args.failed)
    except (ConfigError, LaunchError, OSError) as error:
        print(f"motley: {error}; not started again", file=sys.stderr, flush=True)
        return 1


def _note(number: int, _frame: FrameType | None) -> None:
    print(f"motley: the batch script was sent {signal.Signals(number).name}", flush=True)


def _over_before(job: Job) -> int | None:
    """The exit code of a job whose chain has come to its end before it; None if there is work left."""
    last = next((row for row in reversed(job.own) if row["job"] != job.facts.job), None)
    if last is None or last["next"] not in ("done", "stopped"):
        return None
    print(
        f"motley: nothing to do: job {last['job']} of this chain: {last['next']}: {last['reason']}",
        flush=True,
    )
    return last["exit_code"]


def _attempt(job: Job, failed: str | None) -> int:
    facts, where = job.facts, f"job {job.facts.name}, attempt {job.facts.attempt} on {job.facts.nodelist}"
    print(f"motley: {where}, from step {job.from_step}; ranks log to {job.attempt_dir}", flush=True)
    job.attempt_dir.mkdir(parents=True, exist_ok=True)
    for row in job.earlier:
        if row["next"] == "running":
            reason = "it never said how it ended: its first node was lost, or Slurm killed it first"
            append(job.records, row | {"next": "lost", "reason": reason, "to_step": job.from_step})
    job = replace(job, earlier=read_attempts(job.records))
    row: Attempt = {
        **{"job": facts.job, "task": facts.task, "attempt": facts.attempt, "nodes": facts.nodelist},
        **{"world_size": 0, "submitted": _submitted(job), "started": now(), "ended": None},
        **{"from_step": job.from_step, "to_step": None, "exit_code": None, "cause": None, "ranks": []},
        **{"excluded": [], "next": "running", "reason": ""},
    }
    nodes, used = commands.hostnames(facts.nodelist), 0
    if failed is None:
        used = _usable(job, len(nodes))
        row["world_size"] = used * job.profile.ranks_per_node
    append(job.records, row)

    if failed is not None:
        outcome = Outcome("stopped", f"{failed}; not started again", 1)
    elif len(job.jobs) == 1 and job.allowed.requeues > job.profile.max_requeues:
        outcome = Outcome("stopped", "not started again: it was lost more often than max_requeues", 1)
    elif not used:
        legal = f"the layout is not legal on {len(nodes)} nodes, nor on fewer of them"
        outcome = Outcome("stopped", f"{legal}; not started again", 2)
    else:
        outcome = _check_nodes(job, nodes) or _train(job, nodes[:used])
    return _finish(job, row, outcome)


def _submitted(job: Job) -> str:
    """When the job entered the queue, before this attempt; of a job in a chain: when it could go on."""
    before = next((row["ended"] for row in reversed(job.own) if row["job"] != job.facts.job), None)
    try:
        local = commands.show_job(str(job.facts.own_id))["SubmitTime"]
        at = datetime.strptime(local, "%Y-%m-%dT%H:%M:%S").astimezone(UTC).isoformat(timespec="seconds")
    except (ConfigError, KeyError, ValueError):
        return before or now()
    return max(at, before or at)


def _usable(job: Job, given: int) -> int:
    """The most of `given` nodes that the run's layout can be spread over; 0 if it cannot."""
    ranks = job.profile.ranks_per_node
    counts = range(given, 0, -1)
    used = next((count for count in counts if is_legal(job.config, count * ranks)), 0)
    if 0 < used < given:
        print(f"motley: {used} of {given} nodes are used: the layout is legal for no more", flush=True)
    return used


def _check_nodes(job: Job, nodes: Sequence[str]) -> Outcome | None:
    """Look at all nodes of the job; None if they are good."""
    settings = job.profile.preflight
    if not settings.enabled:
        return None
    folder = job.attempt_dir / "preflight"
    spec = preflight.write_spec(settings, gpus=job.profile.gpus_per_node, run_dir=job.run_dir, folder=folder)
    errors = folder / "srun.log"
    command = srun_command(job, "parallel.node_check", spec, nodes, 1)
    command[1:1] = ["--kill-on-bad-exit=0", f"--output={folder}/node%t.log"]
    deadline = time.monotonic() + settings.timeout_s + WAIT_S

    def late() -> str | None:
        return "the check of nodes does not end" if time.monotonic() > deadline else None

    code, _ = _step(job, command, environment(job, nodes), errors, late)
    if not (found := preflight.problems(folder, nodes)):
        return None
    said = errors.read_text(errors="replace")
    print(said, end="", file=sys.stderr, flush=True)
    why = "; ".join(f"{node}: {problem}" if node else problem for node, problem in found.items())
    if outcome := _if_slurm_ended_it(
        job, said, Cause("lost_node", None, None, f"check of nodes: {why}", code or 1)
    ):
        return outcome
    return _without(job, found, f"check of nodes: {why}")


def _without(job: Job, found: dict[str, str], why: str) -> Outcome:
    """What to do about bad nodes: start again on others, if they can be named."""
    bad = tuple(sorted(node for node in found if node))
    cause = Cause("preflight", None, bad[0] if len(bad) == 1 else None, why, 1)
    if not bad:
        return Outcome("stopped", f"{why}; not started again: no node can be named", 1, cause)
    total = set(bad).union(*(row["excluded"] for row in job.own))
    following, reason = decide_bad_nodes(why, len(total), job.profile.preflight.max_excluded, job.allowed)
    return Outcome(following, reason, 1, cause, bad)


def _train(job: Job, nodes: Sequence[str]) -> Outcome:
    """Run the ranks to their end, whatever that is."""
    errors = job.attempt_dir / "srun.log"
    errors.touch()
    per_node = job.profile.ranks_per_node
    command = srun_command(job, "pretrain.train", job.submission / "config.json", nodes, per_node)
    command[1:1] = [
        *("--kill-on-bad-exit=1", f"--wait={WAIT_S}"),
        *(f"--output={job.attempt_dir}/rank%t.log", "--open-mode=append"),
    ]
    hang = watch(job.attempt_dir, job.run_dir, errors, job.profile.hang_after_s)
    code, found = _step(job, command, environment(job, nodes), errors, hang)
    said = errors.read_text(errors="replace")
    print(said, end="", file=sys.stderr, flush=True)
    if code == 0:
        return Outcome("done", "all steps done", 0)
    cause = find_cause(job.attempt_dir, len(nodes) * per_node, said, code, hang=found)
    said += end_of_log(job.attempt_dir / "rank0.log")  # where Slurm says why it ended the step
    return _if_slurm_ended_it(job, said, cause) or _outcome(job, cause, None, restarts=False)


def _step(
    job: Job,
    command: Sequence[str],
    environment: dict[str, str],
    errors: Path,
    hang: Callable[[], str | None],
) -> tuple[int, str | None]:
    def end_step() -> None:
        try:
            _patiently(lambda: commands.kill_steps(str(job.facts.own_id)), WAIT_S)
        except ConfigError as error:  # srun is ended all the same
            print(f"motley: {error}", file=sys.stderr, flush=True)

    return run_step(command, environment=environment, errors=errors, hang=hang, end_step=end_step)


def _if_slurm_ended_it(job: Job, said: str, cause: Cause) -> Outcome | None:
    """What to do where Slurm, or a person, ended the job; None where ranks ended by themselves."""
    try:
        seen = _patiently(lambda: commands.show_job(str(job.facts.own_id)))
    except ConfigError as error:
        print(f"motley: {error}", file=sys.stderr, flush=True)
        seen = {}
    by_slurm = ended_by_slurm(seen, job.facts.attempt, said)
    if by_slurm is None:
        return None
    return _outcome(job, cause, by_slurm, restarts=is_restarted(seen, job.facts.attempt))


def _outcome(job: Job, cause: Cause, by_slurm: str | None, *, restarts: bool) -> Outcome:
    end = End(
        exit_code=cause.exit_code,
        kind=cause.kind,
        why=cause.sentence,
        progress=saved_step(job.run_dir) > job.from_step,
        by_slurm=by_slurm,
        restarts=restarts,
    )
    following, reason = decide(end, job.allowed)
    if by_slurm == PREEMPTED:
        cause = replace(cause, kind=PREEMPTED)
    return Outcome(following, reason, cause.exit_code, cause, restarts=restarts)


def _finish(job: Job, row: Attempt, outcome: Outcome) -> int:
    """Record what the attempt came to, and have Slurm do what comes next; the job's exit code."""
    outcome = _record(job, row, outcome)
    total = sorted(set(outcome.excluded).union(*(each["excluded"] for each in job.own)))
    if "exclude" in job.profile.options:
        total.append(str(job.profile.options["exclude"]))
    try:
        if outcome.next == "requeued" and not outcome.restarts:
            _patiently(lambda: commands.requeue(job.facts.name))
            # Only now: a job that runs has its nodes, and Slurm refuses. This process outlives the SIGTERM.
            if outcome.excluded:
                _patiently(lambda: commands.exclude(job.facts.name, total))
        elif outcome.next == "chained" and outcome.excluded:
            for follower in job.followers:
                _patiently(lambda name=str(follower): commands.exclude(name, total))
        elif outcome.next in ("done", "stopped") and job.followers:
            _patiently(lambda: commands.cancel([str(follower) for follower in job.followers]))
    except ConfigError as error:
        if outcome.next == "requeued":
            outcome = _record(
                job, row, replace(outcome, next="stopped", reason=f"{outcome.reason}; but {error}")
            )
        else:
            _say(f"motley: {error}")
    return outcome.exit_code


def _record(job: Job, row: Attempt, outcome: Outcome) -> Outcome:
    """Write the attempt's last row, and one line for people. Stopped if there is no room for a row: nor is
    there any for a checkpoint."""
    ends = [
        {key: end[key] for key in ("rank", "host", "exit_code", "kind")} for end in rank_ends(job.attempt_dir)
    ]
    cause = outcome.cause
    row |= {
        **{"ended": now(), "to_step": saved_step(job.run_dir), "exit_code": outcome.exit_code},
        "cause": cause and {key: getattr(cause, key) for key in ("kind", "rank", "host", "message")},
        "ranks": ends if len(ends) <= _ALL_RANKS else [end for end in ends if end["exit_code"]],
        **{"excluded": list(outcome.excluded), "next": outcome.next, "reason": outcome.reason},
    }
    try:
        append(job.records, row)
    except OSError as error:
        going_on = outcome.next in ("requeued", "chained")
        reason = f"{outcome.reason}; " + ("but not started again: " if going_on else "") + str(error)
        outcome = replace(outcome, next="stopped" if going_on else outcome.next, reason=reason)
    steps = f"saved steps {job.from_step} -> {row['to_step']}"
    _say(f"motley: attempt {job.facts.attempt}, {steps}: {outcome.reason}")
    return outcome


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the job's output may be on a disk that is full
        print(line, flush=True)


def _patiently(tell: Callable[[], Answer], patience_s: float = PATIENCE_S) -> Answer:
    """`tell()`, again and again so long as Slurm's controller is away."""
    deadline, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return tell()
        except commands.ControllerUnreachable:
            if time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 30.0)


if __name__ == "__main__":
    raise SystemExit(main())
