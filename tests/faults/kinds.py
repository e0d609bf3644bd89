"""The kinds of faults. Each function draws a fault from a generator, injects it and judges the outcome."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.e2e.warm import Run
from tests.faults import damage, hostile
from tests.faults.arena import Arena, outcome_of, start
from tests.faults.files import FILES, File
from tests.faults.injected_disk import DiskFault
from tests.faults.judge import IDENTICAL, SAID, SILENT, UGLY, Told, Verdict, first_difference, judge, words_of

Described = tuple[str, Verdict]
"""What was injected, in words, and what became of it."""

_CALLS = {"open": 60, "read": 40, "write": 90, "fsync": 25, "rename": 8, "mkdir": 12, "unlink": 4}
"""About as many calls does a run make; a fault beyond the last call is none."""
_LOSS_TOLERANCE = 1e-5
"""Relative, between layouts of ranks. Measured over 69 walks over 13 layouts: 2.3e-7 at worst."""


class Campaign:
    """An arena, and what each of VERBS does in it without a fault, measured when it is first wanted."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._good: dict[str, Told] = {}

    def good(self, what: str) -> Told:
        if what not in self._good:
            self.arena.restore()
            told = self.finish(start(self.arena, what), what)
            assert not any(told.codes), told.text
            self._good[what] = told
            self.arena.restore()
        return self._good[what]

    def finish(self, run: Run, what: str) -> Told:
        """Wait for a verb; its results are None if it failed."""
        codes = run.codes()
        return Told(codes, run.text(), None if any(codes) else outcome_of(self.arena, what))

    def again(self, what: str, **how: Any) -> Told:
        """The verb without a fault, its output apart from what is there."""
        self.arena.output.unlink(missing_ok=True)
        return self.finish(start(self.arena, what, **how), what)

    def disk(self, operation: str, number: int, error: str, *, match: str = "", lasts: bool = False) -> str:
        """A DiskFault in the arena, as JSON."""
        root, report = str(self.arena.root), str(self.arena.report)
        return DiskFault(operation, number, error, root, report, match, lasts).to_json()


def _call(rng: Random) -> tuple[str, int]:
    """An operation and the number of its call; early calls are likelier."""
    operation = rng.choice(list(_CALLS))
    return operation, 1 + int(_CALLS[operation] * rng.random() ** 1.5)


def kill(campaign: Campaign, rng: Random) -> Described:
    """SIGKILL at a call, once or twice, and the same command again."""
    return _interrupted(campaign, rng, ["SIGKILL"] * rng.choice((1, 1, 2)), {-signal.SIGKILL, 0})


def stop(campaign: Campaign, rng: Random) -> Described:
    """A signal to stop at a call, and the same command again."""
    name = rng.choice(("SIGTERM", "SIGINT", "SIGUSR2"))
    # Before the run begins nobody handles it, and there is nothing to save.
    return _interrupted(campaign, rng, [name], {85, 0, -getattr(signal, name), 128 + signal.SIGINT})


def _interrupted(campaign: Campaign, rng: Random, signals: list[str], legal: set[int]) -> Described:
    what = rng.choice(("train", "train fresh"))
    good, moments = campaign.good(what), []
    for name in signals:
        operation, number = _call(rng)
        moments.append(f"{name} at {operation} {number}")
        run = start(campaign.arena, what, disk=campaign.disk(operation, number, name))
        (code,) = run.codes()
        if code not in legal or "Traceback" in run.text():
            return f"{what}: {', '.join(moments)}", Verdict(UGLY, f"code {code}: {run.text()[-200:]}")
    verdict = judge(campaign.again(what), good, [])
    return f"{what}: {', '.join(moments)}", _must_go_on(verdict)


def _must_go_on(verdict: Verdict) -> Verdict:
    """A command that is given again after an interruption may not refuse."""
    return Verdict(UGLY, f"does not go on: {verdict.why}") if verdict.outcome == SAID else verdict


def corruption(campaign: Campaign, rng: Random) -> Described:
    """A file of a run, of data, of a comparison or of weights that is not what was written."""
    file = rng.choice(FILES)
    ways: list[str] = [way for way in damage.STRUCTURAL if not (file.optional and way == "missing")]
    ways += [*damage.CONTENT, *damage.CONTENT, "foreign"] if file.flips else []
    way = rng.choice(ways)
    verbs = [verb for verb in file.verbs if way in damage.STRUCTURAL or not verb.startswith(_SHOWING)]
    return corrupted(campaign, file, rng.choice(verbs or file.verbs), way, rng)


_SHOWING = ("status", "logs", "describe")
"""Verbs that only show what files hold: of a changed digit they cannot know."""


def corrupted(campaign: Campaign, file: File, what: str, way: str, rng: Random) -> Described:
    """One file, damaged one way, met by one verb."""
    good, root = campaign.good(what), campaign.arena.root
    path = rng.choice(sorted(root.glob(file.glob)))
    told = f"{what}: {path.relative_to(root)}: {way}"
    if way == "foreign":
        if (taken := damage.foreign(path, root, rng)) is None:
            way = "changed digit"
            damage.changed_digit(path, rng)
        told = f"{what}: {path.relative_to(root)}: {way if taken is None else f'is {taken}'}"
    else:
        (damage.STRUCTURAL | damage.CONTENT)[way](path, rng)
    return told, judge(campaign.finish(start(campaign.arena, what), what), good, words_of(path, root))


_ERRORS = {
    "read": ("EIO",),
    "write": ("ENOSPC", "EIO"),
    "fsync": ("ENOSPC", "EIO"),
    "open": ("EROFS", "ENOSPC", "EIO", "EACCES"),
    "rename": ("EROFS", "ENOSPC", "EIO"),
    "mkdir": ("EROFS", "ENOSPC", "EACCES"),
    "unlink": ("EROFS", "EIO"),
}


def disk(campaign: Campaign, rng: Random) -> Described:
    """A disk that is full, read-only or failing from a call on, for once or for good."""
    what = rng.choice(("train", "train", "train fresh", "train fresh", "report", "export"))
    operation, number = _call(rng)
    return failing_disk(
        campaign, what, operation, number, rng.choice(_ERRORS[operation]), lasts=rng.random() < 0.5
    )


def failing_disk(
    campaign: Campaign, what: str, operation: str, number: int, error: str, *, match: str = "", lasts: bool
) -> Described:
    """One fault of the disk; a verb that failed is then run again without it, and must end as ever."""
    good, arena = campaign.good(what), campaign.arena
    told = f"{what}: {error} at {operation} {number}{' and later ones' if lasts else ''} {match}".rstrip()
    fault = campaign.disk(operation, number, error, match=match, lasts=lasts)
    faulty = campaign.finish(start(arena, what, disk=fault), what)
    if not arena.report.exists():
        return f"{told} (not met)", judge(faulty, good, [])
    paths = [Path(line) for line in dict.fromkeys(arena.report.read_text().splitlines())]
    told = f"{told}: {paths[0].relative_to(arena.root)}"
    verdict = judge(faulty, good, [word for path in paths for word in words_of(path, arena.root)])
    if verdict.outcome == SAID and any(faulty.codes):
        after = _must_go_on(judge(campaign.again(what), good, []))
        return told, verdict if after.outcome == IDENTICAL else after
    return told, verdict


def arm(campaign: Campaign, rng: Random) -> Described:
    """One arm of a comparison is trained on documents that are not those of the others; then the report."""
    good, root = campaign.good("report"), campaign.arena.root
    comparison, data = root / "runs" / "tiny_compare", root / "data" / "train"
    victim = rng.choice(sorted(path.name for path in comparison.glob("*_seed*")))
    shutil.rmtree(comparison / victim)
    if rng.random() < 0.7:
        count = rng.choice((1, 3, 10, 60))
        damage.flipped_documents(data, count, rng)
        told = f"{victim} trained with a flipped bit in {count} documents"
    else:
        damage.other_documents(data, rng)
        told = f"{victim} trained on other documents of the same shape"
    run = Run([str(comparison / "configs" / f"{victim}.json")], campaign.arena.output)
    names = ["tokens-", str(data), "read different data", victim]
    if any(codes := run.codes()):
        return told, judge(Told(codes, run.text(), None), good, names)
    # What only the log of one run says is not said to the reader of the report.
    return told, judge(campaign.again("report"), good, names)


_LAYOUTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("parallel.zero_stage=0",)),
    (1, ("parallel.micro_batch_sequences=1",)),
    (2, ("parallel.micro_batch_sequences=1", "parallel.zero_stage=1")),
    (2, ("parallel.micro_batch_sequences=1", "parallel.zero_stage=3")),
    (2, ("parallel.tp=2",)),
)
"""Ranks and overrides."""


def layout(campaign: Campaign, rng: Random) -> Described:
    """Killed on one layout of ranks and continued on another."""
    what, arena = "train fresh", campaign.arena
    good = campaign.good(what)
    (ranks, first), (other_ranks, second) = rng.sample(_LAYOUTS, 2)
    operation, number = _call(rng)
    victim = rng.randrange(ranks)
    told = (
        f"{ranks} ranks {' '.join(first)}, rank {victim} killed at {operation} {number}; then {other_ranks} "
    )
    told += f"ranks {' '.join(second)}"
    fault = campaign.disk(operation, number, "SIGKILL")
    run = start(arena, what, overrides=first, processes=ranks, disk=fault, on_rank=victim)
    if ranks > 1:
        _kill_peers(run, arena)
    run.codes()
    after = campaign.again(what, overrides=second, processes=other_ranks)
    if any(after.codes) or after.results is None:
        return told, Verdict(UGLY, f"codes {after.codes}: {after.text[-300:]}")
    return told, _close(good.results, after.results)


def _kill_peers(run: Run, arena: Arena) -> None:
    """As the launcher does: once one rank is gone, or all are at the end, the others are ended."""
    run.wait_for_any()
    if arena.report.exists():
        run.signal(signal.SIGKILL)


def _close(good: dict[str, Any], other: dict[str, Any]) -> Verdict:
    """The same data at every step, and losses that differ by rounding alone."""
    if difference := first_difference(good["stream"], other["stream"], "stream"):
        return Verdict(SILENT, difference)
    if [row["step"] for row in good["curve"]] != [row["step"] for row in other["curve"]]:
        return Verdict(SILENT, "other steps")
    for ours, theirs in zip(good["curve"], other["curve"], strict=True):
        for name in ours:
            if "loss" in name and theirs.get(name) != pytest.approx(ours[name], rel=_LOSS_TOLERANCE):
                return Verdict(
                    SILENT, f"step {ours['step']}: {name} {theirs.get(name)} instead of {ours[name]}"
                )
    return Verdict(IDENTICAL)


def hostile_data(campaign: Campaign, rng: Random) -> Described:
    """One sample of a raw shard that no decoder expects; all other samples must be tokenized as ever."""
    good, root = campaign.good("tokenize"), campaign.arena.root
    name = rng.choice(list(hostile.SAMPLES))
    hostile.write(root / "raw" / "raw-00009.tar", name, rng)
    run = start(campaign.arena, "tokenize")
    codes = run.codes()
    told = Told(codes, run.text(), None if any(codes) else hostile.results(root, good.results))
    verdict = judge(told, good, [hostile.KEY, "raw-00009"])
    if told.results is not None and told.results["skipped"]:
        verdict = verdict if verdict.outcome == UGLY else Verdict(SAID, told.results["skipped"][0]["reason"])
    elif verdict.outcome == SAID and name not in hostile.ENDS_ALL:
        verdict = Verdict(UGLY, f"one sample ends it all: {verdict.why}")
    return name, verdict


KINDS: dict[str, tuple[int, Callable[[Campaign, Random], Described]]] = {
    # Weight among the faults of a campaign, and the function.
    "kill": (15, kill),
    "signal": (8, stop),
    "corruption": (41, corruption),
    "disk": (22, disk),
    "arm": (4, arm),
    "layout": (4, layout),
    "hostile": (6, hostile_data),
}
