"""What is said of a ladder."""

import math
from collections.abc import Callable

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_shares import EqualLossShare
from pretrain.comparison.ladder_words import (
    cell_outcome,
    headline,
    level_text,
    runs_text,
    share_text,
    turn_sentence,
)
from pretrain.comparison.statistics import Interval


def test_cells_are_counted_by_outcome_and_the_turn_is_told(turning_ladder: LadderFindings) -> None:
    ladder = turning_ladder
    counts = cell_outcome(ladder, "mot", "text")
    assert counts["better"] == 1 and counts["worse"] == 2 and sum(counts.values()) == 5
    text = headline(ladder, "mot")
    assert text.startswith("At equal tokens, mot against dense in 5 cells: on text better in 1, worse in 2, ")
    sentence = turn_sentence(ladder, "d32", "mot", "text")
    assert sentence == (
        "d32, text: dense lower at first, mot from about 4 tokens per parameter on; decided: dense better at "
        "2 and mot better at 8."
    )
    assert "all 15 verdicts" in level_text(ladder) and "10 degrees of freedom" in level_text(ladder)
    assert runs_text(ladder) == "30 of 30 runs finished"


def test_what_is_not_decided_is_counted_as_such(make_ladder: Callable[..., LadderFindings]) -> None:
    ladder = make_ladder(until=lambda arm, seed: 40)
    assert cell_outcome(ladder, "mot", "image")["not decided"] == 5
    assert level_text(ladder).startswith("Nothing is decided yet") and not ladder.turns
    assert runs_text(ladder) == "0 of 30 runs finished"


def test_ends_beyond_the_budgets_are_words() -> None:
    share = EqualLossShare(0.5, Interval(0.0, math.inf), True)
    assert share_text(share) == "0.50 [below all budgets, beyond all budgets]"
    assert share_text(EqualLossShare(1.25, Interval(1.1, 1.4), False)) == "1.25 [1.10, 1.40]"
