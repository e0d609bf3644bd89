"""How ranks are laid out over tensor, data and pipeline axes; which layouts are legal. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt


class ParallelConfig(BaseModel):
    """Sizes of the axes; dp is derived from the world size. Ranks go tp fastest, then dp, then pp."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch_sequences: PositiveInt = 1
    """Sequences of one forward and backward pass on one data-parallel rank."""
    activation_checkpointing: bool = False
    collective_timeout_s: PositiveInt = 600


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """Ranks left for data parallelism. Raises ValueError where the layout cannot be made."""
    for axis in ("tp", "pp"):
        if getattr(config, axis) != 1:
            raise ValueError(
                f"parallel.{axis} = {getattr(config, axis)}: only data-parallel ranks in this version; "
                f"set parallel.{axis} = 1"
            )
    return world_size


def check_layout(config: ParallelConfig, *, world_size: int, sequences_per_step: int, precision: str) -> None:
    """Raise ValueError, naming values and what to change, for a layout that cannot run or would be wrong."""
    dp = data_parallel_size(config, world_size)
    per_pass = dp * config.micro_batch_sequences
    if sequences_per_step % per_pass:
        raise ValueError(
            f"{sequences_per_step} sequences per step cannot be split over dp = {dp} ranks x "
            f"parallel.micro_batch_sequences = {config.micro_batch_sequences}; "
            f"make tokens_per_step / model.context_tokens a multiple of {per_pass}"
        )
    if config.zero_stage == 0 and precision == "bf16":
        # DeepSpeed 0.19.8 steps Adam on zero gradients at start-up (runtime/fp16/unfused_optimizer.py:425).
        raise ValueError(
            'parallel.zero_stage = 0 with precision = "bf16" trains wrongly in DeepSpeed; '
            "use zero_stage = 1, 2 or 3"
        )
