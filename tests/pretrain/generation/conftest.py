"""Untrained models with real tokenizers, as folders of weights."""

from functools import partial
from pathlib import Path

import pytest
from torch import nn

from data_pipeline.tokenize.tokenizer_set import vocabulary_of
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.weights.folder import MODEL, LazyTensor, WeightSource, about_model, write_folder
from tests.pretrain.models.random_batch import MOT, depth_tables, tiny_config
from tests.pretrain.tiny_tokenizers import write_tiny_tokenizers

ROUTED = depth_tables(["text", "image"], schedule="constant", mean_ratio=0.5, rule="top_k", keys="selected")
THRESHOLDS = {f"blocks.{layer}.depth.{m}": 0.0 for layer in range(2) for m in ("text", "image")}


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers/, and weights of models of 3 modalities: weights/, and routed/ of one whose
    tokens skip layers by top_k; and pixels/ with tokenizers/ and weights/ of one whose images are vectors."""
    folder = tmp_path_factory.mktemp("speaker")
    ids = vocabulary_of(write_tiny_tokenizers(folder / "tokenizers"))
    pixels = vocabulary_of(write_tiny_tokenizers(folder / "pixels" / "tokenizers", vectors=True))
    for out, vocabulary, routing_state, tables in (
        ("weights", ids, None, {}),
        ("routed", ids, RoutingState(thresholds=THRESHOLDS), ROUTED),
        ("pixels/weights", pixels, None, {"vectors": {"image": {"features": 48}}}),
    ):
        model = tiny_config(MOT, context_tokens=40, vocab_tokens=vocabulary.size, **tables)
        decoder = Decoder(model, seed=3)
        for adapters in decoder.vectors.values():  # they predict 0 until they are trained
            nn.init.normal_(adapters.leave.weight.shared, std=0.5)
        tensors = {
            name: LazyTensor(tuple(parameter.shape), partial(lambda tensor: tensor, parameter.detach()))
            for name, parameter in decoder.named_parameters()
        }
        source = WeightSource(
            folder / "none", model, tensors, "speaker", 7, vocabulary.sizes, routing_state=routing_state
        )
        write_folder(folder / out, source, {MODEL: about_model(source)}, dtype="fp32", file_bytes=10**9)
    return folder
