"""Facts within a second: judges of few scenes, and short samples."""

import pytest

from data_pipeline.demo import picture_judge
from pretrain.generation import facts


def judge_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let judges be trained on, and measured with, few scenes, and let samples have few ids."""
    monkeypatch.setattr(picture_judge, "TRAINING_SCENES", 40)
    monkeypatch.setattr(picture_judge, "HELDOUT_SCENES", 5)
    short = {direction: most and 8 for direction, most in facts.MOST_TOKENS.items()}
    monkeypatch.setattr(facts, "MOST_TOKENS", short)
