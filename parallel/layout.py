"""How ranks are laid out over tensor, data and pipeline axes; which layouts are legal. Imports no torch.

    rank = (pp_rank * dp + dp_rank) * tp + tp_rank

Tensor-parallel ranks, which talk in every layer, are neighbours and so share a node; stages, which talk
least, are furthest apart. megatron-core's order "tp-cp-ep-dp-pp" (0.16.1, parallel_state.py) and DeepSpeed's
PipeModelDataParallelTopology (0.19.8, runtime/pipe/topology.py) are this one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, PositiveInt

Precision = Literal["fp32", "bf16"]


class ParallelConfig(BaseModel):
    """Sizes of the axes; dp is derived from the world size. Ranks go tp fastest, then dp, then pp."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch_sequences: PositiveInt = 1
    """Sequences of one forward and backward pass on one data-parallel rank."""
    sequence_parallel: bool = True
    """Where tp > 1: between tensor-parallel regions each rank holds 1/tp of a micro-batch's tokens instead of
    all of them, for the same bytes communicated forward. No effect where tp = 1."""
    activation_checkpointing: bool = False
    collective_timeout_s: PositiveInt = 600


class ModelShape(Protocol):
    """What the legality of a layout depends on; a ModelConfig is one."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def ffn_width(self) -> int: ...
    @property
    def expert_widths(self) -> Mapping[str, int]: ...
    @property
    def whole_blocks(self) -> Sequence[int]: ...
    @property
    def vocab_tokens(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...


class Coordinates(NamedTuple):
    """Where a rank sits on each axis."""

    pp_rank: int
    dp_rank: int
    tp_rank: int


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """Ranks left for data parallelism. Raises ValueError where tp x pp does not divide the world."""
    model_parallel = config.tp * config.pp
    if world_size % model_parallel:
        raise ValueError(
            f"{world_size} processes cannot be laid out as tp = {config.tp} x pp = {config.pp} x dp; start a "
            f"multiple of {model_parallel} processes, or change parallel.tp or parallel.pp"
        )
    return world_size // model_parallel


def coordinates(config: ParallelConfig, world_size: int, rank: int) -> Coordinates:
    """Coordinates of `rank`; the inverse of rank_of."""
    assert 0 <= rank < world_size, (rank, world_size)
    rest, tp_rank = divmod(rank, config.tp)
    pp_rank, dp_rank = divmod(rest, data_parallel_size(config, world_size))
    return Coordinates(pp_rank, dp_rank, tp_rank)


def rank_of(config: ParallelConfig, world_size: int, place: Coordinates) -> int:
    """The rank at `place`."""
    dp = data_parallel_size(config, world_size)
    assert place.pp_rank < config.pp and place.dp_rank < dp and place.tp_rank < config.tp, (place, config)
    return (place.pp_rank * dp + place.dp_rank) * config.tp + place.tp_rank


def check_layout(
    config: ParallelConfig,
    shape: ModelShape,
    *,
    world_size: int,
    sequences_per_step: int,
    precision: Precision,
) -> None:
    """Raise ValueError for a layout that cannot run or would be wrong: all of its problems at once, each with
    the values and what to change."""
    found = list(_problems(config, shape, world_size, sequences_per_step, precision))
    if found:
        raise ValueError("\n".join(found))


def legal_layouts(
    shape: ModelShape,
    gpus: int,
    *,
    sequences_per_step: int,
    precision: Precision,
    like: ParallelConfig | None = None,
) -> list[ParallelConfig]:
    """Every layout of `gpus` ranks that check_layout lets pass, with and without activation checkpointing.

    Other fields are those of `like`. Ascending in tp, pp, micro_batch_sequences, zero_stage.
    """
    like = like or ParallelConfig()
    found = []
    for tp, pp in product(_divisors(gpus), repeat=2):
        if gpus % (tp * pp) or sequences_per_step % (dp := gpus // (tp * pp)):
            continue
        for sequences, zero_stage, again in product(
            _divisors(sequences_per_step // dp), (0, 1, 2, 3), (False, True)
        ):
            chosen = {"tp": tp, "pp": pp, "micro_batch_sequences": sequences, "zero_stage": zero_stage}
            layout = like.model_copy(update=chosen | {"activation_checkpointing": again})
            if not any(_problems(layout, shape, gpus, sequences_per_step, precision)):
                found.append(layout)
    return found


def _problems(
    config: ParallelConfig, shape: ModelShape, world_size: int, sequences_per_step: int, precision: Precision
) -> Iterator[str]:
    """What is wrong with a layout, one message a rule."""
    tp, pp = config.tp, config.pp
    # A head, with its keys and values, and a column of the feed-forward live on one rank.
    widths = {"num_kv_heads": shape.kv_heads, "num_heads": shape.num_heads, "ffn_hidden": shape.ffn_width}
    widths |= {f"experts.{t}.ffn_hidden": w for t, w in shape.expert_widths.items() if w != shape.ffn_width}
    legal = ", ".join(map(str, _divisors(math.gcd(*widths.values()))))
    if shape.kv_heads == shape.num_heads:
        del widths["num_kv_heads"]
    for name, size in widths.items():
        if size % tp:
            yield (
                f"parallel.tp = {tp} does not divide model.{name} = {size}, of which each tensor-parallel "
                f"rank holds an equal share; legal for this model: parallel.tp = {legal}"
            )
    if shape.vocab_tokens % tp:
        yield (
            f"parallel.tp = {tp} does not divide model.vocab_tokens = {shape.vocab_tokens}, of whose rows "
            f"each tensor-parallel rank holds an equal share; set model.vocab_tokens = "
            f"{-(-shape.vocab_tokens // tp) * tp} (it may exceed the data's ids) or change parallel.tp"
        )
    tokens = config.micro_batch_sequences * shape.context_tokens
    if config.sequence_parallel and tokens % tp:
        yield (
            f"parallel.tp = {tp} does not divide the {tokens} tokens of a micro-batch "
            f"(parallel.micro_batch_sequences = {config.micro_batch_sequences} x model.context_tokens = "
            f"{shape.context_tokens}), which sequence parallelism cuts into equal chunks; change one, "
            "or set parallel.sequence_parallel = false"
        )
    pieces = 2 * shape.num_layers - len(shape.whole_blocks)
    if pp > pieces:
        whole = (
            f"; {len(shape.whole_blocks)} blocks with depth routing stay whole" if shape.whole_blocks else ""
        )
        yield (
            f"parallel.pp = {pp} leaves stages without attention or feed-forward: the model has "
            f"{shape.num_layers} of each{whole}; set parallel.pp = {pieces} or less"
        )
    if pp > 1 and config.zero_stage > 1:
        # Refused by DeepSpeed 0.19.8 too (runtime/pipe/engine.py:76): its stages reduce whole gradients.
        yield (
            f"parallel.zero_stage = {config.zero_stage} with parallel.pp = {pp}: DeepSpeed's pipeline shards "
            "the optimizer at most; set parallel.zero_stage = 1, or parallel.pp = 1"
        )
    if config.zero_stage == 0 and precision == "bf16":
        # DeepSpeed 0.19.8 steps Adam on zero gradients at start-up (runtime/fp16/unfused_optimizer.py:425).
        # Its pipeline does not, but stage 1 gives the same numbers there in less memory.
        yield (
            'parallel.zero_stage = 0 with precision = "bf16" trains wrongly in DeepSpeed; '
            f"use zero_stage = {'1' if pp > 1 else '1, 2 or 3'}"
        )
    try:
        dp = data_parallel_size(config, world_size)
    except ValueError as error:
        yield str(error)
        return
    per_pass = dp * config.micro_batch_sequences
    if sequences_per_step % per_pass:
        yield (
            f"{sequences_per_step} sequences per step cannot be split over dp = {dp} ranks x "
            f"parallel.micro_batch_sequences = {config.micro_batch_sequences}; "
            f"make tokens_per_step / model.context_tokens a multiple of {per_pass}"
        )


def _divisors(number: int) -> list[int]:
    """In time sqrt(number): a person may ask for 10^9 GPUs."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
