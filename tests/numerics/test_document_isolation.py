"""What a document's tokens compute depends on that document alone, on its past alone."""

import dataclasses

import numpy as np
import pytest
import torch

from data_pipeline.stream.batch import Batch
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from tests.pretrain.models.precision import PRECISIONS, assert_close
from tests.pretrain.models.random_batch import DENSE, MOT, random_batch, tiny_config


def logits_of(
    config: ModelConfig, batch: Batch, document_mask: bool = True, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[sequences, context, vocab]"""
    inputs = build_inputs(batch, config, document_mask=document_mask)
    with torch.no_grad():
        logits = Decoder(config).to(dtype)(inputs)
    return logits[inputs.routing.to_sequence].view(*batch.input_ids.shape, -1)


def with_other_ids(batch: Batch, where: np.ndarray) -> Batch:
    return dataclasses.replace(
        batch, input_ids=np.where(where, (batch.input_ids + 7) % 39 + 1, batch.input_ids)
    )


@pytest.mark.parametrize("towers", [DENSE, MOT])
def test_changing_a_document_changes_no_bit_of_another(towers: dict[str, str]) -> None:
    config = tiny_config(towers)
    batch = random_batch(config, sequences=2, seed=3)
    before = logits_of(config, batch)
    for row, document in {(r, int(d)) for r in range(2) for d in np.unique(batch.document_ids[r])}:
        where = np.zeros_like(batch.document_ids, bool)
        where[row] = batch.document_ids[row] == document
        changed = (logits_of(config, with_other_ids(batch, where)) != before).any(dim=-1).numpy()
        assert not changed[~where].any()
        assert changed[where].all()


def test_changing_a_token_changes_no_bit_of_the_past() -> None:
    config = tiny_config(MOT)
    batch = random_batch(config, sequences=1, seed=3, document_tokens=(12, 12), padding_tokens=0)
    before = logits_of(config, batch)
    for position in (0, 5, 11):
        where = np.zeros_like(batch.document_ids, bool)
        where[0, position] = True
        changed = (logits_of(config, with_other_ids(batch, where)) != before).any(dim=-1)[0].tolist()
        assert changed == [False] * position + [True] * (12 - position)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_changing_the_modality_of_one_document_leaves_the_others(dtype: torch.dtype) -> None:
    """Another routing sends the same rows through products of other sizes: equal to rounding."""
    config = tiny_config(MOT)
    batch = random_batch(config, sequences=2, seed=3)
    where = batch.document_ids == 0
    other = dataclasses.replace(
        batch, input_modality=np.where(where, 1, batch.input_modality).astype(np.uint8)
    )
    before, after = (logits_of(config, of, dtype=dtype) for of in (batch, other))
    same = torch.from_numpy(~where)
    assert_close(after[same], before[same], "logits")


def test_without_document_mask_attention_crosses_documents_but_not_sequences() -> None:
    config = tiny_config(MOT)
    batch = random_batch(config, sequences=2, seed=3)
    before = logits_of(config, batch, document_mask=False)
    where = np.zeros_like(batch.document_ids, bool)
    where[0] = batch.document_ids[0] == 0
    after = logits_of(config, with_other_ids(batch, where), document_mask=False)
    changed = (after != before).any(dim=-1)
    assert changed[0].all()
    assert not changed[1].any()
