"""A real decoder, its config and held-out documents, for tests of evaluations."""

import pytest
import torch

from data_pipeline.files.toml_config import validate
from data_pipeline.shards.index import TokenSource
from pretrain.config import RunConfig
from pretrain.models.decoder import Decoder
from pretrain.models.pretraining import Pretraining
from tests.pretrain.tiny_data import tiny_run, write_tiny_data


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny_data(folder)
    return TokenSource.open(folder / "heldout")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("runs")
    return validate(RunConfig, tiny_run(folder, folder), source="test")


@pytest.fixture(scope="module")
def module(config: RunConfig) -> Pretraining:
    decoder = Decoder(config.model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # far from uniform, so that a wrong token or a wrong condition shows
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return Pretraining(decoder)
