"""Which tokens run, and the shorter stream that they are."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from pretrain.models.attention_mask import BLOCK, QueryMask, mask_queries, visible
from pretrain.models.depth_config import DepthConfig
from pretrain.models.depth_selection import choose_tokens, runs, top_k
from pretrain.models.inputs import build_inputs
from tests.pretrain.models.random_batch import DENSE, MOT, random_batch, tiny_config


def depth(rule: str) -> DepthConfig:
    return DepthConfig.model_validate({"schedule": "constant", "mean_ratio": 0.5, "rule": rule})


def test_top_k_of_each_document() -> None:
    scores = np.array([1, 3, 2, 0, 5, 5, 5, 9, 9], np.float32)
    documents = np.array([0, 0, 0, 0, 1, 1, 1, -1, -1])
    assert top_k(scores, documents, 0.5).nonzero()[0].tolist() == [1, 2, 4]  # trunc(1.5) = 1, the earlier
    assert top_k(scores, documents, 1.0).sum() == 7
    assert top_k(scores, documents, 0.1).sum() == 0
    assert top_k(np.zeros(100, np.float32), np.zeros(100, int), 0.29).sum() == 29


def test_special_tokens_run_and_padding_does_not() -> None:
    scores = np.array([-9, 1, 2, 9], np.float32)
    documents, special = np.array([0, 0, 0, -1]), np.array([True, False, False, False])
    for rule in ("top_k", "threshold"):
        found = runs(depth(rule), scores, documents, special, 0.5, threshold=1.5, causal=False)
        assert found.tolist() == [True, False, True, False], rule


def test_the_rule_in_force() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    documents, special = np.zeros(4, int), np.zeros(4, bool)

    def count(rule: str, ratio: float, threshold: float | None, causal: bool) -> int:
        return int(
            runs(depth(rule), scores, documents, special, ratio, threshold=threshold, causal=causal).sum()
        )

    assert count("top_k", 0.5, 0.35, False) == 2
    assert count("top_k", 0.5, 0.35, True) == count("threshold", 0.5, 0.35, False) == 1
    assert count("threshold", 0.5, float(np.float32(0.4)), False) == 1  # at least the threshold
    assert count("threshold", 0.5, None, False) == count("threshold", 1.0, 0.35, False) == 4


@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_chosen_stream(towers: dict[str, str], share: float) -> None:
    config = tiny_config(towers, depth={"image": depth("top_k").model_dump()}, context_tokens=40)
    batch = random_batch(config, sequences=3, padding_tokens=5)
    inputs = build_inputs(batch, config)
    table, routing = inputs.table, inputs.routing
    assert table is not None
    keep = np.random.default_rng(0).random(120) < share
    selected = choose_tokens(keep, table, routing.counts, keys="selected", with_tokens=True)
    rows = selected.rows.numpy()
    assert rows.tolist() == np.flatnonzero(keep).tolist()
    tower = np.repeat(np.arange(len(routing.counts)), routing.counts)[rows]
    assert selected.routing.counts == tuple(np.bincount(tower, minlength=len(routing.counts)))
    # In sequence order they are what sequence order leaves over of the chosen.
    places = routing.to_sorted.numpy()[rows][selected.routing.to_sequence.numpy()]
    assert places.tolist() == sorted(places.tolist())
    assert torch.equal(selected.routing.to_sequence[selected.routing.to_sorted], torch.arange(rows.size))
    documents = inputs.mask.documents.flatten().numpy() + 1000 * np.repeat(np.arange(3), 40)
    padding = batch.document_ids.reshape(-1)[places] < 0
    alike = documents[places][:, None] == documents[places][None]
    seen = np.tril(alike) & ~padding[:, None]
    assert selected.visible_pairs == seen.sum()
    assert sum(selected.mask.segments) == rows.size  # type: ignore[union-attr]
    whole = choose_tokens(keep, table, routing.counts, keys="all")
    assert isinstance(whole.mask, QueryMask)
    assert whole.mask.offsets.tolist() == places.tolist()
    of_all = (documents[places][:, None] == documents[None]) & (places[:, None] >= np.arange(120))
    assert whole.visible_pairs == (of_all & ~padding[:, None]).sum()
    per_sequence = [tokens.per_sequence for tokens in selected.routing.tokens]
    assert sum(map(sum, per_sequence)) == (~padding).sum() and all(len(p) == 3 for p in per_sequence)


@pytest.mark.parametrize("queries", [1, 100, 300, 700])
def test_block_lists_of_queries_show_what_the_mask_shows(queries: int) -> None:
    rng = np.random.default_rng(queries)
    documents = np.repeat(np.arange(400), rng.integers(1, 200, 400))[: 6 * BLOCK + 30]
    places = np.sort(rng.permutation(documents.size)[:queries])
    mask = mask_queries(places, documents).with_blocks(torch.device("cpu"))
    block_mask = mask.block_mask
    assert block_mask is not None
    shape = (1, 1, queries, documents.size)
    theirs = create_block_mask(block_mask.mask_mod, *shape, device="cpu", BLOCK_SIZE=BLOCK)
    ours = block_mask.to_dense()
    assert torch.equal(ours, theirs.to_dense())
    dense = create_mask(block_mask.mask_mod, *shape, device="cpu")[0, 0]
    everywhere = create_mask(
        visible(torch.from_numpy(documents)[None]), 1, 1, *[documents.size] * 2, device="cpu"
    )
    assert torch.equal(dense, everywhere[0, 0][torch.from_numpy(places)])
