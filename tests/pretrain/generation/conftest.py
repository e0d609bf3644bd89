"""An untrained model with real tokenizers, as a folder of weights."""

from functools import partial
from pathlib import Path

import pytest

from data_pipeline.tokenize.tokenizer_set import vocabulary_of
from pretrain.models.decoder import Decoder
from pretrain.weights.folder import MODEL, LazyTensor, WeightSource, about_model, write_folder
from tests.pretrain.models.random_batch import MOT, tiny_config
from tests.pretrain.tiny_tokenizers import write_tiny_tokenizers


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers/ and weights/, a folder of weights of a model of 3 modalities."""
    folder = tmp_path_factory.mktemp("speaker")
    vocabulary = vocabulary_of(write_tiny_tokenizers(folder / "tokenizers"))
    model = tiny_config(MOT, context_tokens=40, vocab_tokens=vocabulary.size)
    tensors = {
        name: LazyTensor(tuple(parameter.shape), partial(lambda tensor: tensor, parameter.detach()))
        for name, parameter in Decoder(model, seed=3).named_parameters()
    }
    source = WeightSource(folder / "none", model, tensors, "speaker", 7, vocabulary.sizes)
    write_folder(folder / "weights", source, {MODEL: about_model(source)}, dtype="fp32", file_bytes=10**9)
    return folder
