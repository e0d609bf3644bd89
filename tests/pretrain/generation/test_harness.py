"""The adapter answers a stub of the harness's interface: requests with `args`, results as its classes say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import BOS, EOS, TEXT
from pretrain.generation.decoding import read_tokens
from pretrain.generation.grammar import Place
from pretrain.generation.harness import HarnessModel
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.trained_model import TrainedModel, open_model


class StubOfHarness:
    """What the harness's class sets up: it must be called beside HarnessModel."""

    def __init__(self) -> None:
        self.is_set_up = True


class Model(HarnessModel, StubOfHarness):
    """As docs/generate.md has a user write it."""


@pytest.fixture(scope="module")
def harness(speaker: Path) -> Model:
    return Model(speaker / "weights", speaker / "tokenizers")


@pytest.fixture(scope="module")
def trained(speaker: Path) -> TrainedModel:
    return open_model(speaker / "weights", speaker / "tokenizers")


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def logits_behind(model: TrainedModel, ids: list[int]) -> np.ndarray:
    """Of one pass over the ids; a row for the id that follows."""
    cache = KeyCache.empty(1)
    rows, _ = read_tokens(
        model.decoder, cache, [0], [Document(np.array(ids))], model.vocabulary, model.routing_state
    )
    return rows[0].double().numpy()


def nats_of(model: TrainedModel, prompt: list[int], continuation: list[int]) -> float:
    total, ids = 0.0, list(prompt)
    for token in continuation:
        logits = logits_behind(model, ids)
        total += logits[token] - np.logaddexp.reduce(logits)
        ids.append(token)
    return total


def text_ids(model: TrainedModel, text: str) -> list[int]:
    return model.tokenizers[TEXT].encode(text).tolist()


NEAR = 1e-5
"""Relative: 1e-7 measured in fp32, whose sums run in another order."""


def test_log_likelihoods_are_those_of_one_id_at_a_time(harness: Model, trained: TrainedModel) -> None:
    """Spaces that end a context belong to the continuation, and of a long context the end counts."""
    assert harness.is_set_up
    long = "blue green left of a red " * 8
    requests = [asked("A red", " blue"), asked("A red ", "blue"), asked("", "A red"), asked(long, "3")]
    found = harness.loglikelihood(requests)
    whole = text_ids(trained, "A red blue")
    first = len(text_ids(trained, "A red"))
    expected = nats_of(trained, [BOS, *whole[:first]], whole[first:])
    assert found[0] == found[1] and found[0][0] == pytest.approx(expected, rel=NEAR)
    assert found[2][0] == pytest.approx(nats_of(trained, [BOS], text_ids(trained, "A red")), rel=NEAR)
    kept, all_ids = text_ids(trained, long.rstrip()), text_ids(trained, f"{long}3")
    assert all_ids[: len(kept)] == kept and len(all_ids) > 40
    last = all_ids[len(kept) :]
    prompt = [BOS, *kept[len(kept) - (40 - len(last)) :]]
    assert found[3][0] == pytest.approx(nats_of(trained, prompt, last), rel=NEAR)


def test_a_continuation_of_the_likeliest_ids_is_greedy(harness: Model, trained: TrainedModel) -> None:
    """A piece of text stands in for one that the likeliest id makes, if that is one of text."""
    first = text_ids(trained, "A red")
    likeliest = int(logits_behind(trained, [BOS, *first]).argmax())
    for token in (likeliest, likeliest - 1):
        harness_pair = (np.array([BOS, *first]), np.array([token]))
        harness._pair = lambda *_, pair=harness_pair: pair  # type: ignore[method-assign]
        assert harness.loglikelihood([asked("A red", "x")])[0][1] == (token == likeliest)
    del harness._pair


def test_a_whole_text_is_judged_in_stretches(harness: Model, trained: TrainedModel) -> None:
    long = "A blue green left of a red " * 7
    short, both = harness.loglikelihood_rolling([asked("A red 3."), asked(long)])
    assert short == pytest.approx(nats_of(trained, [BOS], text_ids(trained, "A red 3.")), rel=NEAR)
    ids = [BOS, *text_ids(trained, long)]
    assert 41 < len(ids) <= 81
    expected = nats_of(trained, ids[:1], ids[1:41]) + nats_of(trained, ids[len(ids) - 41 : 41], ids[41:])
    assert both == pytest.approx(expected, rel=NEAR)


def test_text_is_written_until_a_stop(harness: Model, trained: TrainedModel) -> None:
    """Greedily, as without a cache; settings may differ between requests, whose order stays."""
    grammar, ids, place = trained.grammar(TEXT), [BOS], Place()
    ids += text_ids(trained, "A red")
    written: list[int] = []
    while not place.ended and len(written) < 9:
        logits = logits_behind(trained, ids + written)[: trained.vocabulary.size]
        written.append(int(np.where(grammar.allowed(place, 9 - len(written)), logits, -np.inf).argmax()))
        place = grammar.after(place, written[-1])
    whole = trained.tokenizers[TEXT].decode(np.array([i for i in written if i != EOS]))
    assert len(whole) > 4
    stop = whole[2:4]
    requests = [
        asked("A red", {"until": [stop], "max_gen_toks": 9}),
        asked("A red", {"until": [], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}),
        asked("A red", {"until": stop, "max_gen_toks": 9}),
    ]
    assert harness.generate_until(requests) == [whole[: whole.index(stop)], whole, whole[: whole.index(stop)]]
    drawn = asked("A red", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 9})
    assert harness.generate_until([drawn]) == harness.generate_until([drawn]) != [whole]


@pytest.mark.parametrize(
    ("verb", "args", "message"),
    [
        ("loglikelihood", ("A", ""), "the continuation of 'A' is empty"),
        ("loglikelihood", ("A", "red blue green " * 30), "is longer than the context of 40"),
        ("loglikelihood", ("A", "\ud800"), "not valid Unicode"),
        ("generate_until", ("A", {"until": ["x"], "num_beams": 4}), "unknown settings num_beams; legal: u"),
        ("generate_until", ("A", {"max_gen_toks": 41}), "max_gen_toks = 41: the context of 40 tokens"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_served_is_told(harness: Model, verb: str, args: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(harness, verb)([asked(*args)])
