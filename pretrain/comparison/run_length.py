"""A run of another length: what is measured in steps keeps its share of them.

This module imports no torch.
"""

from data_pipeline.files.toml_config import validate
from pretrain.config import RunConfig


def with_steps(
    config: RunConfig, steps: int, of_steps: int, *, source: str, intervals: bool = False
) -> RunConfig:
    """The config with `steps` steps, whose warm-up is the share of them that it was of `of_steps` steps.

    The rest of the schedule is defined by shares. `intervals`: the intervals of every_steps keep their share
    too, so that runs of all lengths are evaluated equally often. `source` names the run in messages.
    """
    values = config.model_dump()

    def scaled(number: int) -> int:
        return round(number * steps / of_steps)

    values["total_tokens"] = steps * config.tokens_per_step
    schedule = values["optimizer"]["schedule"]
    schedule["warmup_steps"] = scaled(schedule["warmup_steps"])
    if intervals:
        every = values["every_steps"]
        values["every_steps"] = {k: n if n is None else max(1, scaled(n)) for k, n in every.items()}
    return validate(RunConfig, values, source=source)
