"""Findings in words: the headline and a verdict per modality. This module imports no torch."""

from dataclasses import dataclass

import numpy as np

from pretrain.comparison.findings import Contrast, Findings, Matching
from pretrain.quantities import format_tokens, join, percent, ratio, signed


@dataclass(frozen=True)
class Verdict:
    """The verdict on one arm in one modality."""

    modality: str
    winner: str | None
    outcome: str
    """The result in a few words, such as "MoT better" or "no detectable difference"."""
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
    n, final = len(findings.seeds), contrast.final
    if not contrast.same_data:
        outcome = "not decided, because the arms are not proven to have read the same data"
        return Verdict(contrast.modality, None, outcome, "", "undecided", "", "")
    if n == 1:
        outcome = f"{contrast.leader} lower in the one seed that ran"
    elif contrast.winner is None:
        outcome = "no detectable difference"
    elif contrast.winner == contrast.arm:
        outcome = f"{contrast.arm} better"
    else:
        outcome = f"{contrast.arm} worse"
    difference = f"{signed(final.mean)} nats per token"
    if final.interval is not None:
        level = percent(findings.plan.config.confidence)
        difference += f", {level} interval {signed(final.interval.low)} to {signed(final.interval.high)}"
    return Verdict(
        modality=contrast.modality,
        winner=contrast.winner,
        outcome=outcome,
        difference=difference,
        relative=f"{signed(100 * final.relative, 1)} %",
        compute=_compute(contrast),
        crossing=_crossing(findings, contrast),
    )


def _compute(contrast: Contrast) -> str:
    """A sentence on the steps that the arm needed for the baseline's final loss."""
    arm, base = contrast.arm, contrast.baseline
    steps, seconds = contrast.matching["steps"], contrast.matching["seconds"]
    if steps.end is None:
        return "Step matching: no point at which both had the same loss."
    reached = sum(m.end_reached for m in steps.matches)
    if steps.end_reached:
        text = f"{arm} reached {base}'s final loss after {percent(steps.end.value)} of the steps"
        if seconds.end is not None:
            text += f" and {percent(seconds.end.value)} of the seconds"
        return f"{text} that {base} took."
    if reached:
        return f"{arm} reached {base}'s final loss in {reached} of {len(steps.matches)} seeds."
    share = percent(1 / steps.end.value)
    return f"{arm} never reached {base}'s final loss; {base} had {arm}'s after {share} of the steps."


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
    if not findings.fingerprints.proven:
        return _not_decided(findings, "the arms")
    if len(findings.seeds) == 1:
        return f"{_after(findings)} and in one seed: an observation of {len(plan.arms)} arms, not a verdict."
    parts = []
    for modality in findings.modalities:
        contrasts = [findings.contrast(arm, modality) for arm in plan.others]
        better = [c.arm for c in contrasts if c.winner == c.arm]
        worse = [c.arm for c in contrasts if c.winner == c.baseline]
        results = [f"better {join(better)}" if better else "", f"worse {join(worse)}" if worse else ""]
        text = ", ".join(filter(None, results)) or "no arm differs detectably"
        parts.append(f"on {modality} {text}")
    return f"{_after(findings)} against {plan.config.baseline}: {'; '.join(parts)}."


def _after(findings: Findings) -> str:
    """The beginning of a sentence, with the budget of the runs."""
    after = f"After {format_tokens(findings.tokens)}"
    if findings.plan.config.match == "train_flops":
        baseline = findings.plan.config.baseline
        after = f"For the training FLOPs of {baseline} over {format_tokens(findings.tokens)},"
    return after + (" of an unfinished comparison" if findings.scope.interim else "")


def _not_decided(findings: Findings, arms: str) -> str:
    """The sentence about a comparison whose arms read different data, or may have."""
    why = "did not read" if findings.fingerprints.broken else "are not proven to have read"
    return f"{_after(findings)} nothing is decided between {arms}: they {why} the same data."


def headline(findings: Findings, arm: str) -> str:
    """One sentence that says in which modalities an arm is better or worse than the baseline."""
    base, after = findings.plan.config.baseline, _after(findings)
    contrasts = [findings.contrast(arm, m) for m in findings.modalities]
    if not findings.fingerprints.proven:
        return _not_decided(findings, f"{arm} and {base}")
    if len(findings.seeds) == 1:
        lower = [c.modality for c in contrasts if c.leader == arm]
        higher = [c.modality for c in contrasts if c.leader != arm]
        parts = [f"lower on {join(lower)}" if lower else "", f"higher on {join(higher)}" if higher else ""]
        return (
            f"{after} and in one seed {arm}'s held-out loss is {' and '.join(p for p in parts if p)} than "
            f"{base}'s: an observation, not a verdict."
        )
    better = [c.modality for c in contrasts if c.winner == arm]
    worse = [c.modality for c in contrasts if c.winner == base]
    open_ = [c.modality for c in contrasts if c.winner is None]
    if not better and not worse:
        return f"{after} there is no detectable difference between {arm} and {base} on {join(open_)}."
    parts = [f"better on {join(better)}" if better else "", f"worse on {join(worse)}" if worse else ""]
    text = f"{after} {arm} is {' and '.join(p for p in parts if p)} than {base}"
    return text + (f"; no detectable difference on {join(open_)}." if open_ else ".")


def slope_text(matching: Matching) -> str:
    """s with its interval, such as "0.62 [0.55, 0.70]"; "none" if there is no s."""
    if matching.slope is None:
        return "none"
    value, interval = matching.slope.value, matching.slope.interval or matching.within_run
    return ratio(value) + (f" [{ratio(interval.low)}, {ratio(interval.high)}]" if interval else "")
