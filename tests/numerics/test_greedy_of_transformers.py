"""Imported Llama and Qwen3 models generate greedily what transformers does, 64 tokens, token for token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import Vocabulary
from pretrain.generation.decoding import read_tokens
from pretrain.generation.key_cache import KeyCache
from pretrain.models.routing_state import RoutingState
from pretrain.weights.hugging_face import open_hugging_face
from tests.numerics.test_imported_logits import decoder_of
from tests.pretrain.tiny_hugging_face import tiny_hugging_face

PROMPTS = ([5, 9, 30], [7, 8, 8, 21, 39, 1, 14])
TOKENS = 64


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    reference = tiny_hugging_face(kind, tmp_path / "hf", max_position_embeddings=96)
    expected = [
        reference.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    decoder = decoder_of(open_hugging_face(tmp_path / "hf"))
    vocabulary, cache, found = Vocabulary(sizes={"text": 40}), KeyCache.empty(2), [[], []]
    ids = [np.array(prompt) for prompt in PROMPTS]
    for _ in range(TOKENS):
        logits, _ = read_tokens(decoder, cache, [0, 1], list(map(Document, ids)), vocabulary, RoutingState())
        # Rounding leaves 1e-6 of a logit, so that no token is decided by it.
        best, second = logits.topk(2, dim=1).values.t()
        assert (best - second).min() > 1e-4
        ids = [row.argmax(keepdim=True).numpy() for row in logits]
        for sequence, token in zip(found, ids, strict=True):
            sequence.append(int(token[0]))
    assert found == expected
    assert found[0] != found[1] and all(len(set(tokens)) > 1 for tokens in found)
