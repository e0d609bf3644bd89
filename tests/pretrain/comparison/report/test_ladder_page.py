"""The page of a ladder: one file, whole, that says what the findings say."""

import io
import json

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.report.digest import digest_line
from pretrain.comparison.run import run_comparison
from tests.pretrain.comparison.report.test_page import Checker


def test_the_command_writes_one_page_that_holds_together_and_writes_it_once(
    turning_ladder: LadderFindings,
) -> None:
    plan = turning_ladder.plan
    out, again = io.StringIO(), io.StringIO()
    assert run_comparison(plan.path, to=out) == 0
    assert "x 3 seed(s) x 5 cells (d32_2tpp" in out.getvalue() and "30 done already" in out.getvalue()
    assert "30 of 30 runs finished" in out.getvalue() and "  d64, speech: " in out.getvalue()
    page = plan.directory / "report" / "index.html"
    written = page.stat().st_mtime_ns
    assert run_comparison(plan.path, to=again) == 0
    assert again.getvalue() == out.getvalue() and page.stat().st_mtime_ns == written

    text, checker = page.read_text(), Checker()
    checker.feed(text)
    assert not checker.stack and len(checker.ids) == len(set(checker.ids))
    assert "http" not in text.replace("http://www.w3.org", "") and "<script" not in text
    words = " ".join(checker.text)
    assert "mot from about 4 tokens per parameter on" in words and "MoT paper" in words
    assert "d64_4tpp" in words and "intervals of all 15 verdicts" in words
    summary = (page.parent / "summary.json").read_bytes()
    assert text.endswith(digest_line(summary)) and json.loads(summary)["num_verdicts"] == 15
    files = ("index.html", "summary.json", "runs.csv", "cells.csv", "shares.csv")
    assert {path.name for path in page.parent.iterdir()} == set(files)
