from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.synthetic import random_document
from pretrain.config import RunConfig
from pretrain.training_stream import training_stream
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data, write_tokens


def test_the_stream_is_that_of_the_config(tmp_path: Path) -> None:
    values = tiny_run(tmp_path, tmp_path / "runs")
    config = validate(RunConfig, values, source="test")
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        training_stream(config)
    write_tiny_data(tmp_path)
    stream = training_stream(config)
    assert (stream.seed, stream.context_tokens, stream.sequences_per_step) == (3, 64, 4)
    assert stream.num_documents == 200


def test_weights_may_share_out_tokens(tmp_path: Path) -> None:
    """Two sources, of which one has documents twice as long, give the tokens that their weights say."""
    rng = np.random.default_rng(0)
    for name, tokens in {"short": 20, "long": 40}.items():
        lengths = rng.integers(tokens, 2 * tokens, size=300).tolist()
        write_tokens(tmp_path / name, [random_document(rng, VOCABULARY, [("text", n)]) for n in lengths])
    train = [{"path": str(tmp_path / "short"), "weight": 3.0}, {"path": str(tmp_path / "long")}]
    values = tiny_run(tmp_path, tmp_path / "runs") | {"data": {"train": train, "weights_of": "tokens"}}
    stream = training_stream(validate(RunConfig, values, source="test"))
    slots = np.zeros(2)
    state = stream.start()
    while state.block < 4:
        plan, state = stream.plan_step(state)
        np.add.at(slots, plan.source, plan.slots)
    assert slots[0] / slots.sum() == pytest.approx(0.75, abs=0.01)  # blocks are of whole documents
    by_documents = values | {"data": {"train": train}}
    assert stream.shares != training_stream(validate(RunConfig, by_documents, source="test")).shares
