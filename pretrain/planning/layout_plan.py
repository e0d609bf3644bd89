"""The memory, FLOPs and traffic of a run in a layout, as pure functions, before any process starts.

Parameters, gradients and optimizer state come from parallel/engine_memory.py, which tests compare with real
engines. Activations are the tensors that the autograd functions of pretrain/models keep, which tests compare
with a real decoder. Buffers and workspace are bounds. Seconds follow from the assumptions of `Machine`; they
rank layouts and predict nothing. This module imports no torch.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from parallel import engine_memory
from parallel.engine_memory import MemoryUse, element_bytes
from parallel.layout import ParallelConfig, data_parallel_size, legal_layouts
from parallel.partition import partition, stage_costs
from pretrain.config import RunConfig
from pretrain.models import depth_accounting
from pretrain.models.accounting import TRAIN_FACTOR, sublayer_costs
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import Layer, layers
from pretrain.parameter_settings import settings_of, tells_blocks_apart
from pretrain.planning.activations import block_sublayers, hidden_bytes, last_sublayer, stage_activations

CHUNK_TOKENS = 512
"""The value of pretrain.models.cross_entropy, which is not imported because it imports torch."""


@dataclass(frozen=True)
class Machine:
    """The assumptions behind seconds: H100-class GPUs, eight a node, no overlap of computing and sending."""

    flops: float = 400e12
    """FLOP/s of a GPU in bf16 matrix products of a training step: 40 % of the data sheet's 989e12."""
    node_gpus: int = 8
    node_bytes: float = 300e9
    """Bytes per second that a GPU sends inside a node."""
    network_bytes: float = 25e9
    """Bytes per second that a GPU sends between nodes: 200 Gbit/s."""


@dataclass(frozen=True)
class StagePlan:
    """The rank of a pipeline stage with the most memory. All fields but `flops` are bytes."""

    sublayers: range
    """Sublayers of the stage, numbered as in pretrain/planning/activations.py."""
    flops: int
    """Forward FLOPs of one micro-batch, over the tensor-parallel ranks of the stage together."""
    towers: dict[str, MemoryUse]
    """Memory of parameters by weight shard; "shared" is one of them."""
    activations: int
    """Activations of all micro-batches in flight if no token skips a layer. This holds while depth routing
    warms up, and later for micro-batches of modalities that are not routed."""
    activations_after_warm_up: int
    """Activations at the expected ratios, with all modalities equally frequent."""
    workspace: int
    """Temporary tensors of the layer that is being computed."""
    buffers: int
    """Communication buffers, and the copy of a gradient that an update makes."""

    @property
    def parameter_memory(self) -> MemoryUse:
        """Memory of all parameters with their gradients and optimizer state."""
        return sum(self.towers.values(), MemoryUse())

    @property
    def total(self) -> int:
        """Peak bytes of the rank."""
        return self.parameter_memory.total + self.activations + self.workspace + self.buffers


@dataclass(frozen=True)
class LayoutPlan:
    """The plan of a run in one layout. `sent`: bytes of the busiest rank in an optimizer step, by axis."""

    layout: ParallelConfig
    dp: int
    micro_batches: int
    """Micro-batches of one data-parallel rank in an optimizer step."""
    stages: tuple[StagePlan, ...]
    sent: dict[str, int]
    seconds: float
    """Seconds of a step, under the assumptions of Machine."""

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def bubble_frac(self) -> float:
        """Share of a step in which a stage waits if all stages are equal: 1F1B's (pp - 1) / (m + pp - 1).

        See Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
        """
        idle = len(self.stages) - 1
        return idle / (self.micro_batches + idle)

    @property
    def imbalance(self) -> float:
        """FLOPs of the costliest stage over the mean of all stages."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)


def plan(
    config: RunConfig, gpus: int, layout: ParallelConfig | None = None, machine: Machine | None = None
) -> LayoutPlan:
    """The plan of `layout` (None: the config's), which must be legal on `gpus` ranks."""
    layout, machine = layout or config.parallel, machine or Machine()
    model, pp = config.model, layout.pp
    dp = data_parallel_size(layout, gpus)
    micro_batches = config.sequences_per_step // (dp * layout.micro_batch_sequences)
    of_sequence = tuple(sublayer_costs(model))
    bounds = _bounds(of_sequence, pp, model.whole_blocks)
    costs = [cost * layout.micro_batch_sequences for cost in of_sequence]
    stages, passes, sent_in_layers = [], [], []
    for index, flops in enumerate(stage_costs(costs, bounds)):
        sublayers = range(bounds[index], bounds[index + 1])
        stage = _stage(config, layout, dp, sublayers, min(pp - index, micro_batches), flops)
        stages.append(stage)
        recompute = sum(costs[i] for i in block_sublayers(model, sublayers)) * layout.activation_checkpointing
        sent_in_layers.append(_tensor_bytes(model, layout, sublayers, config))
        passes.append(
            (TRAIN_FACTOR * stage.flops + recompute) / layout.tp / machine.flops
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
    """The plans of all legal layouts, best first.

    Layouts that fit into `memory_bytes` come first, by estimated seconds of a step; then the others, by
    bytes.
    """
    plans = [
        plan(config, gpus, layout)
        for layout in legal_layouts(
            config.model,
            gpus,
            sequences_per_step=config.sequences_per_step,
            precision=config.precision,
            like=config.parallel,
        )
        if config.optimizer.takes(layout.zero_stage)
    ]

    def key(layout_plan: LayoutPlan) -> tuple[bool, float, int]:
        fits = memory_bytes is None or layout_plan.peak_bytes <= memory_bytes
        return (not fits, layout_plan.seconds if fits else 0.0, layout_plan.peak_bytes)

    return sorted(plans, key=key)


def weights(
    config: RunConfig, sublayers: range, tp: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(sizes of trained parameters on one of `tp` ranks, grouped and ordered as in pretrain.train.optimizer;
    sizes of frozen ones by tower)."""
    trained: dict[str, list[int]] = {}
    frozen: dict[str, list[int]] = {}

    @cache
    def groups_of(layer: Layer) -> list[list[int]]:
        """The groups, one for each shard of the layer's weight."""
        share, found = "cut" if layer.cut else "whole", []
        for shard, name in layer.names(config.model).items():
            own = settings_of(name, layer.shape, config.optimizer, config.model)
            groups, kind = (frozen, "frozen") if own is None else (trained, f"{own.kind}/{share}")
            found.append(groups.setdefault(f"{shard}/{kind}", []))
        return found

    for layer in _layers_of_stage(config.model, sublayers, numbered=tells_blocks_apart(config.optimizer)):
        for sizes in groups_of(layer):
            sizes.append(math.prod(layer.shape) // (tp if layer.cut else 1))
    return trained, frozen


def _layers_of_stage(model: ModelConfig, sublayers: range, *, numbered: bool) -> list[Layer]:
    """The layers with weights of a stage's sublayers, in the order of the decoder; unless `numbered`, all
    under the name of the first block."""
    embedding, *others = layers(model.model_copy(update={"num_layers": 1, "depth": {}}))
    halves = tuple(
        [layer for layer in others if layer.stem.startswith(f"blocks.0.{kind}")]
        for kind in ("feed_forward", "attention")
    )
    on_stage = [embedding] if 0 in sublayers else []
    for number in block_sublayers(model, sublayers):
        half = halves[number % 2]
        if number % 2:  # blocks with depth routers are whole
            half = [
                Layer(f"blocks.0.depth.{m}.weight", "depth", (model.d_model,), (model.towers[m],))
                for m in model.depth_ratios(number // 2)
            ] + half
        if numbered:
            half = [replace(i, stem=f"blocks.{(number - 1) // 2}{i.stem[8:]}") for i in half]
        on_stage += half
    last = last_sublayer(model) in sublayers
    adapters = [layer for layer in others if layer.part == "vectors"]
    if last:  # final norm, and the head unless the embedding is its weight
        on_stage += [i for i in others if i not in adapters and not i.stem.startswith("blocks.")]
    return on_stage + [layer for layer in adapters if (last if layer.leaves else 0 in sublayers)]


@lru_cache
def _bounds(costs: tuple[int, ...], stages: int, whole_blocks: tuple[int, ...]) -> tuple[int, ...]:
    """`partition`, cached because a ranking asks for few different partitions many times."""
    return partition(costs, stages, whole_blocks)


def _stage(
    config: RunConfig, layout: ParallelConfig, dp: int, sublayers: range, in_flight: int, flops: int
) -> StagePlan:
    """The plan of a stage with `in_flight` micro-batches between their forward and backward passes."""
    trained, frozen = weights(config, sublayers, layout.tp)
    shares = depth_accounting.run_shares(config.model)
    zero = {"dp": dp, "zero_stage": layout.zero_stage, "precision": config.precision}
    towers: dict[str, MemoryUse] = {}
    spec = config.optimizer.spec
    for name, sizes in trained.items():
        shard, kind, _ = name.split("/")
        state_bytes = spec.state_bytes(matrices="+muon" in kind)
        memory = engine_memory.group_memory(sizes, state_bytes=state_bytes, **zero)
        towers[shard] = towers.get(shard, MemoryUse()) + memory
    for name, sizes in frozen.items():
        shard = name.partition("/")[0]
        towers[shard] = towers.get(shard, MemoryUse()) + engine_memory.frozen_memory(sizes, **zero)
    buffers = engine_memory.buffers(trained, **zero) + engine_memory.update_copy(trained, **zero)
    matrices = {name: sizes for name, sizes in trained.items() if "+muon" in name.split("/")[1]}
    buffers += engine_memory.matrix_copies(matrices, dp=dp, tp=layout.tp, zero_stage=layout.zero_stage)
    return StagePlan(
        sublayers=sublayers,
        flops=flops,
        towers=towers,
        activations=stage_activations(config, layout, sublayers, in_flight, dict.fromkeys(shares, 1.0)),
        activations_after_warm_up=stage_activations(config, layout, sublayers, in_flight, shares),
        workspace=_workspace(config, layout, last=last_sublayer(config.model) in sublayers),
        buffers=buffers,
    )


def _workspace(config: RunConfig, layout: ParallelConfig, *, last: bool) -> int:
    """Upper bound on the temporary tensors of the layer that needs most, in its forward or backward pass.

    Feed-forward needs 5 T f b at the end of SwiGLU's backward pass, where f is the width of all experts of a
    token. Attention needs QKV's gradient twice and three fp32 copies of queries and keys. The loss needs the
    logits of a chunk, in fp32 and twice in b, and the head's gradient in fp32. Tensor-parallel ranks add the
    gathered rows.
    """
    model, b, tp = config.model, element_bytes(config.precision), layout.tp
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
    """Bytes that a rank sends its tensor-parallel peers for one micro-batch, assuming ring collectives.

    An all-gather or reduce-scatter of V = T d b bytes sends (tp - 1) / tp V, an all-reduce twice that. A
    sublayer's forward pass does one all-gather and one reduce-scatter with sequence parallel, else one
    all-reduce. Its backward pass does three collectives with sequence parallel, one of which gathers the
    input of the first matrix again, else one all-reduce. A checkpointed block runs forward a second time, in
    pre-norm up to the input of its last matrix. Embedding and head with loss do two collectives each, and the
    loss sends three fp32 numbers a token. Gradients of norms are not counted.
    """
    if layout.tp == 1:
        return 0
    tokens = layout.micro_batch_sequences * model.context_tokens
    parallel, pre = layout.sequence_parallel, model.norm_placement == "pre"
    in_blocks, last = block_sublayers(model, sublayers), last_sublayer(model) in sublayers
    steps = (5 if parallel else 4) * len(in_blocks)
    if layout.activation_checkpointing:
        steps += 2 * len(in_blocks) - pre * (1 if parallel else 2) * _num_blocks(in_blocks)
    steps += 2 * (0 in sublayers) + 2 * last
    one = tokens * model.d_model * element_bytes(config.precision) * (layout.tp - 1) // layout.tp
    return steps * one + last * (layout.tp - 1) * tokens // layout.tp * 3 * 4


def _data_bytes(
    config: RunConfig, layout: ParallelConfig, dp: int, micro_batches: int, sublayers: range
) -> int:
    """Bytes that a rank sends its data-parallel peers in a step, assuming ring collectives.

    Stage 0 does an all-reduce of gradients; stage 1 also an all-gather of parameters. Stage 2 does the
    all-reduce once a micro-batch (zero/stage_1_and_2.py:1590: buckets over several ranks' parts are reduced
    to all). Stage 3 does, per micro-batch, an all-gather of parameters forward and one backward, and a
    reduce-scatter of gradients. Gradients are sent in fp32 (communication_data_type).
    """
    trained, frozen = weights(config, sublayers, layout.tp)
    elements = sum(map(sum, trained.values()))
    b, once = element_bytes(config.precision), (dp - 1) / dp
    if layout.zero_stage == 3:
        gathered = elements + sum(map(sum, frozen.values()))
        return round(once * micro_batches * (2 * b * gathered + 4 * elements))
    reductions = micro_batches if layout.zero_stage == 2 else 1
    return round(once * elements * (2 * 4 * reductions + (b if layout.zero_stage else 0)))


def _num_blocks(sublayers: range) -> int:
    """Number of blocks that the sublayers belong to."""
    return len({(number - 1) // 2 for number in sublayers})


def _bandwidth(machine: Machine, neighbours: int) -> float:
    """Bytes per second along an axis whose ranks lie within `neighbours` successive ranks."""
    return machine.node_bytes if neighbours <= machine.node_gpus else machine.network_bytes
