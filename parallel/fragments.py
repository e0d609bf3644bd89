"""What a rank holds of every logical tensor, weights and optimizer states: found without communication.

A checkpoint is made of fragments, so it does not know the layout that wrote it. DeepSpeed's own checkpoints
do: its universal form is wrong for ZeRO-3 without an error (0.19.8: one `step` tensor for all sub-groups,
stage3.py:3664; the first group's settings given to all, :3685) and fails for ZeRO-3 with tensor parallelism.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.logical import LogicalTensor, logical_of
from parallel.optimizer import OptimizerSpec
from parallel.weight_average import EMA
from parallel.world import World

PARAMETER = "parameter"


@dataclass(frozen=True)
class Fragment:
    """A fragment is a contiguous range of this tensor-parallel rank's part of a logical tensor."""

    name: str
    """The name of the logical tensor, which is the same in every layout."""
    logical: LogicalTensor
    tp_rank: int
    tp_size: int
    start: int
    """Offset in the part's elements, flattened."""
    values: Mapping[str, Tensor]
    """kind -> 1-D view of the live tensor, equally long: PARAMETER, and the optimizer's states if it is
    trained and an update was made. PARAMETER is the fp32 master, or the model's own weights where frozen."""
    replica: int = 0
    """Which copy it is, where several ranks hold the same elements. Copy 0 is the one to save."""

    @property
    def count(self) -> int:
        """The number of elements in the range."""
        return self.values[PARAMETER].numel()


@dataclass(frozen=True)
class _Held:
    """Elements of a parameter's part from `start` on; `master` has them from `offset` on and keys states."""

    view: Tensor
    start: int
    master: Tensor | None
    offset: int
    replica: int


def local_fragments(
    deepspeed_engine: Any,
    named_parameters: Mapping[str, nn.Parameter],
    world: World,
    optimizer: OptimizerSpec,
) -> list[Fragment]:
    """This rank's fragments, ordered as `named_parameters`: name in the whole model -> parameter.

    Copy 0 of all ranks' fragments together is every element once. Serves ZeRO 0-3 and DeepSpeed's
    BF16_Optimizer, also under its pipeline engine.
    """
    states = deepspeed_engine.basic_optimizer.state
    fragments = []
    for index, (name, parameter) in enumerate(named_parameters.items()):
        held = _held(deepspeed_engine, parameter, index, world)
        if held is None:
            continue
        logical = logical_of(parameter)
        count = held.view.numel()
        # (Looking a state up in torch's defaultdict would make one.)
        state = states[held.master] if held.master is not None and held.master in states else {}
        kinds = [kind for kind in (*optimizer.states, *optimizer.matrix_states) if kind in state]
        values = {kind: state[kind].view(-1).narrow(0, held.offset, count) for kind in kinds}
        copies = 1 if logical.dim is not None else world.tp_size
        fragments.append(
            Fragment(
                name,
                logical,
                tp_rank=world.tp_rank if copies == 1 else 0,
                tp_size=world.tp_size if copies == 1 else 1,
                start=held.start,
                values={PARAMETER: held.view, **values},
                replica=held.replica * copies + (world.tp_rank if copies > 1 else 0),
            )
        )
    return fragments


def counters(deepspeed_engine: Any, optimizer: OptimizerSpec) -> dict[str, float] | None:
    """The optimizer's counters; None before its first update, when it has no states."""
    states = list(deepspeed_engine.basic_optimizer.state.values())
    if not states:
        return None
    found = {}
    for name in optimizer.counters:
        values = {float(state[name]) for state in states}
        assert len(values) == 1, f"parts of the optimizer differ in {name}: {values}"
        found[name] = values.pop()
    return found


def load_fragments(
    deepspeed_engine: Any,
    named_parameters: Mapping[str, nn.Parameter],
    world: World,
    optimizer: OptimizerSpec,
    counters: Mapping[str, float] | None,
    fill: Callable[[Sequence[Fragment]], None],
) -> None:
    """Let `fill` write into this rank's fragments, then bring the model's own weights up to date.

    `counters`: every state gets its own copy of them; None removes all states. Learning rates and other
    settings of the groups stay as they are. All ranks call it.
    """
    states = deepspeed_engine.basic_optimizer.state
    for master, group in _masters(deepspeed_engine):
        if counters is None:
            states.pop(master, None)
            continue
        state = states[master]
        if not state:
            state.update(optimizer.new_state(master, group))
        for name in optimizer.counters:
            state[name].fill_(counters[name])
    with torch.no_grad():
        fill(local_fragments(deepspeed_engine, named_parameters, world, optimizer))
    _update_weights(deepspeed_engine)


def swap_averages(deepspeed_engine: Any) -> None:
    """Exchange weights and their averages, so that forward passes use the averages; a second call undoes the
    first bit for bit. Nothing happens before the first update. All ranks call it."""
    states = deepspeed_engine.basic_optimizer.state
    with torch.no_grad():
        for master, _ in _masters(deepspeed_engine):
            average = states[master].get(EMA) if master in states else None
            if average is None:
                continue
            pairs = zip(master.view(-1).split(_SWAPPED), average.view(-1).split(_SWAPPED), strict=True)
            for weights, averaged in pairs:
                kept = weights.clone()
                weights.copy_(averaged)
                averaged.copy_(kept)
    _update_weights(deepspeed_engine)


_SWAPPED = 1 << 22
"""Elements that are exchanged at a time, of which there is a copy meanwhile."""


def _update_weights(deepspeed_engine: Any) -> None:
    """Bring the model's own weights up to date with the tensors that the optimizer updates."""
    zero = deepspeed_engine.optimizer
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2, BF16_Optimizer
        zero.update_lp_params()
    elif hasattr(zero, "fp16_groups"):  # stage 3
        zero.checkpoint_event_prologue()  # lets go of whole parameters, which are now out of date
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # makes those whole again that it keeps so


def _masters(deepspeed_engine: Any) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """The tensors that the optimizer updates, with their groups; without under stage 3, which puts them into
    its groups only while it steps."""
    flat = getattr(deepspeed_engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:
        yield from ((master, {}) for master in flat)
    else:
        for group in deepspeed_engine.basic_optimizer.param_groups:
            yield from ((master, group) for master in group["params"])


def _held(deepspeed_engine: Any, parameter: Any, index: int, world: World) -> _Held | None:
    """Where this rank keeps its share of the parameter; None where it has none. (DeepSpeed 0.19.8.)"""
    zero = deepspeed_engine.optimizer
    if hasattr(parameter, "ds_tensor"):  # stage 3: equal partitions, the last of them padded
        size = parameter.ds_tensor.numel()
        start = zero._get_param_partition_rank(parameter) * size
        count = min(size, parameter.ds_numel - start)
        if count <= 0:
            return None
        if not parameter.requires_grad:
            return _Held(parameter.ds_tensor.data.narrow(0, 0, count), start, None, 0, 0)
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        master = zero.fp32_partitioned_groups_flat[group]
        return _Held(master.detach().narrow(0, offset, count), start, master, offset, 0)
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2, BF16_Optimizer: ranges of a group's flat tensor
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        group = deepspeed_engine.basic_optimizer.param_groups[mapping.param_group_index]
        return _Held(
            mapping.hp_fragment.detach(),
            mapping.lp_fragment_address.start,
            group["params"][0],
            mapping.get_hp_fragment_address().start,
            0,
        )
    # Stage 0, or frozen: all of it on every data-parallel rank. They take turns in saving.
    replica = (world.dp_rank - index) % world.dp_size
    return _Held(parameter.data.view(-1), 0, parameter, 0, replica)
