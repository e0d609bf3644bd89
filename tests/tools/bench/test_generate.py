import numpy as np
import pytest
import torch

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from pretrain.generation.decoding import read_tokens
from pretrain.models.decoding_accounting import cache_bytes
from tools.bench.generate import IMAGE, Speaker, configs, measured, prompt_tokens, run, table
from tools.bench.model import BASELINE, Case
from tools.bench.options import parse_options

CASE, CPU = Case(4, 32, 4, 2, 64, 120), torch.device("cpu")


@pytest.fixture(scope="module")
def selected() -> Speaker:
    return Speaker(CASE, configs(CASE)["p-mod, selected keys"], CPU)


def test_prompts_and_thresholds_are_as_scheduled(selected: Speaker) -> None:
    """56 image tokens of 64 by the ratios of the layers, to a token or two."""
    vocabulary = selected.vocabulary
    for ids, _ in selected.prompts:
        modality = vocabulary.modality_of(ids)
        counts = {name: int((modality == i).sum()) for i, name in enumerate(vocabulary.modalities)}
        assert counts == prompt_tokens(CASE) | {"speech": 0} and not vocabulary.is_special(ids).any()
    expected = cache_bytes(selected.decoder.config, prompt_tokens(CASE), number_bytes=4) * CASE.sequences
    assert selected.cache.held_bytes == pytest.approx(expected, rel=0.02)  # 7e-4 measured


def test_a_timed_pass_leaves_the_cache_as_it_was(selected: Speaker) -> None:
    """So that every round is behind the same prompts, though rows of the cache were written on."""
    held = selected.cache.held_bytes
    ids = np.full((3, CASE.sequences), selected.vocabulary.start(IMAGE))

    def logits() -> torch.Tensor:
        rows = [Document(np.array([row])) for row in ids[0]]
        cache, sequences = selected.cache.select(range(CASE.sequences)), range(CASE.sequences)
        return read_tokens(selected.decoder, cache, sequences, rows, selected.vocabulary, selected.state)[0]

    before = logits()
    selected.write(ids)
    assert selected.cache.held_bytes == held and selected.cache.lengths.tolist() == [64, 64]
    assert torch.equal(logits(), before)


def test_the_table_has_all_models(capsys: pytest.CaptureFixture[str]) -> None:
    quantities, caches = measured(CASE, CPU, 1)
    assert [quantity.what for quantity in quantities] == [
        "a prompt", "text tokens written", "image tokens written"
    ]  # fmt: skip
    lines = table(quantities, caches, CASE).splitlines()
    for name in configs(CASE):
        assert sum(line.startswith(f"  {name}  ") for line in lines) == 4
    assert len({len(line) for line in lines[:5]}) == 1
    assert caches[BASELINE].held_bytes == caches["p-mod, all keys"].held_bytes
    with pytest.raises(ConfigError, match="--layers 0: p-MoD's schedule needs 2 or more"):
        run(parse_options("generate", ["--layers", "0"]))
