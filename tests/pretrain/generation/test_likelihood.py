from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import BOS
from pretrain.generation import likelihood
from pretrain.generation.likelihood import continuations
from pretrain.generation.trained_model import open_model


def test_continuations_do_not_depend_on_the_passes_they_share(
    speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one pass, or in passes of a few tokens; of a text of two ids the likelihoods of all ids add up
    to 1."""
    model = open_model(speaker / "routed", speaker / "tokenizers")
    rng = np.random.default_rng(0)
    pairs = [
        (Document(np.append(BOS, rng.integers(7, 300, prompt))), rng.integers(7, 300, length))
        for prompt, length in ((0, 1), (5, 3), (20, 9), (2, 30))
    ]
    together = list(continuations(model, pairs))
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 12)
    apart = list(continuations(model, pairs))
    assert [found.is_greedy for found in apart] == [found.is_greedy for found in together]
    # 2e-7 measured in fp32, whose sums run in another order.
    nats = [found.log_likelihood for found in apart]
    assert nats == pytest.approx([found.log_likelihood for found in together], rel=1e-5)
    ids = range(model.decoder.config.vocab_tokens)
    every = continuations(model, [(Document(np.array([BOS])), np.array([token])) for token in ids])
    found = np.array([tuple(one) for one in every])
    assert np.exp(found[:, 0]).sum() == pytest.approx(1, abs=1e-6)
    assert found[:, 1].sum() == 1 and found[:, 1].argmax() == found[:, 0].argmax()
