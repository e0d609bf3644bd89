"""The attention kernels against one another: a call per document, flex attention, a materialised mask."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from parallel.routing import route
from pretrain.models.attention import _PIECE, Attention, attend, attend_queries
from pretrain.models.attention_mask import AttentionMask, last_keys, mask_documents, mask_queries, visible
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.query_key import rotary_table
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close
from tests.pretrain.models.random_batch import MOT, tiny_config

HEADS = {"every_head_its_key": (4, 4, 4), "grouped": (4, 2, 2), "one_key": (4, 1, 1)}
DOCUMENTS = {
    "ragged": np.array([[0] * 5 + [1] * 9 + [2] * 2, [0] * 12 + [-1] * 4]),
    "equal": np.array([[0] * 8 + [1] * 8, [0] * 8 + [1] * 8]),
    "one_per_sequence": np.zeros((2, 16), int),
}

SPANS = [(1, 5), (9, 11), (11, 14), (17, 24), (26, 28)]
"""Images that fit into each of these."""


def materialised(qkv: Tensor, mask: AttentionMask, heads: tuple[int, int, int]) -> Tensor:
    sequences, context = mask.documents.shape
    q, k, v = qkv.view(sequences, context, sum(heads), -1).transpose(1, 2).split(heads, dim=1)
    last = torch.from_numpy(last_keys(mask.spans, sequences * context)).view(sequences, context)
    last = (last - context * torch.arange(sequences)[:, None]).to(qkv.device)
    seen = create_mask(visible(mask.documents, last), sequences, 1, context, context, device=str(qkv.device))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2).reshape(sequences * context, -1)


def random_qkv(heads: tuple[int, int, int], tokens: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(tokens, sum(heads) * 8, generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype).requires_grad_()


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_a_call_per_document_equals_a_materialised_mask(
    heads: tuple[int, int, int], documents: np.ndarray, within: bool, dtype: torch.dtype
) -> None:
    mask = mask_documents(documents, within=within, spans=SPANS if within else ())
    qkv = random_qkv(heads, dtype=dtype)
    out, expected = attend(qkv, mask, heads), materialised(qkv, mask, heads)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (got,), (wanted,) = torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad)
    assert_close(out, expected, "attention")
    assert_close(got, wanted, "gradient")


def test_a_mask_that_is_one_token_off_is_seen() -> None:
    """What a document's boundary one token further on makes: far above the tolerances of these tests."""
    heads, qkv = (4, 2, 2), random_qkv((4, 2, 2))
    right, wrong = (attend(qkv, mask_documents(np.arange(16)[None].repeat(2, 0) // n, within=True), heads)
                    for n in (8, 9))  # fmt: skip
    assert (right - wrong).abs().max() > 100 * TOLERANCE[torch.float32] * right.abs().max()


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_flex_equals_a_call_per_document(
    heads: tuple[int, int, int], documents: np.ndarray, dtype: torch.dtype
) -> None:
    mask = mask_documents(documents, within=True, spans=SPANS)
    qkv = random_qkv(heads, dtype=dtype).detach()  # torch has no gradient of flex attention on CPU
    assert_close(attend(qkv, mask.with_blocks(), heads), attend(qkv, mask, heads), "attention")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has a gradient on CUDA only")
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_flex_gradient_equals_a_materialised_mask(heads: tuple[int, int, int]) -> None:
    device = torch.device("cuda")
    rows = np.repeat(np.arange(8), 64)
    documents, spans = np.stack([rows, np.where(rows > 5, -1, rows // 2)]), [(10, 50), (515, 620), (700, 740)]
    mask = mask_documents(documents, within=True, spans=spans).to(device)
    assert mask.block_mask is not None
    qkv = torch.randn(1024, sum(heads) * 32, device=device, requires_grad=True)
    out, expected = attend(qkv, mask, heads), materialised(qkv, mask, heads)
    grad = torch.randn_like(expected)
    (got,), (wanted,) = torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad)
    # fp32 products may go through TF32 (10 bits) on this device.
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_order_in_the_micro_batch_does_not_matter(dtype: torch.dtype) -> None:
    """Sorted by tower or not, the same tokens attend to the same: only the order of the result differs."""
    config = tiny_config(MOT, untied=["norm"])
    layer = Attention(config, "attention", InitialWeights.of(config, 1)).to(dtype)
    modality = np.array([1, 1, 0, 2, 0, 0, 2, 1], np.uint8)
    mask = mask_documents(np.array([[0] * 5 + [1] * 3]), within=True)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    x = torch.randn(8, config.d_model, dtype=dtype)

    def run(routing) -> Tensor:
        rotary = rotary_table(positions[routing.to_sorted], config.head_dim, config.rope_theta, dtype)
        return layer(x[routing.to_sorted], routing, mask, rotary)[routing.to_sequence]

    by_tower, unsorted = route(modality, (0, 1, 2), 3), route(modality, (0, 0, 0), 1)
    assert not by_tower.identity and unsorted.identity
    assert_close(run(by_tower), run(unsorted), "attention")


@pytest.mark.pairwise
@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("flex", [False, True], ids=["per_document", "flex"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_chosen_queries_get_what_all_get(
    dtype: torch.dtype, flex: bool, share: float, heads: tuple[int, int, int]
) -> None:
    """Rows of attention over all tokens, in documents of 1 to 150 tokens of 3 sequences."""
    rng = np.random.default_rng(1)
    documents = np.sort(rng.integers(0, 5, (3, 150)), axis=1)
    edges = np.flatnonzero(np.diff(documents.reshape(-1), prepend=-1, append=-1)).tolist()
    spans = [(first + 2, first + 9) for first, end in pairwise(edges) if first + 9 <= end]
    mask = mask_documents(documents, within=True, spans=spans)
    qkv = random_qkv(heads, 450, dtype).detach()  # torch has no gradient of flex attention on CPU
    places = np.flatnonzero(rng.random(450) < share)
    segments = np.repeat(np.arange(len(mask.segments)), mask.segments)
    queries = mask_queries(places, segments, last_keys(mask.spans, 450)[places])
    if flex:
        queries = queries.with_blocks(torch.device("cpu"))
    of_queries = qkv.shape[1] * heads[0] // sum(heads)
    q = qkv[torch.from_numpy(places), :of_queries]
    k, v = qkv[:, of_queries:].chunk(2, dim=1)
    found = attend_queries(q, k, v, queries, heads)
    wanted = attend(qkv, mask, heads)[torch.from_numpy(places)]
    assert found.shape == wanted.shape
    if len(places):
        assert_close(found, wanted, "attention")


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((4, 2, 2), torch.float64), ((2, 2, 2), torch.float64), ((4, 2, 2), torch.float32)],
    ids=str,
)
def test_gradients_of_queries_that_are_taken_in_pieces(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Documents of many queries are cut; two have none, one all, two end in tokens that are no query."""
    lengths = (30, 700, 50, 210, 400)
    segments = np.repeat(np.arange(5), lengths)
    runs = np.random.default_rng(0).random(segments.size) < 0.7
    runs[segments % 2 == 0], runs[segments == 3], runs[690:730] = False, True, False
    runs[segments == 4] = np.arange(400) % 3 < 2
    runs[-20:] = False
    places = np.flatnonzero(runs)
    queries = mask_queries(places, segments)
    assert max(n for n, _ in queries.lengths) > 2 * _PIECE and queries.lengths[2:4] == ((0, 50), (210, 210))
    qkv = random_qkv(heads, segments.size, dtype)
    q, k, v = qkv.split([count * 8 for count in heads], dim=1)
    found = attend_queries(q[torch.from_numpy(places)], k, v, queries, heads)
    mask = AttentionMask(torch.from_numpy(segments.astype(np.int32))[None], lengths)
    wanted = materialised(qkv, mask, heads)[torch.from_numpy(places)]
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_close(found, wanted, "attention")
    (ours,), (theirs,) = torch.autograd.grad(found, qkv, grad), torch.autograd.grad(wanted, qkv, grad)
    assert_close(ours, theirs, "gradient")
    assert not ours[:30].any() and not ours[730:780].any()
