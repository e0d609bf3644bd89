from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from pretrain.models.attention_mask import BLOCK, AttentionMask, last_keys, mask_documents, visible


def random_documents(context: int, sequences: int, longest: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(sequences):
        lengths = rng.integers(1, longest + 1, size=context)
        row = np.repeat(np.arange(context), lengths)[:context].astype(np.int32)
        filled = context - rng.integers(0, context // 4)
        row[filled:] = -1
        rows.append(row)
    return np.stack(rows)


def test_segments_are_runs_of_documents_and_of_padding() -> None:
    mask = mask_documents(np.array([[0, 0, 1, -1, -1], [0, 1, 1, 1, 2]]), within=True)
    assert mask.segments == (2, 1, 2, 1, 3, 1)
    assert mask_documents(np.array([[0, 0, 1, -1, -1], [0, 1, 1, 1, 2]]), within=False).segments == (5, 5)


def test_a_query_sees_its_document_up_to_itself() -> None:
    mask = mask_documents(np.array([[0, 0, 1, 1, -1]]), within=True)
    seen = create_mask(visible(mask.documents), 1, 1, 5, 5, device="cpu")[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_the_vectors_of_an_image_see_each_other() -> None:
    """An image of three and one of two in the first document, one of one vector in the second."""
    mask = mask_documents(np.array([[0] * 8 + [1] * 2]), within=True, spans=[(1, 4), (5, 7), (9, 10)])
    assert mask.spans == ((0, 1, 4), (0, 5, 7))
    last = torch.from_numpy(last_keys(mask.spans, 10))[None]
    seen = create_mask(visible(mask.documents, last), 1, 1, 10, 10, device="cpu")[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7], [8], [8, 9],
    ]  # fmt: skip


def random_spans(documents: np.ndarray, vectors: int) -> list[tuple[int, int]]:
    """An image of `vectors` vectors in every document that has room for one."""
    edges = np.flatnonzero(np.diff(documents.reshape(-1), prepend=-2, append=-2))
    return [(a + 1, a + 1 + vectors) for a, b in pairwise(edges.tolist()) if b - a > vectors]


@pytest.mark.parametrize("context", [BLOCK, 2 * BLOCK + 72, 4 * BLOCK])
@pytest.mark.parametrize(("longest", "vectors"), [(20, 0), (300, 0), (2000, 0), (300, 50), (2000, 300)])
def test_block_lists_equal_those_of_the_whole_matrix(context: int, longest: int, vectors: int) -> None:
    documents = random_documents(context, sequences=3, longest=longest, seed=longest)
    spans = random_spans(documents, vectors) if vectors else []
    mask = mask_documents(documents, within=True, spans=spans)
    ours = mask.with_blocks().block_mask
    assert ours is not None
    last = last_keys(mask.spans, documents.size).reshape(3, -1) - context * np.arange(3)[:, None]
    seen = visible(mask.documents, torch.from_numpy(last) if vectors else None)
    torchs = create_block_mask(seen, 3, 1, context, context, device="cpu", BLOCK_SIZE=BLOCK)
    assert ours.seq_lengths == (context, context)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(torchs, f"{name}_num_blocks"), getattr(torchs, f"{name}_indices")
        listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)  # what lies behind is never read
        assert torch.equal(getattr(ours, f"{name}_indices")[listed], indices[listed]), name


def test_cpu_keeps_the_form_of_its_kernel() -> None:
    mask = mask_documents(np.zeros((1, 4), np.int32), within=True)
    moved = mask.to(torch.device("cpu"))
    assert isinstance(moved, AttentionMask) and moved.block_mask is None
