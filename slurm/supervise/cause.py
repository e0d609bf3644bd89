"""The cause of an attempt's failure: the first rank that failed, its host and its error.

There are three sources, in this order: the end records of ranks (parallel/rank_end.py), the messages of srun,
and the last lines of the logs of ranks without a record. The messages are those of Slurm 22.05 to 24.11.
"""

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.exit_codes import ExitCode
from parallel.rank_end import earliest, kind_of_text, one_line, rank_ends
from pretrain.run_files import rank_log

_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,\[\]-]+): ((?!running|exited\b).+)")
_NODE_FAILURE = re.compile(r"Node failure on ([^\s,;]+)|DUE TO NODE FAILURE", re.IGNORECASE)
_NOT_STARTED = re.compile(
    r"srun: (?:error|fatal): .*(?:Unable to create (?:job )?step|Task launch for .* failed|launch failed"
    r"|Unable to (?:allocate|confirm)|Invalid (?:generic|user|partition)|More processors requested"
    r"|Memory required|unrecogni[sz]ed option|Requested node configuration).*"
)
_NO_PROGRAM = re.compile(r"(?:slurmstepd: )?error: execve\(\).*")
_OOM_KILL = re.compile(r".*oom[-_]kill event.*|.*Out Of Memory.*", re.IGNORECASE)
_SIGNALS = {signal.strsignal(number): 128 + number for number in signal.valid_signals()}
_STOP_SIGNALS = (signal.strsignal(signal.SIGUSR2), signal.strsignal(signal.SIGTERM))
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended without being done."""

    kind: str
    """The kind of a rank's end record, or "killed", "lost_node", "hang", or "launch" (no rank started)."""
    rank: int | None
    host: str | None
    message: str
    exit_code: int
    """The code of the first rank that failed (128 + signal, if it was killed); 85 if a signal stopped all."""

    @property
    def sentence(self) -> str:
        """One line for people, such as "rank 3 on node2: out of memory: CUDA out of memory. Tried to ..."."""
        who = "" if self.rank is None else f"rank {self.rank}"
        where = "" if self.host is None else f"on {self.host}"
        what = "" if self.kind == "stopped" else self.kind.replace("_", " ")
        return one_line(": ".join(part for part in (f"{who} {where}".strip(), what, self.message) if part))


@dataclass(frozen=True)
class _End:
    """srun's message about the end of a task; `text` is "" if there was none."""

    rank: int
    host: str | None
    text: str


def find_cause(
    attempt_dir: Path, world_size: int, srun_log: str, srun_code: int, *, hang: str | None = None
) -> Cause:
    """The cause of an attempt's end.

    `srun_code`: srun's exit code, not 0; `hang`: what the watchdog saw, if it ended the attempt.
    """
    records = rank_ends(attempt_dir)
    code = srun_code or 1
    failures = [end for end in records if end["kind"] not in ("done", "stopped", "lost_peer")]
    if failures:
        return _of_record(earliest(failures))
    if hang is not None:
        return Cause("hang", None, None, hang, code)
    if lost := _NODE_FAILURE.search(srun_log):
        return Cause("lost_node", None, lost[1], one_line(_line_of(srun_log, lost)), code)
    if refused := _NOT_STARTED.search(srun_log):
        node = re.search(r"on node (\S+?):", refused[0])
        return Cause("launch", None, node[1] if node else None, one_line(refused[0]), code)

    ended = list(_ended(srun_log))
    stopped = [end for end in records if end["kind"] == "stopped"]
    unsaved = [end for end in stopped if end["step"] is None]
    # Once one rank has left, others end for many reasons: the first end that srun saw decides.
    if ended and _code(ended[0].text) == ExitCode.REQUEUE:
        if unsaved:
            return _of_record(unsaved[0])
        how = "after a checkpoint" if stopped else "before training could listen"
        return Cause("stopped", None, None, f"stopped by a signal, {how}", ExitCode.REQUEUE)
    if cause := _of_ranks_without_record(records, ended, attempt_dir, world_size, srun_log):
        return cause
    if unsaved:
        return _of_record(unsaved[0])
    if stopped:
        return Cause("stopped", None, None, "stopped by a signal, after a checkpoint", ExitCode.REQUEUE)
    for end in ended:  # the rank failed while it left, after it had written its record
        if code := _code(end.text):
            return Cause("error", end.rank, end.host, f"{end.text}, after its work was done", code)
    message = one_line(srun_log)
    return Cause("error", None, None, f"srun ended with code {code}{message and f': {message}'}", code)


def _of_ranks_without_record(
    records: Sequence[dict[str, Any]],
    ended: Sequence[_End],
    attempt_dir: Path,
    world_size: int,
    srun_log: str,
) -> Cause | None:
    """The cause, if ranks without an end record caused the failure, or a lost peer of unknown cause did."""
    recorded = {end["rank"] for end in records}
    lost_peers = [end for end in records if end["kind"] == "lost_peer"]
    silent = [end for end in ended if end.rank not in recorded]
    if lost_peers:
        known = recorded | {end.rank for end in silent}
        silent += [_End(rank, None, "") for rank in range(world_size) if rank not in known]
    causes = [_of_silent(end, attempt_dir, srun_log) for end in silent]
    if culprits := [cause for cause in causes if cause.kind not in ("stopped", "lost_peer")]:
        return culprits[0]
    if lost_peers:
        return _of_record(earliest(lost_peers))
    return next((cause for cause in causes if cause.kind == "lost_peer"), None)


def _of_record(end: dict[str, Any]) -> Cause:
    """The cause that a rank's end record tells."""
    return Cause(end["kind"], end["rank"], end["host"], end["message"], end["exit_code"])


def _of_silent(end: _End, attempt_dir: Path, srun_log: str) -> Cause:
    """The cause as srun's message and the rank's log tell it, for a rank without an end record."""
    tail = end_of_log(attempt_dir / rank_log(end.rank))
    code = _code(end.text) or 1
    killed = end.text == "" or any(end.text.startswith(name) for name in _SIGNALS if name)
    if code == ExitCode.REQUEUE:
        kind, message = "stopped", end.text
    elif oom := _OOM_KILL.search(end.text) or (killed and _OOM_KILL.search(f"{srun_log}\n{tail}")):
        kind, message = "out_of_memory", oom[0].strip()
    elif no_program := _NO_PROGRAM.search(tail) or _NO_PROGRAM.search(srun_log):
        kind, message = "launch", no_program[0]
    elif not end.text:
        kind, code, message = "killed", 128 + signal.SIGKILL, "gone without a word, and srun saw no end of it"
    elif end.text.startswith("Killed"):
        kind, message = "killed", "by SIGKILL from the kernel (for want of memory?), Slurm or a person"
    else:
        telling = [line for line in tail.splitlines() if kind_of_text(line)]
        lines = (
            telling[:1] or re.findall(r"^Fatal Python error.*", tail, re.MULTILINE) or tail.splitlines()[-1:]
        )
        kind = kind_of_text(tail) or ("killed" if killed else "error")
        message = ": ".join((end.text, *lines))
    return Cause(kind, end.rank, end.host, one_line(message), code)


def _ended(srun_log: str) -> Iterator[_End]:
    """The ends of tasks that srun reported, in its order."""
    for nodes, tasks, text in _ENDED.findall(srun_log):
        for part in tasks.strip("[]").split(","):
            low, _, high = part.partition("-")
            for rank in range(int(low), int(high or low) + 1):
                yield _End(rank, None if re.search(r"[\[,]", nodes) else nodes, text.strip())


def _code(text: str) -> int:
    """The exit code in srun's message; 85 if a signal to stop came before the rank handled signals."""
    if exited := re.match(r"Exited with exit code (\d+)", text):
        return int(exited[1])
    name = text.partition(" (")[0]
    if name in _STOP_SIGNALS:
        return ExitCode.REQUEUE
    return _SIGNALS.get(name, 128 + signal.SIGKILL if text else 0)


def end_of_log(path: Path) -> str:
    """The last 64 KiB of a log; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _line_of(text: str, match: "re.Match[str]") -> str:
    """The line of `text` in which `match` begins."""
    start = text.rfind("\n", 0, match.start()) + 1
    return text[start:].partition("\n")[0]
