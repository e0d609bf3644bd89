"""Of tokens with equal scores the earlier runs, wherever its document is packed."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data_pipeline.stream.batch import make_batch
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.depth_gates import scores
from pretrain.models.inputs import build_inputs
from tests.pretrain.models.random_batch import MOT, tiny_config
from tests.pretrain.tiny_data import VOCABULARY

CONTEXT = 96
IMAGE = VOCABULARY.start("image")
CONFIG = tiny_config(
    MOT, num_layers=1, d_model=128, context_tokens=CONTEXT, vocab_tokens=VOCABULARY.size,
    depth={"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}},
)  # fmt: skip


def documents(count: int, seed: int) -> list[np.ndarray]:
    """Documents of 20 to 40 image tokens with three different ids: most scores tie."""
    rng = np.random.default_rng(seed)
    return [
        np.concatenate([[1, 3], IMAGE + rng.integers(0, 3, rng.integers(20, 41)), [4, 2]])
        for _ in range(count)
    ]


def ran(
    decoder: Decoder, config: ModelConfig, texts: Sequence[np.ndarray], packing: Sequence[Sequence[int]]
) -> dict[int, list[bool]]:
    """Number of each document -> which of its slots ran in the first layer, whose input is the embedding."""
    batch = make_batch(
        [[texts[number] for number in sequence] for sequence in packing],
        sequence_tokens=CONTEXT,
        vocabulary=VOCABULARY,
        samples=[[str(number) for number in sequence] for sequence in packing],
    )
    with torch.no_grad():
        _, report = decoder.hidden(replace(build_inputs(batch, config), report_ran=True))
    (runs,) = report.layers[0].ran
    found = {}
    for row, sequence in enumerate(packing):
        ends = np.cumsum([len(texts[number]) - 1 for number in sequence])
        for number, mask in zip(sequence, np.split(runs[row], ends), strict=False):
            found[number] = mask.tolist()
    return found


def test_packing_does_not_decide_between_equal_tokens() -> None:
    decoder = Decoder(CONFIG, seed=1)
    for seed in range(20):
        texts = documents(6, seed)
        packings = [[[0, 1], [2, 3], [4, 5]], [[5, 0], [1, 4], [3, 2]], [[4, 1], [0], [3], [5, 2]]]
        packings += [[[number] for number in range(6)]]
        first, *others = (ran(decoder, CONFIG, texts, packing) for packing in packings)
        for other in others:
            assert other == first, seed
        for number, text in enumerate(texts):
            ids, runs = text[:-1], np.array(first[number])
            split = [i for i in range(3) if 0 < runs[ids == IMAGE + i].mean() < 1]
            assert len(split) <= 1  # ties of one id alone are cut, and there the earlier run
            for i in split:
                of_id = runs[ids == IMAGE + i]
                assert of_id.tolist() == sorted(of_id.tolist(), reverse=True)


def test_a_score_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (20, 64, 128, 130):
        row, weight = torch.randn(2, width, generator=generator)
        alone = scores(row[None], weight, 1e-5)
        for count in (1, 2, 3, 5, 8, 17, 64, 127, 1000):
            for offset in (0, 1, 3):
                x = torch.randn(offset + count, width, generator=generator)
                x[offset::2] = row
                assert (scores(x[offset:], weight, 1e-5)[::2] == alone).all(), (width, count, offset)
