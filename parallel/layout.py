"""The layout of ranks over tensor, data and pipeline axes, and the rules for legal layouts.

    rank = (pp_rank * dp + dp_rank) * tp + tp_rank

Tensor-parallel ranks, which communicate in every layer, are neighbours and so share a node; stages, which
communicate least, are furthest apart. This is megatron-core's order "tp-cp-ep-dp-pp" (0.16.1,
parallel_state.py) and DeepSpeed's PipeModelDataParallelTopology (0.19.8, runtime/pipe/topology.py). This
module imports no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, PositiveInt

Precision = Literal["fp32", "bf16"]


class ParallelConfig(BaseModel):
    """Sizes of the axes. dp follows from the number of ranks, which go along tp first, then dp, then pp."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch_sequences: PositiveInt = 1
    """Sequences of one forward and backward pass on one data-parallel rank."""
    sequence_parallel: bool = True
    """Whether, between tensor-parallel regions, a rank holds 1/tp of a micro-batch's tokens instead of all of
    them. The forward pass communicates the same bytes. It has no effect with tp = 1."""
    activation_checkpointing: bool = False
    collective_timeout_s: PositiveInt = 600


class ModelShape(Protocol):
    """The sizes of a model that decide which layouts are legal; a ModelConfig has them."""

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
    def tied_embeddings(self) -> bool: ...
    @property
    def vocab_tokens(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...


class Coordinates(NamedTuple):
    """The position of a rank on all axes."""

    pp_rank: int
    dp_rank: int
    tp_rank: int


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """The number of data-parallel ranks. Raises ValueError if tp x pp does not divide the number of ranks."""
    model_parallel = config.tp * config.pp
    if world_size % model_parallel:
        raise ValueError(
            f"{world_size} processes cannot be laid out as tp = {config.tp} x pp = {config.pp} x dp; start a "
            f"multiple of {model_parallel} processes, or change parallel.tp or parallel.pp"
        )
    return world_size // model_parallel


def coordinates(config: ParallelConfig, world_size: int, rank: int) -> Coordinates:
    """The coordinates of a rank; the inverse of `rank_of`."""
    assert 0 <= rank < world_size, (rank, world_size)
    rest, tp_rank = divmod(rank, config.tp)
    pp_rank, dp_rank = divmod(rest, data_parallel_size(config, world_size))
    return Coordinates(pp_rank, dp_rank, tp_rank)


def rank_of(config: ParallelConfig, world_size: int, position: Coordinates) -> int:
    """The rank at the coordinates `position`."""
    dp = data_parallel_size(config, world_size)
    assert position.pp_rank < config.pp and position.dp_rank < dp and position.tp_rank < config.tp, (
        position,
        config,
    )
    return (position.pp_rank * dp + position.dp_rank) * config.tp + position.tp_rank


def check_layout(
    config: ParallelConfig,
    shape: ModelShape,
    *,
    world_size: int,
    sequences_per_step: int,
    precision: Precision,
) -> None:
    """Raise ValueError for a layout that cannot run or would train wrongly.

    The message lists all problems, with their values and with what to change.
    """
    problems = list(_problems(config, shape, world_size, sequences_per_step, precision))
    if problems:
        raise ValueError("\n".join(problems))


def legal_layouts(
    shape: ModelShape,
    gpus: int,
    *,
    sequences_per_step: int,
    precision: Precision,
    like: ParallelConfig | None = None,
) -> list[ParallelConfig]:
    """All legal layouts of `gpus` ranks, with and without activation checkpointing.

    Other fields are taken from `like`. The order is ascending in tp, pp, micro_batch_sequences, zero_stage.
    """
    like = like or ParallelConfig()
    layouts = []
    for tp, pp in product(_divisors(gpus), repeat=2):
        if gpus % (tp * pp) or sequences_per_step % (dp := gpus // (tp * pp)):
            continue
        for sequences, zero_stage, checkpointing in product(
            _divisors(sequences_per_step // dp), (0, 1, 2, 3), (False, True)
        ):
            chosen = {"tp": tp, "pp": pp, "micro_batch_sequences": sequences, "zero_stage": zero_stage}
            layout = like.model_copy(update=chosen | {"activation_checkpointing": checkpointing})
            if not any(_problems(layout, shape, gpus, sequences_per_step, precision)):
                layouts.append(layout)
    return layouts


def _problems(
    config: ParallelConfig, shape: ModelShape, world_size: int, sequences_per_step: int, precision: Precision
) -> Iterator[str]:
    """Messages about a layout, one for every rule that it breaks."""
    yield from _problems_of_tensor_axis(config, shape)
    yield from _problems_of_stages(config, shape, precision)
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


def _problems_of_tensor_axis(config: ParallelConfig, shape: ModelShape) -> Iterator[str]:
    """Messages about sizes that tensor-parallel ranks cannot share equally."""
    tp = config.tp
    # A head with its keys and values, and a column of the feed-forward, are on one rank.
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


def _problems_of_stages(config: ParallelConfig, shape: ModelShape, precision: Precision) -> Iterator[str]:
    """Messages about pipeline stages and the ZeRO stage."""
    pp = config.pp
    pieces = 2 * shape.num_layers - len(shape.whole_blocks)
    if pp > pieces:
        whole = (
            f"; {len(shape.whole_blocks)} blocks with depth routing stay whole" if shape.whole_blocks else ""
        )
        yield (
            f"parallel.pp = {pp} leaves stages without attention or feed-forward: the model has "
            f"{shape.num_layers} of each{whole}; set parallel.pp = {pieces} or less"
        )
    if pp > 1 and shape.tied_embeddings:
        yield (
            f"parallel.pp = {pp} with model.tied_embeddings = true: embedding and head are one weight, which "
            "the first and the last stage would both hold; set parallel.pp = 1, or tied_embeddings = false"
        )
    if pp > 1 and config.zero_stage > 1:
        # DeepSpeed 0.19.8 refuses this too (runtime/pipe/engine.py:76), as its stages reduce whole gradients.
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


def _divisors(number: int) -> list[int]:
    """The divisors of a number, in time sqrt(number), because a user may ask for 10^9 GPUs."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
