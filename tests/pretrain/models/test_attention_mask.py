import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from pretrain.models.attention_mask import BLOCK, AttentionMask, mask_documents, visible


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


@pytest.mark.parametrize("context", [BLOCK, 2 * BLOCK + 72, 4 * BLOCK])
@pytest.mark.parametrize("longest", [20, 300, 2000])
def test_block_lists_equal_those_of_the_whole_matrix(context: int, longest: int) -> None:
    documents = random_documents(context, sequences=3, longest=longest, seed=longest)
    mask = mask_documents(documents, within=True)
    ours = mask.with_blocks().block_mask
    assert ours is not None
    torchs = create_block_mask(
        visible(mask.documents), 3, 1, context, context, device="cpu", BLOCK_SIZE=BLOCK
    )
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
