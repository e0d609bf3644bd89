"""The supervisor of one attempt of a job, which the batch script runs on the job's first node.

    python -m slurm.attempt SUBMISSION      (for an array, the submission of its comparison)

It checks the nodes, starts ranks by srun, watches them, finds the cause of their end, decides what comes next
(slurm/supervise/decide.py) and has Slurm do it. It imports no torch, because it runs on the host even where
ranks run in a container.
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
from parallel.rank_end import rank_ends
from pretrain.config import is_legal
from slurm import commands
from slurm.records import Attempt, append, now, read_attempts, saved_step
from slurm.supervise import preflight
from slurm.supervise.cause import Cause, end_of_log, find_cause
from slurm.supervise.decide import PREEMPTED, End, decide, decide_bad_nodes, ended_by_slurm, is_restarted
from slurm.supervise.job import Job, environment, open_job, srun_command
from slurm.supervise.watchdog import WAIT_S, run_step, watch

PATIENCE_S = 600.0
"""Seconds for which a command of Slurm is repeated while the controller does not answer."""
_ALL_RANKS = 64
"""Up to this number of ranks, an attempt's row records the end of every rank; above, only of failed ranks."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and what comes next (`next`, as in the rows of slurm.records)."""

    next: str
    reason: str
    exit_code: int
    cause: Cause | None = None
    excluded: tuple[str, ...] = ()
    restarts: bool = False
    """Whether Slurm has put the job back into the queue itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the attempt; returns the job's exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurm.attempt")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--failed", metavar="WHY", help="record that the batch script failed, and start nothing"
    )
    args = parser.parse_args(argv)
    # Slurm sends SIGTERM at the time limit, at scancel and at a preemption, to this process too. It must
    # survive to record how the ranks ended.
    signal.signal(signal.SIGTERM, _print_signal)
    try:
        job = open_job(args.folder)
        if (code := _code_of_finished_chain(job)) is not None:
            return code
        return _attempt(job, args.failed)
    except (ConfigError, LaunchError, OSError) as error:
        print(f"motley: {error}; not started again", file=sys.stderr, flush=True)
        return 1


def _print_signal(number: int, _frame: FrameType | None) -> None:
    print(f"motley: the batch script was sent {signal.Signals(number).name}", flush=True)


def _code_of_finished_chain(job: Job) -> int | None:
    """The exit code, if an earlier job of the chain has finished or stopped the run; None if work is left."""
    last = next((row for row in reversed(job.own) if row["job"] != job.facts.job), None)
    if last is None or last["next"] not in ("done", "stopped"):
        return None
    print(
        f"motley: nothing to do: job {last['job']} of this chain: {last['next']}: {last['reason']}",
        flush=True,
    )
    return last["exit_code"]


def _attempt(job: Job, failed: str | None) -> int:
    """Run and record the attempt; returns the exit code. `failed`: why the batch script failed, if it did."""
    facts, where = job.facts, f"job {job.facts.name}, attempt {job.facts.attempt} on {job.facts.nodelist}"
    print(f"motley: {where}, from step {job.from_step}; ranks log to {job.attempt_dir}", flush=True)
    job.attempt_dir.mkdir(parents=True, exist_ok=True)
    _record_lost(job)
    job = replace(job, earlier=read_attempts(job.records))
    nodes = commands.hostnames(facts.nodelist)
    used = _usable(job, len(nodes)) if failed is None else 0
    row = _first_row(job, world_size=used * job.profile.ranks_per_node)
    append(job.records, row)

    if failed is not None:
        outcome = Outcome("stopped", f"{failed}; not started again", 1)
    elif len(job.jobs) == 1 and job.budget.requeues > job.profile.max_requeues:
        outcome = Outcome("stopped", "not started again: it was lost more often than max_requeues", 1)
    elif not used:
        legal = f"the layout is not legal on {len(nodes)} nodes, nor on fewer of them"
        outcome = Outcome("stopped", f"{legal}; not started again", 2)
    else:
        outcome = _check_nodes(job, nodes) or _train(job, nodes[:used])
    return _finish(job, row, outcome)


def _record_lost(job: Job) -> None:
    """Give earlier attempts that left no end record a last row, "lost"."""
    for row in job.earlier:
        if row["next"] == "running":
            reason = "it never said how it ended: its first node was lost, or Slurm killed it first"
            append(job.records, row | {"next": "lost", "reason": reason, "to_step": job.from_step})


def _first_row(job: Job, *, world_size: int) -> Attempt:
    """The row of this attempt as it begins."""
    facts = job.facts
    return {
        **{"job": facts.job, "task": facts.task, "attempt": facts.attempt, "nodes": facts.nodelist},
        **{"world_size": world_size, "submitted": _submitted(job), "started": now(), "ended": None},
        **{"from_step": job.from_step, "to_step": None, "exit_code": None, "cause": None, "ranks": []},
        **{"excluded": [], "next": "running", "reason": ""},
    }


def _submitted(job: Job) -> str:
    """When the job entered the queue; in a chain, when the job before it had ended, if that was later."""
    before = next((row["ended"] for row in reversed(job.own) if row["job"] != job.facts.job), None)
    try:
        local = commands.show_job(str(job.facts.own_id))["SubmitTime"]
        at = datetime.strptime(local, "%Y-%m-%dT%H:%M:%S").astimezone(UTC).isoformat(timespec="seconds")
    except (ConfigError, KeyError, ValueError):
        return before or now()
    return max(at, before or at)


def _usable(job: Job, given: int) -> int:
    """The largest number of nodes, up to `given`, on which the run's layout is legal; 0 if there is none."""
    ranks = job.profile.ranks_per_node
    counts = range(given, 0, -1)
    used = next((count for count in counts if is_legal(job.config, count * ranks)), 0)
    if 0 < used < given:
        print(f"motley: {used} of {given} nodes are used: the layout is legal for no more", flush=True)
    return used


def _check_nodes(job: Job, nodes: Sequence[str]) -> Outcome | None:
    """Check all nodes of the job; None if they are good, else the outcome of the attempt."""
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
    if not (problems := preflight.problems(folder, nodes)):
        return None
    srun_log = errors.read_text(errors="replace")
    print(srun_log, end="", file=sys.stderr, flush=True)
    problem_text = "; ".join(f"{node}: {text}" if node else text for node, text in problems.items())
    why = f"check of nodes: {problem_text}"
    cause = Cause("lost_node", None, None, why, code or 1)
    return _if_slurm_ended_it(job, srun_log, cause) or _exclude_nodes(job, problems, why)


def _exclude_nodes(job: Job, problems: dict[str, str], why: str) -> Outcome:
    """The outcome of an attempt with bad nodes: it starts again on other nodes, if bad ones can be named.

    `problems`: problem by node, where the node "" stands for a problem that is no single node's fault.
    """
    bad = tuple(sorted(node for node in problems if node))
    cause = Cause("preflight", None, bad[0] if len(bad) == 1 else None, why, 1)
    if not bad:
        return Outcome("stopped", f"{why}; not started again: no node can be named", 1, cause)
    total = set(bad).union(*(row["excluded"] for row in job.own))
    next_state, reason = decide_bad_nodes(why, len(total), job.profile.preflight.max_excluded, job.budget)
    return Outcome(next_state, reason, 1, cause, bad)


def _train(job: Job, nodes: Sequence[str]) -> Outcome:
    """Run the ranks until they end; returns the outcome of the attempt."""
    errors = job.attempt_dir / "srun.log"
    errors.touch()
    per_node = job.profile.ranks_per_node
    command = srun_command(job, "pretrain.train", job.submission / "config.json", nodes, per_node)
    command[1:1] = [
        *("--kill-on-bad-exit=1", f"--wait={WAIT_S}"),
        *(f"--output={job.attempt_dir}/rank%t.log", "--open-mode=append"),
    ]
    hang = watch(job.attempt_dir, job.run_dir, errors, job.profile.hang_after_s)
    code, hang_text = _step(job, command, environment(job, nodes), errors, hang)
    srun_log = errors.read_text(errors="replace")
    print(srun_log, end="", file=sys.stderr, flush=True)
    if code == 0:
        return Outcome("done", "all steps done", 0)
    cause = find_cause(job.attempt_dir, len(nodes) * per_node, srun_log, code, hang=hang_text)
    srun_log += end_of_log(job.attempt_dir / "rank0.log")  # Slurm writes there why it ended the step
    return _if_slurm_ended_it(job, srun_log, cause) or _outcome(job, cause, None, restarts=False)


def _step(
    job: Job,
    command: Sequence[str],
    environment: dict[str, str],
    errors: Path,
    hang: Callable[[], str | None],
) -> tuple[int, str | None]:
    """Run srun under the watch of `hang`: (exit code, the text of `hang` if it ended the step)."""

    def end_step() -> None:
        try:
            _retry(lambda: commands.kill_steps(str(job.facts.own_id)), WAIT_S)
        except ConfigError as error:  # run_step kills srun all the same
            print(f"motley: {error}", file=sys.stderr, flush=True)

    return run_step(command, environment=environment, errors=errors, hang=hang, end_step=end_step)


def _if_slurm_ended_it(job: Job, srun_log: str, cause: Cause) -> Outcome | None:
    """The outcome if Slurm or a person ended the job; None if ranks ended by themselves."""
    try:
        status = _retry(lambda: commands.show_job(str(job.facts.own_id)))
    except ConfigError as error:
        print(f"motley: {error}", file=sys.stderr, flush=True)
        status = {}
    by_slurm = ended_by_slurm(status, job.facts.attempt, srun_log)
    if by_slurm is None:
        return None
    return _outcome(job, cause, by_slurm, restarts=is_restarted(status, job.facts.attempt))


def _outcome(job: Job, cause: Cause, by_slurm: str | None, *, restarts: bool) -> Outcome:
    """The decision about an attempt that ended for `cause`; `by_slurm` is the result of `ended_by_slurm`."""
    end = End(
        exit_code=cause.exit_code,
        kind=cause.kind,
        why=cause.sentence,
        progress=saved_step(job.run_dir) > job.from_step,
        by_slurm=by_slurm,
        restarts=restarts,
    )
    next_state, reason = decide(end, job.budget)
    if by_slurm == PREEMPTED:
        cause = replace(cause, kind=PREEMPTED)
    return Outcome(next_state, reason, cause.exit_code, cause, restarts=restarts)


def _finish(job: Job, row: Attempt, outcome: Outcome) -> int:
    """Record the outcome and have Slurm do what comes next; returns the job's exit code."""
    outcome = _record(job, row, outcome)
    try:
        _tell_slurm(job, outcome)
    except ConfigError as error:
        if outcome.next == "requeued":
            reason = f"{outcome.reason}; but {error}"
            outcome = _record(job, row, replace(outcome, next="stopped", reason=reason))
        else:
            _print(f"motley: {error}")
    return outcome.exit_code


def _tell_slurm(job: Job, outcome: Outcome) -> None:
    """Requeue the job, exclude bad nodes or cancel the rest of a chain. Raises ConfigError on refusal."""
    excluded = sorted(set(outcome.excluded).union(*(row["excluded"] for row in job.own)))
    if "exclude" in job.profile.options:
        excluded.append(str(job.profile.options["exclude"]))
    if outcome.next == "requeued" and not outcome.restarts:
        _retry(lambda: commands.requeue(job.facts.name))
        # Slurm refuses to exclude nodes of a running job, so this follows. The process survives the SIGTERM.
        if outcome.excluded:
            _retry(lambda: commands.exclude(job.facts.name, excluded))
    elif outcome.next == "chained" and outcome.excluded:
        for follower in job.followers:
            _retry(lambda name=str(follower): commands.exclude(name, excluded))
    elif outcome.next in ("done", "stopped") and job.followers:
        _retry(lambda: commands.cancel([str(follower) for follower in job.followers]))


def _record(job: Job, row: Attempt, outcome: Outcome) -> Outcome:
    """Write the attempt's last row and print one line for people.

    If there is no space for a row the outcome becomes "stopped", for a checkpoint would find none either.
    """
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
        restarts = outcome.next in ("requeued", "chained")
        reason = f"{outcome.reason}; " + ("but not started again: " if restarts else "") + str(error)
        outcome = replace(outcome, next="stopped" if restarts else outcome.next, reason=reason)
    steps = f"saved steps {job.from_step} -> {row['to_step']}"
    _print(f"motley: attempt {job.facts.attempt}, {steps}: {outcome.reason}")
    return outcome


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # the job's output may be on a full disk
        print(line, flush=True)


def _retry(command: Callable[[], Answer], patience_s: float = PATIENCE_S) -> Answer:
    """The result of `command()`, which is repeated while Slurm's controller does not answer."""
    deadline, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return command()
        except commands.ControllerUnreachable:
            if time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 30.0)


if __name__ == "__main__":
    raise SystemExit(main())
