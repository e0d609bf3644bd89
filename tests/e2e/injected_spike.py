"""A training run whose loss weights are multiplied by a factor on the device where chosen data are read: the
gradient of such a step leaps as that of a bad batch does."""

import json
import math
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pretrain.train import rank


def _with_spikes(inputs_of_step: Callable[..., Any], factors: Mapping[int, float]) -> Callable[..., Any]:
    """`inputs_of_step` of pretrain/train/loop.py. `factors`: sequences consumed with a step -> its factor."""

    def inputs_with_spikes(config: Any, batch: Any, *rest: Any) -> Any:
        inputs = inputs_of_step(config, batch, *rest)
        factor = factors.get(batch.state_after.sequences)
        if factor is None:
            return inputs
        # The weights that the host knows, and divides by, stay as they are.
        return [replace(each, loss_weights=each.loss_weights * factor) for each in inputs]

    return inputs_with_spikes


def main() -> None:
    """Run a module as a program. The first argument is a JSON object of factors; null is nan."""
    told, module, *_ = sys.argv[1:]
    del sys.argv[1:3]
    factors = {int(key): math.nan if value is None else value for key, value in json.loads(told).items()}
    start_training = rank._train

    def train(config: Any, facts: Any, run: Any, stop: Any) -> Any:
        from parallel import world

        met = world.start(config.parallel, facts)
        from pretrain.train import loop  # imports megatron-core, which `start` prepares

        loop.inputs_of_step = _with_spikes(loop.inputs_of_step, factors)
        world.start = lambda *_: met
        return start_training(config, facts, run, stop)

    rank._train = train
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
