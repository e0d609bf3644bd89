"""What routers count: it starts again when it is taken, and a pass made twice counts once."""

import pytest
import torch
from torch import nn

from pretrain.models.routing_state import BINS, ScoreCounts, uncounted


def test_taking_starts_again() -> None:
    counts = ScoreCounts("place")
    counts.add(torch.zeros(3), 2.0, torch.tensor(0.5))
    counts.add(torch.zeros(2), 1.0)
    assert counts.take()[BINS:].tolist() == [3.0, 0.5, 0, 0, 0, 0, 0, 0]
    assert not counts.take().any()


def test_a_pass_that_is_made_again_counts_nothing() -> None:
    module = nn.Module()
    module.score_counts = (counts := ScoreCounts("place"),)  # type: ignore[assignment]
    with pytest.raises(ValueError), uncounted(module):
        counts.add(torch.zeros(3), 2.0)
        raise ValueError  # as recomputation does once it has what it needs
    counts.add(torch.zeros(2), 1.0)
    taken = counts.take()
    assert taken[:BINS].sum() == 2 and taken[BINS] == 1
