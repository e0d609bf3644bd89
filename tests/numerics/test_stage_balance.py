"""Stages cut by FLOPs are even where layers are not: a decoder whose later layers skip most image tokens."""

import math

import pytest

from parallel.partition import partition, stage_costs
from pretrain.models.accounting import sublayer_costs
from pretrain.models.config import ModelConfig

PAPER_7B = {"d_model": 4096, "num_heads": 32, "vocab_tokens": 65_536, "context_tokens": 4096}
WIDE_HEAD = PAPER_7B | {
    "num_kv_heads": 8,
    "ffn_hidden": 14_336,
    "vocab_tokens": 128_000,
    "context_tokens": 8192,
}
LAYERS = 32


def kept_frac(layer: int) -> float:
    """p-MoD's progressive decay with its published numbers: cosine, 1 above 0.85, never below 0.15."""
    raw = 0.5 * math.cos(math.pi * layer / (LAYERS - 1)) + 0.5
    return 1.0 if raw > 0.85 else max(raw, 0.15)


def costs_with_a_tail(shape: dict[str, int], image_frac: float) -> list[int]:
    """Each sublayer's cost at the tokens that it keeps: others are neither queries nor keys there."""

    def of(context_tokens: int) -> list[int]:
        values = shape | {"num_layers": LAYERS, "context_tokens": context_tokens, "towers": {"text": "all"}}
        return sublayer_costs(ModelConfig.model_validate(values))

    context = shape["context_tokens"]
    kept = [round(context * (1 - image_frac * (1 - kept_frac(layer)))) for layer in range(LAYERS)]
    return [0, *(cost for tokens in kept for cost in of(tokens)[1:3]), of(context)[-1]]


# Costliest stage over the mean stage. Cuts between whole blocks would give 1.143 and 1.134 in the fourth and
# seventh case. In the last one no cut is better: its head is 0.77 of a stage, and what can go with it is not.
@pytest.mark.parametrize(
    "shape, image_frac, stages, uniform, best",
    [
        (PAPER_7B, 0.5, 4, 1.26, 1.032),
        (PAPER_7B, 0.8, 4, 1.52, 1.026),
        (PAPER_7B, 0.5, 8, 1.26, 1.055),
        (PAPER_7B, 0.8, 8, 1.52, 1.071),
        (WIDE_HEAD, 0.5, 4, 1.23, 1.049),
        (WIDE_HEAD, 0.8, 4, 1.48, 1.019),
        (WIDE_HEAD, 0.5, 8, 1.31, 1.077),
        (WIDE_HEAD, 0.8, 8, 1.48, 1.114),
    ],
)
def test_a_depth_routed_tail_is_balanced(
    shape: dict[str, int], image_frac: float, stages: int, uniform: float, best: float
) -> None:
    costs = costs_with_a_tail(shape, image_frac)
    mean = sum(costs) / stages
    even = (0, *(1 + 2 * LAYERS * stage // stages for stage in range(1, stages)), 2 * LAYERS + 2)
    assert max(stage_costs(costs, even)) / mean == pytest.approx(uniform, abs=0.006)
    assert max(stage_costs(costs, partition(costs, stages))) / mean <= best
