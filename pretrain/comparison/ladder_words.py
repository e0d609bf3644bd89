"""The findings of a ladder in words. This module imports no torch."""

import math

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_laws import LawShare
from pretrain.comparison.ladder_shares import EqualLossShare, Turn
from pretrain.comparison.rate_grid import rates_sentence
from pretrain.comparison.verdict import MATCH_UNIT
from pretrain.quantities import join, percent, ratio, with_prefix

OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent",
    "open": "inconclusive",
    "not decided": "not decided",
}


def cell_outcome(ladder: LadderFindings, arm: str, modality: str) -> dict[str, int]:
    """By outcome, in the order of OUTCOMES, the number of cells that an arm has it in."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for cell in ladder.cells:
        contrast = ladder.contrast(cell, arm, modality)
        if contrast is None or contrast.final.interval is None or not contrast.same_data:
            counts["not decided"] += 1
        elif contrast.winner:
            counts["better" if contrast.winner == arm else "worse"] += 1
        elif contrast.final.outcome == "equivalent" and contrast.lost_more is None:
            counts["equivalent"] += 1
        else:
            counts["open"] += 1
    return counts


def runs_text(ladder: LadderFindings) -> str:
    """Say how many of the planned runs finished, and how many were lost."""
    kinds = [end.kind for end in ladder.ends.values()]
    text = f"{kinds.count('finished')} of {len(kinds)} runs finished"
    return text + "".join(f", {kinds.count(k)} {k}" for k in ("diverged", "failed") if kinds.count(k))


def headline(ladder: LadderFindings, arm: str) -> str:
    """One sentence that says in how many cells an arm is better or worse, by modality."""
    parts = []
    for modality in ladder.modalities:
        counts = cell_outcome(ladder, arm, modality)
        parts.append(f"on {modality} " + ", ".join(f"{OUTCOMES[k]} in {n}" for k, n in counts.items() if n))
    unit = MATCH_UNIT[ladder.plan.config.match]
    base = ladder.plan.config.baseline
    rates = rates_sentence(ladder.plan, (arm, base))
    text = f"At equal {unit}, {arm} against {base} in {len(ladder.cells)} cells: {'; '.join(parts)}."
    return f"{text} {rates}".rstrip()


def level_text(ladder: LadderFindings) -> str:
    """Say at what level the intervals hold, over which family."""
    config, number = ladder.plan.config, ladder.fit.num_verdicts
    if not number:
        return "Nothing is decided yet: no cell has finished in three seeds of every arm."
    nominal = " This level is nominal, because runs were added after others had finished." * bool(
        ladder.added
    )
    return (
        f"The intervals of all {number} verdicts (contrasts x modalities x cells) hold together with a "
        f"chance of {percent(config.confidence)}. They share one residual variance per modality, with "
        f"{ladder.fit.dof} degrees of freedom.{nominal}"
    )


def turn_sentence(ladder: LadderFindings, size: str, arm: str, modality: str) -> str:
    """A sentence on where the sign of arm minus baseline turns at a size."""
    found = ladder.turns[size, arm, modality]
    base = ladder.plan.config.baseline
    after, before = (arm, base) if found.arm_leads_after else (base, arm)
    if found.estimate is None:
        low, high = map(tokens_per_parameter_text, found.range)
        is_one = found.range[0] == found.range[1]
        where = f"the one budget ({low}" if is_one else f"all budgets ({low} to {high}"
        text = f"{size}, {modality}: {after} lower at {where} tokens per parameter)"
    else:
        text = (
            f"{size}, {modality}: {before} lower at first, {after} from about "
            f"{tokens_per_parameter_text(found.estimate)} tokens per parameter on"
        )
    return f"{text}; {decided_text(found, after, before)}."


def decided_text(found: Turn, after: str, before: str) -> str:
    """Say which cells decide for the leader at the largest budget, and the last that decides against it."""
    parts = []
    if found.last_against is not None:
        parts.append(f"{before} better at {tokens_per_parameter_text(found.last_against)}")
    if found.decided_for:
        parts.append(f"{after} better at {join([tokens_per_parameter_text(x) for x in found.decided_for])}")
    return f"decided: {join(parts)}" if parts else "no cell decides it"


def tokens_per_parameter_text(value: float) -> str:
    """Tokens per parameter with two digits."""
    return with_prefix(value, digits=2).strip() if value >= 1000 else f"{float(f'{value:.2g}'):g}"


def share_text(share: EqualLossShare | LawShare) -> str:
    """ "0.62 [0.55, 0.70]"; ends beyond the budgets that were run are marked."""

    def end(value: float) -> str:
        if value == 0:
            return "below all budgets"
        return "beyond all budgets" if math.isinf(value) else ratio(value)

    interval = share.interval
    return end(share.value) + (f" [{end(interval.low)}, {end(interval.high)}]" if interval else "")
