"""Sums of losses per document with a real decoder: neither packing nor ranks change one."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import validate
from data_pipeline.shards.index import TokenSource
from pretrain.config import RunConfig
from pretrain.evaluation.document_sums import (
    HeldoutDocuments,
    build_documents,
    document_sums,
    losses_of,
    to_json,
)
from pretrain.evaluation.documents import first_texts
from pretrain.models.decoder import Decoder
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from tests.pretrain.evaluation.test_losses import Forward, Replay, nats
from tests.pretrain.tiny_data import CONTEXT_TOKENS, VOCABULARY
from tests.pretrain.tiny_vectors import vectors_run, write_tiny_vectors

COUNT = 40


def built(config: RunConfig, source: TokenSource, rank: int = 0, size: int = 1) -> HeldoutDocuments:
    settings = config.evaluate.model_copy(update={"last_documents": COUNT})
    asked = config.model_copy(update={"evaluate": settings})
    documents = build_documents(asked, source, dp_rank=rank, dp_size=size)
    assert documents is not None
    return documents


def test_every_document_has_the_sums_that_it_has_alone(
    config: RunConfig, heldout: TokenSource, module: Pretraining
) -> None:
    documents = built(config, heldout)
    sums = document_sums(Forward(module), documents, RoutingState())  # type: ignore[arg-type]
    assert len(documents.names) == COUNT and sums.nats.shape == (3, COUNT)
    texts = first_texts(heldout, num_documents=COUNT, context_tokens=CONTEXT_TOKENS)
    for number, name in enumerate(documents.names):
        own = [text for text in texts if text.name == name]
        losses = np.concatenate([nats(module, text.ids) for text in own])
        modality = np.concatenate([VOCABULARY.modality_of(text.ids[1:]) for text in own])
        for index in range(len(VOCABULARY.modalities)):
            assert sums.targets[index, number] == (modality == index).sum()
            # Packed, tokens share matrix products of another shape: fp32 rounding, measured 9e-8.
            assert sums.nats[index, number] == pytest.approx(losses[modality == index].sum(), rel=2e-6)


@pytest.mark.parametrize("dp_size", [2, 3])
def test_ranks_change_nothing(
    config: RunConfig, heldout: TokenSource, module: Pretraining, dp_size: int
) -> None:
    alone = document_sums(Forward(module), built(config, heldout), RoutingState())  # type: ignore[arg-type]
    shares = [built(config, heldout, rank, dp_size) for rank in range(dp_size)]
    assert len({len(share.batches) for share in shares}) == 1
    ranks = [Forward(module) for _ in shares]
    for rank, share in zip(ranks, shares, strict=True):
        for batch in share.batches:
            rank.eval_step([batch.inputs])
    together = document_sums(Replay(ranks), shares[0], RoutingState())  # type: ignore[arg-type]
    assert np.array_equal(together.targets, alone.targets)
    assert together.nats == pytest.approx(alone.nats, rel=2e-6)  # 1.4e-7 measured


def test_the_file_and_the_row_hold_the_same_sums(
    config: RunConfig, heldout: TokenSource, module: Pretraining
) -> None:
    documents = built(config, heldout)
    sums = document_sums(Forward(module), documents, RoutingState())  # type: ignore[arg-type]
    content = to_json(documents, {"eval": sums}, step=9, fingerprint="ab")
    assert content["step"] == 9 and content["documents"] == list(documents.names)
    row = losses_of(sums, VOCABULARY.modalities, "eval")
    for index, modality in enumerate(VOCABULARY.modalities):
        nats_of, targets = content["nats"]["eval"][modality], content["targets"][modality]  # type: ignore[index]
        assert nats_of == sums.nats[index].tolist()
        assert row[f"eval/documents/loss/{modality}"] == pytest.approx(sum(nats_of) / sum(targets), abs=1e-12)
    assert row["eval/documents/loss"] == pytest.approx(sums.nats.sum() / sums.targets.sum(), abs=1e-12)


def test_none_are_kept_unless_they_are_asked_for(config: RunConfig, heldout: TokenSource) -> None:
    assert build_documents(config, heldout, dp_rank=0, dp_size=1) is None


def test_micro_batches_without_an_image_change_no_sum_of_images(tmp_path: Path) -> None:
    write_tiny_vectors(tmp_path)
    source = TokenSource.open(tmp_path / "heldout")
    config = validate(RunConfig, vectors_run(tmp_path, tmp_path / "runs"), source="test")
    module, found = Pretraining(Decoder(config.model, seed=1)), []
    for size in (1, 8):
        parallel = config.parallel.model_copy(update={"micro_batch_sequences": size})
        documents = built(config.model_copy(update={"parallel": parallel}), source)
        images = [len(batch.inputs.vectors["image"].sizes) for batch in documents.batches]
        assert (0 in images) == (size == 1)
        found.append(document_sums(Forward(module), documents, RoutingState()))  # type: ignore[arg-type]
    opening, _ = source.vocabulary.delimiters("image")
    texts = first_texts(source, num_documents=COUNT, context_tokens=config.model.context_tokens)
    assert found[0].targets[1].tolist() == [(text.ids == opening).sum() for text in texts]
    assert np.array_equal(found[0].targets, found[1].targets)
    assert found[0].nats == pytest.approx(found[1].nats, rel=2e-6)
