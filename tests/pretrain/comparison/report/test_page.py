"""The page as a whole: it is one file, it is valid, it says what the findings say."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pretrain.comparison.findings import Findings, find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.report.page import page, reproduce_command, write_report
from pretrain.comparison.results import load_results
from pretrain.comparison.verdict import headline, overall, verdicts

VOID = {"meta", "input", "br", "img", "link", "hr"}


@pytest.fixture
def findings(make_findings: Callable[..., Findings]) -> Callable[..., Findings]:
    return partial(make_findings, seeds=(1,))


class Checker(HTMLParser):
    """Collects ids, in-page links and text; fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name == "href" and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name == "href" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_one_file_that_needs_nothing_else_and_holds_together(
    findings: Callable[..., Findings], tmp_path: Path
) -> None:
    f = findings(
        seeds=(1, 2),
        multiplier=lambda arm, m: 1.6 if (arm, m) == ("mot", "image") else 1.0,
        edit=lambda text: text.replace("Do modality-specific weights help", '<b>Do</b> \\"A & B\\" help'),
    )
    written = write_report(f, tmp_path / "report")
    html = written.read_text()
    assert not re.search(r"https?://|//cdn|<script|<link|@import|url\((?!#)", html)
    checker = Checker()
    checker.feed(html)
    assert checker.stack == []
    assert len(checker.ids) == len(set(checker.ids))
    assert {link.removeprefix("#") for link in checker.links} <= set(checker.ids)
    text = re.sub(r"\s+", " ", "".join(checker.text).replace("\u00a0", " "))
    assert headline(f, "mot") in text
    for v in verdicts(f, "mot"):
        assert v.difference in text and v.compute in text and v.crossing in text
    assert '<b>Do</b> "A & B" help' in text  # shown, not obeyed
    assert f.fingerprints.last[1] in text and "Same data, same order." in text
    assert reproduce_command(f.plan) in text
    signed = replace(f.plan, overrides=('data.heldout="https://host/a?sig=SECRET"',))
    assert reproduce_command(signed).endswith("""'data.heldout="https://host/a"'""")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html", "summary.json", "summary.png", "summary.pdf", "curves.csv", "final.csv",
        "step_matching.csv", "tensorboard",
    }  # fmt: skip


@pytest.mark.usefixtures("without_figures")
def test_data_that_differs_is_a_warning_at_the_top(findings: Callable[..., Findings]) -> None:
    html = page(findings(fingerprint_salt=lambda arm: arm))
    assert "Same data, same order." not in html
    before_cards = html[html.index("<body>") : html.index('class="cards"')]
    assert (
        "did not read the same data: seed 1: mot and dense had read different data by step 10" in before_cards
    )


def test_three_arms_are_each_compared_with_the_baseline(findings: Callable[..., Findings]) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    f = findings(edit=lambda text: text + third, until=lambda *_: 200)
    html = unescape(page(f)).replace("\u00a0", " ")
    assert html.count("<h1>") == 1 and overall(f) in html
    assert (
        html.count('<details class="arm"') == 2 and headline(f, "pair") in html and headline(f, "mot") in html
    )
    assert 'aria-label="final differences of all arms on speech"' in html
    assert "var(--arm2)" in html


def test_a_modality_that_is_held_out_but_not_trained_on_has_an_empty_training_panel(
    findings: Callable[..., Findings],
) -> None:
    f = findings(until=lambda *_: None)
    for run in f.results:
        for row in run.rows:
            row.pop("train/loss/speech", None)
    html = page(find(f.plan, f.results))
    assert html.count("not measured") == 1 and "train-loss-tokens-speech" in html


@pytest.mark.usefixtures("without_figures")
def test_lost_runs_and_named_contrasts_are_told(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    named = '[contrasts]\nsplit = ["mot", "pair"]\n'
    plan = synthetic_plan(edit=lambda text: text + third + named)
    write_runs(plan, noise=0.004, until=lambda *run: 300 if run == ("mot", 2) else None)
    results = load_results(plan)
    results[1].record["status"] = "failed"  # mot_seed1 finished; what its record says now is no matter
    results[4].record["status"] = "failed"
    results[4].record["attempts"][-1]["reason"] = "exit code 9"
    html = unescape(page(find(plan, results))).replace("\u00a0", " ")
    head = html[html.index("<body>") : html.index('class="cards"')]
    assert "8 of 9 runs finished, mot_seed2 failed" in head
    assert "mot_seed2 failed: exit code 9. It is left out of the means and counts against its arm" in head
    assert "split, text" in html and "mot \u2212 pair" in html


@pytest.mark.usefixtures("without_figures")
def test_without_conditional_losses_the_section_is_left_out(
    findings: Callable[..., Findings], synthetic_plan: Callable[..., ComparisonPlan]
) -> None:
    f = findings(until=lambda *_: 200)
    for run in f.plan.runs:
        path = run.config.run_dir / "metrics.jsonl"
        path.write_text(re.sub(r', "eval/(loss|gain)/[a-z]+_to_[a-z]+": [-.\de]+', "", path.read_text()))
    html = page(find(f.plan, load_results(f.plan)))
    assert 'id="conditional"' not in html and "Conditional losses" not in html
