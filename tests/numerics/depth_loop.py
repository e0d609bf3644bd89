"""Training with depth routing as pretrain/train/loop.py does it: thresholds of a step are made of the
counts of the steps before it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from data_pipeline.stream.batch import Batch
from parallel import world
from parallel.engine import StepResult
from parallel.zero_engine import ZeroEngine
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import build_inputs
from pretrain.models.routing_state import RoutingState
from pretrain.train.depth_steps import sum_over_ranks, thresholds_after
from tests.numerics.layouts import MICRO_BATCHES, share
from tests.pretrain.models.random_batch import random_batch

Steps = list[tuple[StepResult, dict[str, float]]]
"""Results of steps, and the thresholds after each."""


def random_step(
    model: ModelConfig,
    step: int,
    present: Sequence[tuple[int, ...]] = ((0, 1, 2),) * MICRO_BATCHES,
    seed: int = 0,
) -> list[Batch]:
    """`present`: modalities in each micro-batch. Padding, which counts as text, is in all but the first."""
    return [
        random_batch(model, seed=seed + 10 * step + number, present=modalities, padding_tokens=2 * number)
        for number, modalities in enumerate(present)
    ]


def train_depth(
    engine: ZeroEngine,
    model: ModelConfig,
    w: world.World,
    steps: range,
    batches: Callable[[ModelConfig, int], Sequence[Batch]] = random_step,
    *,
    num_steps: int,
    chosen_by: tuple[dict[str, float], dict[str, float]] = ({}, {}),
    before: Callable[[int, tuple[dict[str, float], dict[str, float]]], None] = lambda *_: None,
) -> Steps:
    """Train `steps` of `num_steps`, after others that left `chosen_by`: thresholds and target shares.
    `batches`: of all data-parallel ranks. `before` is called with each step and its `chosen_by`."""
    found, (thresholds, shares) = [], chosen_by
    wide = any(parameter.dtype == torch.float64 for parameter in engine.module.parameters())
    dtype = torch.float64 if wide else torch.float32  # that in which losses are summed
    for step in steps:
        before(step, (thresholds, shares))
        routing_state = RoutingState(thresholds=thresholds, progress=step / num_steps)
        inputs = [build_inputs(batch, model, routing_state=routing_state) for batch in batches(model, step)]
        inputs = [replace(each, loss_weights=each.loss_weights.to(dtype)) for each in inputs]
        result = engine.train_step(share(w, inputs), step)
        report = sum_over_ranks(result.report, model, w)
        thresholds, shares = thresholds_after(
            thresholds, shares, report, model, step=step + 1, num_steps=num_steps
        )
        found.append((result, thresholds))
    return found
