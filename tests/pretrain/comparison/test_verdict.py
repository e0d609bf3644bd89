"""Words may never say more than the seeds bear."""

import re
from collections.abc import Callable

from pretrain.comparison.caveats import caveats
from pretrain.comparison.findings import Findings, find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import RunResult, load_results
from pretrain.comparison.verdict import (
    headline,
    joint_text,
    named_effects,
    outcome_text,
    overall,
    runs_text,
    slope_text,
    verdicts,
)

MakePlan = Callable[..., ComparisonPlan]
Write = Callable[..., None]


def mixed(arm: str, modality: str) -> float:
    return {"text": 1.0, "image": 2.0, "speech": 0.6}[modality] if arm == "mot" else 1.0


def test_winner_and_loser_are_named_per_modality(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=mixed, noise=0.004)
    assert headline(f, "mot") == (
        "At equal tokens (614 k a run) mot is better than dense on image, worse than dense on speech; "
        "inconclusive on text (3 verdicts, jointly at 95 %)."
    )
    text, image, speech = verdicts(f, "mot")
    assert (text.winner, image.winner, speech.winner) == (None, "mot", "dense")
    assert text.outcome == "inconclusive"
    assert image.outcome == "mot better" and "95 % joint interval \u2212" in image.difference
    assert re.fullmatch(
        r"mot reached dense.s final loss after 50 % \(4\d % to 5\d %\) of the tokens that dense took.",
        image.compute,
    )
    assert speech.outcome == "mot worse"
    # 60 % is what 0.6 makes; the noise of the last evaluations moves it by a point
    assert re.search(
        r"mot never reached dense.s final loss; dense had mot.s after (59|60|61) % of the tokens",
        speech.compute,
    )
    assert image.crossing == "The curves do not cross: mot was lower all the way."


def test_no_difference_at_all_is_said(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(seeds=(10, 11, 12), noise=0.01, seed_noise=0.01)
    assert headline(f, "mot") == (
        "At equal tokens (614 k a run), mot against dense: inconclusive on text, image and speech "
        "(3 verdicts, jointly at 95 %)."
    )


def test_arms_within_the_margin_are_equivalent(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(noise=1e-4)
    assert headline(f, "mot") == (
        "At equal tokens (614 k a run) mot is equivalent to dense on text, image and speech "
        "(3 verdicts, jointly at 95 %)."
    )
    assert {v.outcome for v in verdicts(f, "mot")} == {"equivalent within 0.5 %"}
    assert {v.winner for v in verdicts(f, "mot")} == {None}


def test_a_difference_below_the_margin_is_said_to_be_small(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(noise=1e-4, shift=lambda arm, *_: -0.004 if arm == "mot" else 0.0)
    text, *_ = verdicts(f, "mot")
    assert (text.winner, text.outcome) == ("mot", "mot better, by less than 0.5 %")


def lose(results: tuple[RunResult, ...], name: str) -> None:
    """Have a run diverge."""
    for row in next(run for run in results if run.planned.name == name).rows[-8:]:
        row["train/loss"] += 2.0


def test_an_arm_that_lost_a_run_is_not_better(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1, 2, 3, 4, 5))
    write_runs(plan, multiplier=mixed, noise=0.004)
    results = load_results(plan)
    lose(results, "mot_seed4")
    f = find(plan, results)
    assert runs_text(f) == "9 of 10 runs finished, mot_seed4 diverged"
    _, image, speech = verdicts(f, "mot")
    assert (image.winner, speech.winner) == (None, "dense")
    assert image.outcome == ("mot lower in the runs that finished, but mot lost 1 of its 5 runs: not decided")
    assert headline(f, "mot") == (
        "At equal tokens (614 k a run) mot is worse than dense on speech; inconclusive on text and image; "
        "mot lost 1 of its 5 runs (3 verdicts, jointly at 95 %)."
    )
    # A baseline that lost as many evens it out.
    lose(results, "dense_seed1")
    assert verdicts(find(plan, results), "mot")[1].winner == "mot"


def test_a_seed_that_one_arm_lacks_stays_in_the_other(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1, 2, 3, 4))
    write_runs(plan, multiplier=mixed, noise=0.004, until=lambda *run: 300 if run == ("mot", 2) else None)
    f = find(plan, load_results(plan))
    assert runs_text(f) == "7 of 8 runs finished"
    assert [len(f.losses[arm, "image"].per_seed) for arm in ("dense", "mot")] == [4, 3]
    assert f.contrast("mot", "image").seeds == (1, 3, 4)
    assert f.contrast("mot", "image").winner == "mot"


THIRD = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'


def test_an_arm_whose_runs_all_diverged_takes_no_verdict_from_the_others(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    plan = synthetic_plan(edit=lambda text: text + THIRD)
    write_runs(plan, multiplier=mixed, noise=0.004)
    results = load_results(plan)
    for run in results:
        if run.arm == "pair":
            for row in run.rows[-8:]:
                row["train/loss"] += 2.0
                row |= {name: float("nan") for name in row if name.startswith("eval/loss")}
    f = find(plan, results)
    assert runs_text(f) == "6 of 9 runs finished, pair_seed1, pair_seed2 and pair_seed3 diverged"
    assert f.contrast("mot", "image").winner == "mot"
    assert headline(f, "pair").endswith(
        "nothing is decided between pair and dense: pair lost 3 of its 3 runs."
    )
    assert verdicts(f, "pair")[0].outcome == "not decided, for pair lost 3 of its 3 runs"


def test_an_arm_whose_runs_all_failed_is_told_in_words(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(edit=lambda text: text + THIRD)
    write_runs(plan, multiplier=mixed, noise=0.004, until=lambda arm, _: 300 if arm == "pair" else None)
    results = load_results(plan)
    for run in results:
        if run.arm == "pair":
            run.record["status"] = "failed"
            run.record["attempts"][-1]["reason"] = "step 301 is not finite"
    f = find(plan, results)
    assert f.plan.arms == ("dense", "mot") and not f.scope.interim
    assert runs_text(f) == "6 of 9 runs finished, pair_seed1, pair_seed2 and pair_seed3 failed"
    assert f.contrast("mot", "image").winner == "mot"
    assert caveats(f)[0].text.startswith("Every run of pair failed: ")


def test_named_contrasts_are_told(make_findings: Callable[..., Findings]) -> None:
    named = '[contrasts]\nsplit = ["mot", "pair"]\nbend = [["mot", "dense"], ["dense", "pair"]]\n'
    f = make_findings(
        edit=lambda text: 'primary = ["mot", "split", "bend"]\n' + text + THIRD + named,
        multiplier=mixed,
        noise=0.004,
    )
    outcomes = {name: [outcome_text(f, effect) for effect in effects] for name, effects in named_effects(f)}
    assert outcomes["split"][1:3] == ["mot better", "mot worse"]
    assert outcomes["split"][3].startswith("exploratory: ")
    assert outcomes["bend"][1:3] == ["below 0", "above 0"]
    assert headline(f, "pair").endswith("than dense's: an exploratory contrast, not a verdict.")
    assert joint_text(f) == "(9 verdicts, jointly at 95 %)"


def test_one_seed_gives_no_verdict_however_large_the_difference(
    make_findings: Callable[..., Findings],
) -> None:
    f = make_findings(seeds=(1,), multiplier=lambda arm, _: 3.0 if arm == "mot" else 1.0)
    assert headline(f, "mot").endswith(
        ", in the one seed that ran, mot's held-out loss is lower on text, image and speech than dense's: "
        "an observation, not a verdict."
    )
    for v in verdicts(f, "mot"):
        assert v.winner is None and "interval" not in v.difference
        assert v.outcome == "mot lower in the one seed that ran: an observation"


def test_crossings_are_told_with_tokens_and_leader(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(shift=lambda arm, m, frac: 0.5 - frac if arm == "mot" and m == "text" else 0.0)
    text, image, _ = verdicts(f, "mot")
    assert text.crossing == "The curves cross once: mot leads from 307 k tokens (50 %)."
    assert image.crossing == "The gap is within its wobble all the way."


def test_an_interim_report_says_so_first(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=mixed, until=lambda *_: 300)
    assert headline(f, "mot").startswith(
        "At equal tokens (307 k a run) of an unfinished comparison, so far, mot's held-out loss is lower on"
    )
    assert {v.winner for v in verdicts(f, "mot")} == {None}


def test_arms_that_never_have_the_same_loss_are_not_matched(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=lambda arm, _: 0.001 if arm == "mot" else 1.0)
    assert slope_text(f.contrast("mot", "text").matching["steps"]) == "none"
    assert "no point at which both had the same loss" in verdicts(f, "mot")[0].compute


def test_slope_text(make_findings: Callable[..., Findings]) -> None:
    exact = make_findings(multiplier=mixed).contrast("mot", "image").matching["steps"]
    assert slope_text(exact) == "0.50 [0.50, 0.50]"


def test_all_arms_in_one_sentence(make_findings: Callable[..., Findings]) -> None:
    speed = {("mot", "image"): 2.0, ("pair", "image"): 0.5, ("pair", "text"): 2.0}
    f = make_findings(
        edit=lambda text: text + THIRD, multiplier=lambda arm, m: speed.get((arm, m), 1.0), noise=1e-4
    )
    assert overall(f) == (
        "At equal tokens (614 k a run) against dense: on text better pair, equivalent mot; "
        "on image better mot, worse pair; on speech equivalent mot and pair (6 verdicts, jointly at 95 %)."
    )


def test_nothing_is_decided_on_different_data(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(
        edit=lambda text: text + THIRD,
        multiplier=lambda arm, _: 3.0 if arm == "mot" else 1.0,
        noise=1e-4,
        fingerprint_salt=lambda arm: "other" if arm == "mot" else "",
    )
    after = "At equal tokens (614 k a run) nothing is decided between"
    assert headline(f, "mot") == f"{after} mot and dense: they did not read the same data."
    assert overall(f) == f"{after} the arms: they did not read the same data."
    assert f.contrast("mot", "text").final.outcome == "lower" and f.contrast("mot", "text").winner is None
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
