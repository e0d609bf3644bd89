"""What a run will hold, compute and send in a layout, before any process starts. Pure; imports no torch.

Parameters, gradients and optimizer state are those of parallel/engine_memory.py, which tests hold against
real engines. Activations are what the autograd functions of pretrain/models keep for their backward passes,
which tests hold against the tensors that a real decoder saves. Buffers and workspace are bounds. Seconds
come from the assumptions of `Machine`: they put layouts in order and predict nothing.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

from parallel import engine_memory
from parallel.engine_memory import MemoryUse, format_bytes
from parallel.layout import ParallelConfig, data_parallel_size, legal_layouts
from parallel.partition import partition, stage_costs
from pretrain.config import RunConfig
from pretrain.models import depth_accounting
from pretrain.models.accounting import TRAIN_FACTOR, sublayer_costs
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import Layer, layers
from pretrain.planning.activations import hidden_bytes, last_sublayer, of_blocks, stage_activations

CHUNK_TOKENS = 512
"""Of pretrain.models.cross_entropy, which imports torch."""


@dataclass(frozen=True)
class Machine:
    """What seconds are estimated with: GPUs of the H100 class, nodes of eight, nothing overlapped."""

    flops: float = 400e12
    """Per second and GPU, of bf16 matrix products in a training step: 40 % of the data sheet's 989e12."""
    node_gpus: int = 8
    node_bytes: float = 300e9
    """Per second that a GPU sends inside a node."""
    network_bytes: float = 25e9
    """Per second that a GPU sends between nodes: 200 Gbit/s each."""


@dataclass(frozen=True)
class StagePlan:
    """One rank of a pipeline stage, the one that holds most. Bytes, but for `flops`."""

    sublayers: range
    """As Decoder counts them: embedding, attention and feed-forward of each block, final norm with head."""
    flops: int
    """Forward, of one micro-batch, over the stage's tensor-parallel ranks together."""
    towers: dict[str, MemoryUse]
    """Weight shard -> what its parameters cost, "shared" among them."""
    activations: int
    """Kept for backward passes, of all micro-batches that are in flight, if no token skips a layer: so it is
    while depth routing warms up, and in micro-batches of other modalities later on."""
    activations_after_warm_up: int
    """As many tokens skipping as expected, of every modality alike."""
    workspace: int
    """Of the layer that is computed."""
    buffers: int
    """Of communication, and the gradient that is copied for its update."""

    @property
    def held(self) -> MemoryUse:
        return sum(self.towers.values(), MemoryUse())

    @property
    def total(self) -> int:
        return self.held.total + self.activations + self.workspace + self.buffers


@dataclass(frozen=True)
class LayoutPlan:
    """A layout of a run. `sent`: axis -> bytes that the busiest rank sends in one optimizer step."""

    layout: ParallelConfig
    dp: int
    micro_batches: int
    """Of one data-parallel rank in one optimizer step."""
    stages: tuple[StagePlan, ...]
    sent: dict[str, int]
    seconds: float
    """Of one step, under the assumptions of Machine."""

    @property
    def peak_bytes(self) -> int:
        return max(stage.total for stage in self.stages)

    @property
    def bubble_frac(self) -> float:
        """Share of a step in which a stage waits, were all stages equal: 1F1B's (pp - 1) / (m + pp - 1)
        (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)."""
        idle = len(self.stages) - 1
        return idle / (self.micro_batches + idle)

    @property
    def imbalance(self) -> float:
        """FLOPs of the costliest stage over those of the mean stage."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)


def plan(
    config: RunConfig, gpus: int, layout: ParallelConfig | None = None, machine: Machine | None = None
) -> LayoutPlan:
    """The plan of `layout` (None: the config's), which must be legal for `gpus` ranks."""
    layout, machine = layout or config.parallel, machine or Machine()
    model, pp = config.model, layout.pp
    dp = data_parallel_size(layout, gpus)
    micro_batches = config.sequences_per_step // (dp * layout.micro_batch_sequences)
    of_sequence = tuple(sublayer_costs(model))
    bounds = _bounds(of_sequence, pp, model.whole_blocks)
    costs = [cost * layout.micro_batch_sequences for cost in of_sequence]
    stages, passes, sent_in_layers = [], [], []
    for index, flops in enumerate(stage_costs(costs, bounds)):
        held = range(bounds[index], bounds[index + 1])
        stage = _stage(config, layout, dp, held, min(pp - index, micro_batches), flops)
        stages.append(stage)
        again = sum(costs[i] for i in of_blocks(model, held)) if layout.activation_checkpointing else 0
        sent_in_layers.append(_tensor_bytes(model, layout, held, config))
        passes.append(
            (TRAIN_FACTOR * stage.flops + again) / layout.tp / machine.flops
            + sent_in_layers[-1] / _bandwidth(machine, layout.tp)
        )
    sent = {
        "tp": micro_batches * max(sent_in_layers),
        "dp": max(_data_bytes(config, layout, dp, micro_batches, stage.sublayers) for stage in stages),
        "pp": micro_batches * min(pp - 1, 2) * hidden_bytes(config, layout),
    }
    seconds = (
        max(passes) * (micro_batches + pp - 1)
        + sent["dp"] / _bandwidth(machine, layout.tp * dp)
        + sent["pp"] / _bandwidth(machine, gpus)
    )
    return LayoutPlan(layout, dp, micro_batches, tuple(stages), sent, seconds)


def ranked(config: RunConfig, gpus: int, memory_bytes: float | None = None) -> list[LayoutPlan]:
    """All legal layouts: those that fit into `memory_bytes` first, by estimated seconds of a step; then the
    others, by bytes."""
    plans = [
        plan(config, gpus, layout)
        for layout in legal_layouts(
            config.model,
            gpus,
            sequences_per_step=config.sequences_per_step,
            precision=config.precision,
            like=config.parallel,
        )
    ]

    def key(found: LayoutPlan) -> tuple[bool, float, int]:
        fits = memory_bytes is None or found.peak_bytes <= memory_bytes
        return (not fits, found.seconds if fits else 0.0, found.peak_bytes)

    return sorted(plans, key=key)


def weights(model: ModelConfig, sublayers: range, tp: int) -> dict[str, list[int]]:
    """Elements of each parameter on one of `tp` ranks, in the groups and order of
    pretrain.train.optimizer."""
    embedding, *block, final_norm, head = layers(model.model_copy(update={"num_layers": 1, "depth": {}}))
    halves = tuple(
        [layer for layer in block if layer.stem.startswith(f"blocks.0.{kind}")]
        for kind in ("feed_forward", "attention")
    )
    held = [embedding] if 0 in sublayers else []
    for number in of_blocks(model, sublayers):
        if number % 2:  # blocks with depth routers are whole
            routed = model.depth_ratios(number // 2)
            held += [Layer("depth", "depth", (model.d_model,), (model.towers[m],)) for m in routed]
        held += halves[number % 2]
    held += [final_norm, head] if last_sublayer(model) in sublayers else []
    groups: dict[str, list[int]] = {}
    for layer in held:
        size = math.prod(layer.shape) // (tp if layer.cut else 1)
        for shard in layer.names(model):
            groups.setdefault(f"{shard}/{'decay/cut' if layer.cut else 'no_decay/whole'}", []).append(size)
    return groups


@lru_cache
def _bounds(costs: tuple[int, ...], stages: int, whole_blocks: tuple[int, ...]) -> tuple[int, ...]:
    """A ranking asks for few different ones, again and again."""
    return partition(costs, stages, whole_blocks)


def _stage(
    config: RunConfig, layout: ParallelConfig, dp: int, sublayers: range, in_flight: int, flops: int
) -> StagePlan:
    trained, still = _groups(config, sublayers, layout.tp)
    run = depth_accounting.run_shares(config.model)
    zero = {"dp": dp, "zero_stage": layout.zero_stage, "precision": config.precision}
    towers: dict[str, MemoryUse] = {}
    trained_cost = partial(engine_memory.group_memory, state_bytes=config.optimizer.spec.state_bytes)
    for groups, cost in ((trained, trained_cost), (still, engine_memory.frozen_memory)):
        for name, sizes in groups.items():
            shard = name.partition("/")[0]
            towers[shard] = towers.get(shard, MemoryUse()) + cost(sizes, **zero)
    return StagePlan(
        sublayers=sublayers,
        flops=flops,
        towers=towers,
        activations=stage_activations(config, layout, sublayers, in_flight, dict.fromkeys(run, 1.0)),
        activations_after_warm_up=stage_activations(config, layout, sublayers, in_flight, run),
        workspace=_workspace(config, layout, last=last_sublayer(config.model) in sublayers),
        buffers=engine_memory.buffers(trained, **zero) + engine_memory.update_copy(trained, **zero),
    )


def _groups(
    config: RunConfig, sublayers: range, tp: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(groups that are trained, groups of frozen towers)."""
    groups = weights(config.model, sublayers, tp)
    frozen = {tower for tower, own in config.optimizer.towers.items() if own.frozen}
    still = {name: sizes for name, sizes in groups.items() if name.partition("/")[0] in frozen}
    return {name: sizes for name, sizes in groups.items() if name not in still}, still


def _workspace(config: RunConfig, layout: ParallelConfig, *, last: bool) -> int:
    """Bound on the temporary tensors of the layer that needs most, gradients on the way back included.

    Feed-forward: 5 T f b, at the end of SwiGLU's backward pass, f of all experts of a token. Attention: QKV's
    gradient twice, and three fp32 copies of queries and keys. Loss: the logits of a chunk in fp32 and twice
    in b, the head's gradient in fp32. With sequence parallel, the gathered rows.
    """
    model, b, tp = config.model, format_bytes(config.precision), layout.tp
    tokens = layout.micro_batch_sequences * model.context_tokens
    queries, keys = model.num_heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp
    gathered = 2 * tokens * model.d_model * b if tp > 1 else 0
    chunk = min(CHUNK_TOKENS * tp, tokens)
    features = max(
        model.width_of(tower) * (model.experts[tower].experts_per_token if tower in model.experts else 1)
        for tower in model.tower_names
    )
    logits = chunk * model.vocab_tokens // tp * (4 + 2 * b) + model.vocab_tokens * model.d_model // tp * 4
    return gathered + max(
        5 * tokens * round(features) // tp * b,
        2 * tokens * (queries + 2 * keys) * b + 3 * 4 * tokens * (queries + keys),
        logits if last else 0,
    )


def _tensor_bytes(model: ModelConfig, layout: ParallelConfig, sublayers: range, config: RunConfig) -> int:
    """Bytes that a rank sends its tensor-parallel peers for one micro-batch, rings assumed.

    An all-gather or reduce-scatter of V bytes sends (tp - 1) / tp V, an all-reduce twice that; V = T d b. A
    sublayer forward: one of each with sequence parallel, else an all-reduce. Backward: the input of its first
    matrix is gathered again and two more collectives run with sequence parallel, else an all-reduce. A
    checkpointed block, or what a stage has of it, runs forward again, in pre-norm up to what its last matrix
    was given. Embedding, and head with loss: two and two, and three fp32 numbers a token. Gradients of norms
    are left out.
    """
    if layout.tp == 1:
        return 0
    tokens = layout.micro_batch_sequences * model.context_tokens
    parallel, pre = layout.sequence_parallel, model.norm_placement == "pre"
    held, last = of_blocks(model, sublayers), last_sublayer(model) in sublayers
    steps = (5 if parallel else 4) * len(held)
    if layout.activation_checkpointing:
        steps += 2 * len(held) - pre * (1 if parallel else 2) * _num_blocks(held)
    steps += 2 * (0 in sublayers) + 2 * last
    one = tokens * model.d_model * format_bytes(config.precision) * (layout.tp - 1) // layout.tp
    return steps * one + last * (layout.tp - 1) * tokens // layout.tp * 3 * 4


def _data_bytes(
    config: RunConfig, layout: ParallelConfig, dp: int, micro_batches: int, sublayers: range
) -> int:
    """Bytes that a rank sends its data-parallel peers in a step, rings assumed: n elements, b bytes each.

    Stage 0: an all-reduce of gradients. 1: the same, and an all-gather of parameters. 2: as 1, but the
    all-reduce once a micro-batch (zero/stage_1_and_2.py:1590: buckets over several ranks' parts are reduced
    to all). 3: per micro-batch an all-gather of parameters forward and one backward, and a reduce-scatter
    of gradients. Gradients travel in fp32 (communication_data_type).
    """
    trained, still = _groups(config, sublayers, layout.tp)
    elements = sum(map(sum, trained.values()))
    b, once = format_bytes(config.precision), (dp - 1) / dp
    if layout.zero_stage == 3:
        gathered = elements + sum(map(sum, still.values()))
        return round(once * micro_batches * (2 * b * gathered + 4 * elements))
    reductions = micro_batches if layout.zero_stage == 2 else 1
    return round(once * elements * (2 * 4 * reductions + (b if layout.zero_stage else 0)))


def _num_blocks(held: range) -> int:
    """Blocks that a stage has all or half of."""
    return len({(number - 1) // 2 for number in held})


def _bandwidth(machine: Machine, neighbours: int) -> float:
    """Of an axis whose ranks lie within `neighbours` successive ranks."""
    return machine.node_bytes if neighbours <= machine.node_gpus else machine.network_bytes
