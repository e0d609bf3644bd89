"""Evaluation with a real decoder: packing, sharing out over ranks and averaging change no number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vocabulary import BOI, BOS, EOI, EOS, VectorFormat, Vocabulary
from data_pipeline.stream.batch import make_batch
from pretrain.config import RunConfig
from pretrain.evaluation.documents import Text, heldout_texts, pairs
from pretrain.evaluation.losses import (
    Heldout,
    batch_of,
    build_heldout,
    conditional_losses,
    heldout_losses,
    micro_batches,
)
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.router_report import RouterReport
from tests.pretrain.tiny_data import CONTEXT_TOKENS, VOCABULARY

DIRECTIONS = {(a, b) for a in VOCABULARY.modalities for b in VOCABULARY.modalities if a != b}


class Forward:
    """The part of an engine that an evaluation needs, on one rank: the module's stats."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.sums: list[list[float]] = []

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[ModelInputs]) -> tuple[list[float], RouterReport]:
        stats = [self.module(batch)[1].double() for batch in micro_batches]
        self.sums.append(torch.stack(stats).sum(0).tolist())
        return self.sums[-1], RouterReport()


class Replay:
    """Answers with what several ranks summed, call by call."""

    def __init__(self, ranks: list[Forward]) -> None:
        self.answers = iter(
            [np.sum(calls, axis=0).tolist() for calls in zip(*(r.sums for r in ranks), strict=True)]
        )

    def eval_step(self, _: Any) -> tuple[list[float], RouterReport]:
        return next(self.answers), RouterReport()


def row(engine: Any, heldout: Heldout) -> dict[str, float]:
    return heldout_losses(engine, heldout) | conditional_losses(engine, heldout)


@torch.no_grad()
def nats(module: Pretraining, ids: np.ndarray) -> np.ndarray:
    """Loss of each target of one document that is alone in its sequence, the slow way."""
    batch = make_batch([[ids]], sequence_tokens=len(ids) - 1, vocabulary=VOCABULARY)
    inputs = build_inputs(batch, module.decoder.config)
    log_p = module.decoder(inputs).double().log_softmax(-1)
    losses = -log_p.gather(1, inputs.target_ids[:, None])[:, 0]
    return losses[inputs.routing.to_sequence].numpy()


def test_packed_evaluation_is_that_of_documents_on_their_own(
    config: RunConfig, heldout: TokenSource, module: Pretraining
):
    got = row(Forward(module), build_heldout(config, heldout, dp_rank=0, dp_size=1))
    assert set(got) == {"eval/loss", *(f"eval/loss/{m}" for m in VOCABULARY.modalities)} | {
        f"eval/{kind}/{a}_to_{b}" for a, b in DIRECTIONS for kind in ("loss", "gain")
    }
    texts = heldout_texts(heldout, num_sequences=6, context_tokens=CONTEXT_TOKENS)
    losses = np.concatenate([nats(module, text.ids) for text in texts])
    modality = np.concatenate([VOCABULARY.modality_of(text.ids[1:]) for text in texts])
    # Packed, tokens share matrix products of another shape: fp32 rounding, measured 6e-8 relative and,
    # for a difference of two losses of about 5 nats, 8e-7.
    assert got["eval/loss"] == pytest.approx(losses.mean(), rel=2e-6)
    for index, name in enumerate(VOCABULARY.modalities):
        assert got[f"eval/loss/{name}"] == pytest.approx(losses[modality == index].mean(), rel=2e-6)

    count = config.evaluate.conditional_documents
    for (a, b), listed in pairs(heldout, num_documents=count, context_tokens=CONTEXT_TOKENS).items():
        own, foreign = [], []
        for pair in listed:
            for condition, losses in ((pair.condition.ids, own), (pair.foreign.ids, foreign)):
                ids = np.concatenate([[1], condition, pair.target.ids, [2]])
                mine = VOCABULARY.modality_of(ids[1:]) == VOCABULARY.modalities.index(b)
                in_target = np.arange(1, len(ids)) > len(condition)
                losses.append(nats(module, ids)[mine & in_target & (ids[1:] != 2)])
        own_mean, foreign_mean = np.concatenate(own).mean(), np.concatenate(foreign).mean()
        assert got[f"eval/loss/{a}_to_{b}"] == pytest.approx(own_mean, rel=2e-6)
        assert got[f"eval/gain/{a}_to_{b}"] == pytest.approx(foreign_mean - own_mean, abs=1e-5)
        assert abs(foreign_mean - own_mean) > 1e-3


@pytest.mark.parametrize("dp_size", [2, 3, 5])
def test_the_number_of_ranks_changes_nothing(
    config: RunConfig, heldout: TokenSource, module: Pretraining, dp_size: int
):
    alone = row(Forward(module), build_heldout(config, heldout, dp_rank=0, dp_size=1))
    shares = [build_heldout(config, heldout, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert len({len(share.documents) for share in shares}) == 1
    for direction in DIRECTIONS:
        assert len({len(share.own[direction]) for share in shares}) == 1
    ranks = [Forward(module) for _ in shares]
    for rank, share in zip(ranks, shares, strict=True):
        # A rank alone may have no target of a modality; only the sums over ranks are divided.
        for inputs in (share.documents, *(x for d in share.own for x in (share.own[d], share.foreign[d]))):
            rank.eval_step(inputs)
    together = row(Replay(ranks), shares[0])
    # Other neighbours in the matrix products: fp32 rounding, measured 6e-7.
    assert together == pytest.approx(alone, rel=2e-6, abs=2e-6)


def test_the_set_depends_on_no_seed_and_no_arm(config: RunConfig, heldout: TokenSource):
    def samples(changed: RunConfig) -> list[Any]:
        built = build_heldout(changed, heldout, dp_rank=0, dp_size=1)
        groups = (built.documents, *built.own.values(), *built.foreign.values())
        return [(each.samples, sorted(each.target_ids.tolist())) for group in groups for each in group]

    dense = config.model.model_copy(update={"towers": dict.fromkeys(VOCABULARY.modalities, "all")})
    assert samples(config) == samples(config.model_copy(update={"seed": 99, "model": dense}))


def test_micro_batches_hold_the_vectors_of_their_texts(config: RunConfig):
    of = VectorFormat(features=2, dtype="uint8")
    vocabulary = Vocabulary(sizes={"text": 24, "image": 1}, vectors={"image": of})
    ids = np.array([BOS, BOI, 24, 24, EOI, EOS])
    texts = [
        Text(ids, np.ones(5, np.float32), str(i), {"image": np.full((2, 2), i, np.uint8)}) for i in range(5)
    ]
    sequences = [texts[:2], texts[2:3], texts[3:]]
    shares = [micro_batches(sequences, config, dp_rank=rank, dp_size=2) for rank in range(2)]
    batches = [[batch_of(each, vocabulary, config) for each in share] for share in shares]
    found = [[each.vectors["image"].values[:, 0].tolist() for each in of_rank] for of_rank in batches]
    assert found == [[[0, 0, 1, 1, 3, 3, 4, 4]], [[2, 2]]]
    assert batches[1][0].vectors["image"].first.tolist() == [0, 2, 2]


def test_without_held_out_data_or_conditions_there_are_no_numbers(config: RunConfig, heldout: TokenSource):
    nothing = Heldout(VOCABULARY.modalities, (), {}, {})
    assert row(Forward(torch.nn.Identity()), nothing) == {}
    settings = config.evaluate.model_copy(update={"conditional_documents": 0})
    built = build_heldout(config.model_copy(update={"evaluate": settings}), heldout, dp_rank=0, dp_size=1)
    assert built.own == {} and built.documents


def test_documents_that_see_each_other_in_training_do_in_the_held_out_loss_too(
    config: RunConfig, heldout: TokenSource, module: Pretraining
):
    data = config.data.model_copy(update={"document_mask": False})
    crossing = build_heldout(config.model_copy(update={"data": data}), heldout, dp_rank=0, dp_size=1)
    within = build_heldout(config, heldout, dp_rank=0, dp_size=1)
    a, b = (row(Forward(module), each) for each in (crossing, within))
    assert a["eval/loss"] != pytest.approx(b["eval/loss"], rel=1e-4)
    assert {n: v for n, v in a.items() if "_to_" in n} == {n: v for n, v in b.items() if "_to_" in n}
