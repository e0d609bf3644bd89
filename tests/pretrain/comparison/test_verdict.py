"""Words may never say more than the seeds bear."""

import re
from collections.abc import Callable

from pretrain.comparison.config import ComparisonPlan
from pretrain.comparison.findings import Findings, find
from pretrain.comparison.results import load_results
from pretrain.comparison.verdict import headline, overall, slope_text, verdicts

MakePlan = Callable[..., ComparisonPlan]
Write = Callable[..., None]


def mixed(arm: str, modality: str) -> float:
    return {"text": 1.0, "image": 2.0, "speech": 0.6}[modality] if arm == "mot" else 1.0


def test_winner_and_loser_are_named_per_modality(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=mixed, noise=0.004)
    assert headline(f, "mot") == (
        "After 614 k tokens mot is better on image and worse on speech than dense; no detectable difference "
        "on text."
    )
    text, image, speech = verdicts(f, "mot")
    assert (text.winner, image.winner, speech.winner) == (None, "mot", "dense")
    assert text.outcome == "no detectable difference"
    assert image.outcome == "mot better" and "95 % interval \u2212" in image.difference
    assert "mot reached dense's final loss after 50 % of the steps" in image.compute
    assert speech.outcome == "mot worse"
    # 60 % is what 0.6 makes; the noise of the last evaluations moves it by a point
    assert re.search(
        r"mot never reached dense.s final loss; dense had mot.s after (59|60|61) % of the steps",
        speech.compute,
    )
    assert image.crossing == "The curves do not cross: mot was lower all the way."


def test_no_difference_at_all_is_said(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(seeds=(10, 11, 12), noise=0.01, seed_noise=0.01)
    assert headline(f, "mot") == (
        "After 614 k tokens there is no detectable difference between mot and dense on text, image and "
        "speech."
    )


def test_one_seed_gives_no_verdict_however_large_the_difference(
    make_findings: Callable[..., Findings],
) -> None:
    f = make_findings(seeds=(1,), multiplier=lambda arm, _: 3.0 if arm == "mot" else 1.0)
    assert headline(f, "mot").endswith(
        "in one seed mot's held-out loss is lower on text, image and speech than dense's: "
        "an observation, not a verdict."
    )
    for v in verdicts(f, "mot"):
        assert v.winner is None and "interval" not in v.difference
        assert v.outcome == "mot lower in the one seed that ran"


def test_crossings_are_told_with_tokens_and_leader(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(shift=lambda arm, m, frac: 0.5 - frac if arm == "mot" and m == "text" else 0.0)
    text, image, _ = verdicts(f, "mot")
    assert text.crossing == "The curves cross once: mot leads from 307 k tokens (50 %)."
    assert image.crossing == "The gap is within its wobble all the way."


def test_an_interim_report_says_so_first(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=mixed, until=lambda *_: 300)
    assert headline(f, "mot").startswith("After 307 k tokens of an unfinished comparison mot is")


def test_arms_that_never_have_the_same_loss_are_not_matched(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=lambda arm, _: 0.001 if arm == "mot" else 1.0)
    assert slope_text(f.contrast("mot", "text").matching["steps"]) == "none"
    assert "no point at which both had the same loss" in verdicts(f, "mot")[0].compute


def test_slope_text(make_findings: Callable[..., Findings]) -> None:
    exact = make_findings(seeds=(1, 2), multiplier=mixed).contrast("mot", "image").matching["steps"]
    assert slope_text(exact) == "0.50 [0.50, 0.50]"


def test_all_arms_in_one_sentence(make_findings: Callable[..., Findings]) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    speed = {("mot", "image"): 2.0, ("pair", "image"): 0.5, ("pair", "text"): 2.0}
    f = make_findings(
        edit=lambda text: text + third, multiplier=lambda arm, m: speed.get((arm, m), 1.0), noise=1e-4
    )
    assert overall(f) == (
        "After 614 k tokens against dense: on text better pair; on image better mot, worse pair; "
        "on speech no arm differs detectably."
    )


def test_nothing_is_decided_on_different_data(make_findings: Callable[..., Findings]) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    f = make_findings(
        edit=lambda text: text + third,
        multiplier=lambda arm, _: 3.0 if arm == "mot" else 1.0,
        noise=1e-4,
        fingerprint_salt=lambda arm: "other" if arm == "mot" else "",
    )
    after = "After 614 k tokens nothing is decided between"
    assert headline(f, "mot") == f"{after} mot and dense: they did not read the same data."
    assert overall(f) == f"{after} the arms: they did not read the same data."
    assert f.contrast("mot", "text").final.detectable and f.contrast("mot", "text").winner is None
    for v in verdicts(f, "mot"):
        assert (v.winner, v.difference, v.compute) == (None, "", "")
        assert v.sentence.endswith(
            ": not decided, because the arms are not proven to have read the same data."
        )


def test_nothing_is_decided_where_the_same_data_is_not_proven(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan()
    write_runs(plan, multiplier=mixed, noise=0.004)
    results = load_results(plan)
    for row in results[0].rows:
        del row["data/fingerprint"]
    f = find(plan, results)
    assert headline(f, "mot").endswith("they are not proven to have read the same data.")
    assert {contrast.winner for contrast in f.contrasts} == {None}


def test_of_two_arms_one_sentence_is_the_headline(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(seeds=(1,))
    assert overall(f) == headline(f, "mot")
