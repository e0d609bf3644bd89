"""Findings in words: the headline and a verdict per modality. This module imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.compare_config import CompareConfig
from pretrain.comparison.contrasts import weights
from pretrain.comparison.costs import systems
from pretrain.comparison.curve_pairs import Matching
from pretrain.comparison.effects import Effect
from pretrain.comparison.findings import Contrast, Findings
from pretrain.comparison.foreign.question import Question
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.rate_grid import rates_sentence
from pretrain.comparison.statistics import RatioEstimate
from pretrain.comparison.step_timing import ratio_sentence
from pretrain.comparison.units import unit_of
from pretrain.quantities import duration, flops, format_tokens, join, percent, ratio, signed

MATCHED = {"tokens": "tokens", "train_flops": "flops", "seconds": "seconds"}
"""The axis of step matching along which arms were matched."""
MATCH_UNIT = {"tokens": "tokens", "train_flops": "training FLOPs", "seconds": "seconds of training"}


def matched_text(config: Question) -> str:
    """Say what is equal in all arms: "training FLOPs", and tokens too where sizes were solved."""
    solved = isinstance(config, CompareConfig) and config.solve is not None
    return MATCH_UNIT[config.match] + " and tokens" * solved


@dataclass(frozen=True)
class Verdict:
    """The verdict on one arm in one modality."""

    modality: str
    winner: str | None
    outcome: str
    """The result in a few words, such as "MoT better", "equivalent within 0.5 %" or "inconclusive"."""
    difference: str
    """The difference to the baseline in nats per token, with its interval; "" where nothing is decided."""
    relative: str
    """The difference in per cent of the baseline's loss."""
    compute: str
    crossing: str

    @property
    def sentence(self) -> str:
        """The verdict as a few sentences; one sentence without numbers where nothing is decided."""
        if not self.difference:
            return f"{self.modality}: {self.outcome}."
        result = f"{self.modality}: {self.outcome}, {self.relative} ({self.difference})."
        return f"{result} {self.compute} {self.crossing}"


def verdict(findings: Findings, contrast: Contrast) -> Verdict:
    """The verdict on a contrast; it claims a winner only beyond the noise of the seeds."""
    if not contrast.same_data:
        outcome = "not decided, because the arms are not proven to have read the same data"
        return Verdict(contrast.modality, None, outcome, "", "undecided", "", "")
    return Verdict(
        modality=contrast.modality,
        winner=contrast.winner,
        outcome=outcome_text(findings, contrast.final),
        difference=difference_text(findings, contrast.final),
        relative=f"{signed(100 * contrast.final.relative, 1)} %",
        compute=_compute(findings, contrast),
        crossing=_crossing(findings, contrast),
    )


def outcome_text(findings: Findings, effect: Effect) -> str:
    """The outcome of an effect in a few words. Between two arms it names the arm, else it tells the sign."""
    config = findings.plan.config
    first, second = config.differences[effect.contrast]
    arm, base = (first, second) if isinstance(first, str) and isinstance(second, str) else (None, None)
    lower = f"{arm if effect.estimate < 0 else base} lower" if arm else _sign(effect)
    if effect.outcome == "observation":
        if diverged := [
            name for name in weights(config.differences[effect.contrast]) if name in findings.scope.diverged
        ]:
            return f"not decided, for {lost_text(findings, diverged[0])}"
        return f"{lower} {_observed(findings)}: an observation"
    if not effect.primary:
        return f"exploratory: {lower if effect.outcome in ('lower', 'higher') else effect.outcome}"
    if effect.outcome == "inconclusive":
        return "inconclusive"
    lost = findings.lost_more(effect.contrast)
    leader = arm if effect.estimate < 0 else base
    if lost and (effect.outcome == "equivalent" or arm is None or lost == leader):
        result = "equivalent" if effect.outcome == "equivalent" else lower
        return f"{result} in the runs that finished, but {lost_text(findings, lost)}: not decided"
    if effect.outcome == "equivalent":
        return f"equivalent within {_share(config.margin)}"
    better = "better" if effect.outcome == "lower" else "worse"
    text = f"{arm} {better}" if arm else _sign(effect)
    return text + (f", by less than {_share(config.margin)}" if effect.within_margin else "")


def _sign(effect: Effect) -> str:
    return "below 0" if effect.estimate < 0 else "above 0"


def _observed(findings: Findings) -> str:
    """What an observation was seen in."""
    if findings.scope.interim:
        return "so far"
    n = min(len(findings.runs(arm)) for arm in findings.plan.arms)
    return "in the one seed that ran" if n == 1 else f"over {n} seeds"


def _share(value: float) -> str:
    """0.005 -> "0.5 %"."""
    return f"{100 * value:g} %"


def difference_text(findings: Findings, effect: Effect) -> str:
    """The difference in the unit of its modality, with its interval."""
    text = f"{signed(effect.estimate)} {unit_of(findings.plan, effect.modality)}"
    if effect.interval is None:
        return text
    kind = "joint " if effect.primary else ""
    level = percent(findings.plan.config.confidence)
    low, high = signed(effect.interval.low), signed(effect.interval.high)
    return f"{text}, {level} {kind}interval {low} to {high}"


def runs_text(findings: Findings) -> str:
    """How many of the planned runs finished, and what became of the others."""
    scope = findings.scope
    text = f"{scope.num_finished} of {len(scope.ends)} runs finished"
    kinds = [(kind, [n for n, e in scope.ends.items() if e.kind == kind]) for kind in ("diverged", "failed")]
    return text + "".join(f", {join(names)} {kind}" for kind, names in kinds if names)


def lost_text(findings: Findings, arm: str) -> str:
    """ "mot lost 1 of its 5 runs"."""
    ends = [findings.scope.ends[run.name] for run in findings.plan.runs if run.arm == arm]
    return f"{arm} lost {sum(end.lost for end in ends)} of its {len(ends)} runs"


def _compute(findings: Findings, contrast: Contrast) -> str:
    """A sentence on what the arm needed for the baseline's final loss, in the unit that was matched."""
    arm, base, match = contrast.arm, contrast.baseline, findings.plan.config.match
    matching, unit = contrast.matching[MATCHED[match]], MATCH_UNIT[match]
    if matching.end is None:
        return "Step matching: no point at which both had the same loss."
    reached = sum(m.end_reached for m in matching.matches)
    if matching.end_reached:
        after = f"{_percents(matching.end)} of the {unit} that {base} took"
        return f"{arm} reached {base}'s final loss after {after}."
    if reached:
        return f"{arm} reached {base}'s final loss in {reached} of {len(matching.matches)} seeds."
    share = percent(1 / matching.end.value)
    return f"{arm} never reached {base}'s final loss; {base} had {arm}'s after {share} of the {unit}."


def _percents(estimate: RatioEstimate) -> str:
    interval = estimate.interval
    text = percent(estimate.value)
    return text + (f" ({percent(interval.low)} to {percent(interval.high)})" if interval else "")


def _crossing(findings: Findings, contrast: Contrast) -> str:
    """A sentence on where the curves cross."""

    def at(tokens: float) -> str:
        return f"{format_tokens(tokens)} ({percent(tokens / findings.tokens)})"

    since = contrast.together_from
    meet = [f"from {at(since)} on the gap is within its wobble"] if since else []
    if contrast.crossings:
        leads = [
            f"{contrast.arm if c.other_leads else contrast.baseline} leads from {at(c.x)}"
            for c in contrast.crossings
        ]
        times = {1: "once", 2: "twice"}.get(len(leads), f"{len(leads)} times")
        return f"The curves cross {times}: {', '.join(leads + meet)}."
    clear = contrast.gap[np.abs(contrast.gap) > contrast.wobble]
    if not len(clear):
        return "The gap is within its wobble all the way."
    first = contrast.arm if clear[0] < 0 else contrast.baseline
    if meet:
        return f"The curves do not cross: {first} was lower at first; {meet[0]}."
    whole = (contrast.gap * clear[0] > 0).all()
    where = "all the way" if whole else "wherever the gap exceeded its wobble"
    return f"The curves do not cross: {first} was lower {where}."


def verdicts(findings: Findings, arm: str) -> tuple[Verdict, ...]:
    """The verdicts on an arm in all modalities, in their order."""
    return tuple(verdict(findings, findings.contrast(arm, m)) for m in findings.modalities)


def overall(findings: Findings) -> str:
    """One sentence that names, by modality, the arms that are better or worse than the baseline."""
    plan = findings.plan
    if len(plan.others) == 1:
        return headline(findings, plan.others[0])
    if not findings.fingerprints.accepted:
        return _not_decided(findings, "the arms")
    if all(effect.outcome == "observation" for effect in findings.effects.values()):
        seen = f"{_at(findings)}, {_observed(findings)}"
        return f"{seen}: an observation of {len(plan.arms)} arms, not a verdict."
    parts = []
    for modality, by_result in results_by_modality(findings).items():
        decided = {result: arms for result, arms in by_result.items() if result in DECIDED and arms}
        text = ", ".join(f"{result} {join(arms)}" for result, arms in decided.items())
        parts.append(f"on {modality} {text or 'no arm decided'}")
    at, rates = f"{_at(findings)} against {plan.config.baseline}", _rates(findings, plan.arms)
    return f"{at}: {'; '.join(parts)} {joint_text(findings)}.{rates}"


DECIDED = ("better", "worse", "equivalent")


def results_by_modality(findings: Findings) -> dict[str, dict[str, list[str]]]:
    """By modality, the arms that are better or worse than the baseline, equivalent to it, or not decided."""
    out: dict[str, dict[str, list[str]]] = {}
    for modality in findings.modalities:
        out[modality] = {result: [] for result in (*DECIDED, "not decided")}
        for arm in findings.plan.others:
            contrast = findings.contrast(arm, modality)
            result = "equivalent" if _equivalent(contrast) else "not decided"
            if contrast.winner is not None:
                result = "better" if contrast.winner == arm else "worse"
            out[modality][result].append(arm)
    return out


def budget_text(findings: Findings) -> str:
    """Say what is equal in all arms by the file, and what the runs had of it."""
    cost = systems(findings)
    text = {
        "tokens": lambda arm: format_tokens(cost[arm].tokens),
        "train_flops": lambda arm: flops(cost[arm].train_flops),
        "seconds": lambda arm: duration(_timed_s(findings, arm)),
    }[findings.plan.config.match]
    had = {arm: text(arm) for arm in findings.plan.arms}
    if len(set(had.values())) == 1:
        listed = f"{next(iter(had.values()))} a run"
    else:
        listed = ", ".join(f"{arm} {amount}" for arm, amount in had.items())
    return "; ".join([listed, *_ratio_sentences(findings)])


def _timed_s(findings: Findings, arm: str) -> float:
    """Seconds of a run of an arm by timing rounds."""
    run = findings.runs(arm)[0]
    step_s = run.planned.step_s if isinstance(run.planned, PlannedRun) else None
    return findings.scope.until(run) * (step_s or math.nan)


def _ratio_sentences(findings: Findings) -> list[str]:
    """By arm, how long its steps take against the baseline's, where seconds are matched."""
    plan = findings.plan
    if not isinstance(plan, ComparisonPlan) or plan.config.match != "seconds":
        return []
    size = plan.runs[0].size_arm[0]
    return [ratio_sentence(plan, arm, size) for arm in plan.others]


def _equivalent(contrast: Contrast) -> bool:
    """Whether a verdict calls the arms equivalent."""
    final = contrast.final
    return (
        final.outcome == "equivalent" and final.primary and contrast.lost_more is None and contrast.same_data
    )


def joint_text(findings: Findings) -> str:
    """ "(21 verdicts, jointly at 95 %)": with what chance all verdicts are right together."""
    config = findings.plan.config
    number = len(config.verdicts) * len(findings.modalities)
    level = f"{'a nominal ' * bool(findings.added)}{percent(config.confidence)}"
    return f"({number} verdict{'s' * (number > 1)}, {'jointly ' * (number > 1)}at {level})"


def _at(findings: Findings) -> str:
    """The beginning of a sentence, with what was matched and what of it the runs have had."""
    tokens = format_tokens(findings.tokens)
    at = f"At equal tokens ({tokens.removesuffix(' tokens')} a run)"
    if isinstance(findings.plan, ComparisonPlan) and findings.plan.config.solve is not None:
        at = f"At equal training FLOPs and tokens ({tokens.removesuffix(' tokens')} a run)"
    elif findings.plan.config.match != "tokens":
        unit = MATCH_UNIT[findings.plan.config.match]
        at = f"At equal {unit} ({findings.plan.config.baseline}: {tokens})"
    return at + (" of an unfinished comparison" if findings.scope.interim else "")


def _not_decided(findings: Findings, arms: str) -> str:
    """The sentence about a comparison whose arms read different data, or may have."""
    why = "did not read" if findings.fingerprints.broken else "are not proven to have read"
    return f"{_at(findings)} nothing is decided between {arms}: they {why} the same data."


def headline(findings: Findings, arm: str) -> str:
    """One sentence that says in which modalities an arm is better or worse than the baseline."""
    base, at = findings.plan.config.baseline, _at(findings)
    contrasts = [findings.contrast(arm, m) for m in findings.modalities]
    if not findings.fingerprints.accepted:
        return _not_decided(findings, f"{arm} and {base}")
    if diverged := [name for name in (arm, base) if name in findings.scope.diverged]:
        return f"{at} nothing is decided between {arm} and {base}: {lost_text(findings, diverged[0])}."
    if all(c.final.outcome == "observation" or not c.final.primary for c in contrasts):
        parts = [
            f"{word} on {join(names)}"
            for word, leads in (("lower", True), ("higher", False))
            if (names := [c.modality for c in contrasts if (c.leader == arm) is leads])
        ]
        seen = "an observation" if contrasts[0].final.outcome == "observation" else "an exploratory contrast"
        return (
            f"{at}, {_observed(findings)}, {arm}'s held-out loss is {' and '.join(parts)} than {base}'s: "
            f"{seen}, not a verdict."
        )
    results = {
        f"better than {base}": [c.modality for c in contrasts if c.winner == arm],
        f"worse than {base}": [c.modality for c in contrasts if c.winner == base],
        f"equivalent to {base}": [c.modality for c in contrasts if _equivalent(c)],
    }
    decided = [f"{result} on {join(names)}" for result, names in results.items() if names]
    open_ = [c.modality for c in contrasts if c.winner is None and not _equivalent(c)]
    text = f"{at} {arm} is {', '.join(decided)}" if decided else f"{at}, {arm} against {base}"
    if open_:
        text += f"{'; ' if decided else ': '}inconclusive on {join(open_)}"
    if (lost := findings.lost_more(arm)) is not None:
        text += f"; {lost_text(findings, lost)}"
    return f"{text} {joint_text(findings)}.{_rates(findings, (arm, base))}"


def _rates(findings: Findings, arms: Sequence[str]) -> str:
    """A sentence, behind a blank, on whether arms were judged at their best rates; "" without a grid."""
    plan = findings.plan
    sentence = rates_sentence(plan, arms) if isinstance(plan, ComparisonPlan) else ""
    return f" {sentence}" if sentence else ""


def named_effects(findings: Findings) -> tuple[tuple[str, tuple[Effect, ...]], ...]:
    """The contrasts that the file names, with their effects by modality and over ALL."""
    return tuple(
        (name, tuple(findings.effects[name, m] for m in findings.outcomes))
        for name in findings.plan.config.contrasts
    )


def slope_text(matching: Matching) -> str:
    """s with its interval over the seeds, such as "0.62 [0.55, 0.70]"; "none" if there is no s."""
    return "none" if matching.slope is None else ratio_text(matching.slope)


def ratio_text(estimate: RatioEstimate) -> str:
    """A ratio with its interval over the seeds, if there is one."""
    interval = estimate.interval
    return ratio(estimate.value) + (f" [{ratio(interval.low)}, {ratio(interval.high)}]" if interval else "")
