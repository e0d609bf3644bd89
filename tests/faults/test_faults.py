"""Files and disks that go bad are told in one line; a sample of the campaign (python -m tests.faults)."""

from collections import Counter
from random import Random

import pytest

from tests.faults import damage
from tests.faults.__main__ import one_fault, table
from tests.faults.arena import build
from tests.faults.files import FILES, File
from tests.faults.judge import IDENTICAL, SAID, SILENT, UGLY, Told, judge
from tests.faults.kinds import Campaign, corrupted, failing_disk

SAMPLE_SEED, SAMPLE = 7, range(4)
CHEAP = ("kill", "signal", "disk")
"""Kinds of the sample. Corruptions have tests of their own below, and tokenizing takes seconds."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Campaign:
    return Campaign(build(tmp_path_factory.mktemp("faults"), whole=bool(request.config.getoption("full"))))


def ways_of(file: File) -> list[str]:
    return [way for way in damage.STRUCTURAL if not (file.optional and way == "missing")]


@pytest.mark.parametrize("number", range(len(FILES)), ids=[file.glob for file in FILES])
def test_a_file_that_is_not_what_it_should_be_is_named(
    campaign: Campaign, number: int, request: pytest.FixtureRequest
) -> None:
    """Nothing, a folder, garbage or half of it: one message with the file, or the results as ever.

    One way for each file, in turn, met by its cheapest verb; all ways and verbs with --full.
    """
    file, full = FILES[number], request.config.getoption("full")
    if file.verbs[0] in ("tokenize", "report", "report logs") and not full:
        pytest.skip("tokenizing and figures take seconds; the campaign has them")
    ways = ways_of(file)
    for way in ways if full else [ways[number % len(ways)]]:
        for verb in file.verbs if full else file.verbs[:1]:
            campaign.arena.restore()
            told, verdict = corrupted(campaign, file, verb, way, Random(number))
            assert verdict.outcome in (IDENTICAL, SAID), f"{told}: {verdict}"


@pytest.mark.parametrize(
    ("what", "operation", "error", "match"),
    [
        ("train fresh", "write", "ENOSPC", "metrics.jsonl"),
        ("train fresh", "write", "ENOSPC", "events.out"),
        ("train fresh", "open", "EROFS", "record.json"),
        ("train fresh", "fsync", "EIO", "config.resolved.json"),
        ("train", "read", "EIO", "record.json"),
        ("train fresh", "rename", "EROFS", "step_00000003$"),
        ("train", "read", "EIO", "step_00000009/manifest.json"),
    ],
)
def test_a_disk_that_fails_is_named_and_the_same_command_goes_on(
    campaign: Campaign, what: str, operation: str, error: str, match: str
) -> None:
    """Full, read-only or failing: exit code 1 or 2, one line, and nothing half-written is in the way."""
    campaign.arena.restore()
    told, verdict = failing_disk(campaign, what, operation, 1, error, match=match, lasts=True)
    assert verdict.outcome == SAID, f"{told}: {verdict}"


def test_a_sample_of_the_campaign(campaign: Campaign) -> None:
    results = [(number, *one_fault(campaign, SAMPLE_SEED, number, CHEAP)) for number in SAMPLE]
    bad = [result for result in results if result[-1].outcome not in (IDENTICAL, SAID)]
    assert not bad, f"python -m tests.faults --seed {SAMPLE_SEED} --kinds {' '.join(CHEAP)} --only N: {bad}"


GOOD = Told([0], "all is well", {"loss": 1.0, "caveats": []})


@pytest.mark.parametrize(
    ("codes", "text", "results", "outcome"),
    [
        ([0], "all is well", {"loss": 1.0, "caveats": []}, IDENTICAL),
        ([0], "all is well", {"loss": 2.0, "caveats": []}, SILENT),
        ([0], "all is well\nloss of a.json printed", {"loss": 2.0, "caveats": []}, SILENT),
        ([0], "a.json is damaged and passed over", {"loss": 2.0, "caveats": []}, SAID),
        ([0], "all is well", {"loss": 2.0, "caveats": ["other data"]}, SAID),
        ([2], "motley train: a.json: not valid JSON", None, SAID),
        ([1], "motley train: something went wrong", None, UGLY),
        ([1], "motley train: a.json:\n" + "  line\n" * 30, None, UGLY),
        ([1], "Traceback (most recent call last):\n  a.json\nKeyError: 1", None, UGLY),
        ([-6], "a.json", None, UGLY),
        ([70], "a.json", None, UGLY),
        ([0], "\x1b[31m all is well", {"loss": 1.0, "caveats": []}, UGLY),
    ],
)
def test_what_became_of_a_fault(codes: list[int], text: str, results: object, outcome: str) -> None:
    assert judge(Told(codes, text, results), GOOD, ["a.json"]).outcome == outcome


def test_the_table_counts_by_kind_and_outcome() -> None:
    lines = table(Counter({("kill", IDENTICAL): 3, ("disk", SILENT): 1}), ["kill", "disk"]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["kill", "3", "3", "0", "0", "0"],
        ["disk", "1", "0", "0", "1", "0"],
        ["all", "4", "3", "0", "1", "0"],
    ]
