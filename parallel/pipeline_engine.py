"""This engine trains several pipeline stages with DeepSpeed's PipelineModule and 1F1B schedule, ZeRO 0-1."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engine import MicroBatch, ParameterGroup
from parallel.world import World
from parallel.zero_engine import ZeroEngine


class PipelineEngine(ZeroEngine):
    """As ZeroEngine, where `module` is this rank's stage alone: module(micro_batch, hidden).

    `hidden` [rows, features] is what the stage before returned, None on the first stage; the last stage
    returns (objective_sum, stats, report), the others (hidden, what they add to objective_sum, or None,
    report). The sum of all their parts is minimised. Nothing but hidden travels between stages: every rank of
    a data-parallel coordinate brings the same micro-batches to a step, of one shape in the whole run, and the
    k-th forward pass of a stage is that of micro-batch k, in 1F1B as in evaluation.
    """

    def _absent_groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """ZeRO-1 sums the norm over stages group by group: unequal numbers of groups would hang (DeepSpeed
        0.19.8, runtime/zero/stage_1_and_2.py, scaled_global_norm)."""
        mine = [group["name"] for group in groups]
        missing = sorted({name for names in self.world.gather(mine) for name in names} - set(mine))
        self.placeholders = nn.ParameterList(torch.zeros(1) for _ in missing)
        return [
            ParameterGroup(name=name, tower="", params=[placeholder], lr_scale=0.0, weight_decay=0.0)
            for name, placeholder in zip(missing, self.placeholders, strict=True)
        ]

    def _initialise(self, module: nn.Module, config: dict[str, Any]) -> Any:
        import deepspeed
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        world = self.world
        self.stage = _Stage(module, self.placeholders, world)
        # One layer a stage, so that the cuts are ours. Only the entry of this rank's stage is looked at.
        model = PipelineModule(
            [self.stage] * world.pp_size,
            topology=PipeModelDataParallelTopology(world.pp_size, world.tp_size, world.dp_size),
            partition_method="uniform",
        )
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.torch_optimizer, config=config, dist_init_required=False
        )
        return engine

    def _train(self, micro_batches: Sequence[MicroBatch], weight: float) -> tuple[list[Tensor], Any]:
        # DeepSpeed averages over data-parallel ranks and over micro-batches.
        scale = self.world.dp_size * len(micro_batches) / weight
        self.stage.bring(micro_batches, scale)
        for placeholder in self.placeholders:  # in bf16 a rank must count at least one gradient
            placeholder.tensor_model_parallel = True  # type: ignore[attr-defined]  # or only the first would
            placeholder.grad = torch.zeros_like(placeholder)
        self.deepspeed.train_batch(self._nothing())
        return self.stage.stats, self.stage.report

    def _local_stats(self) -> Sequence[Tensor]:
        return self.stage.stats

    def _evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], Any]:
        self.stage.bring(micro_batches, 1.0)
        self.deepspeed.eval_batch(
            self._nothing(), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
        )
        return self.stage.stats, self.stage.report

    def _nothing(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What DeepSpeed's loader gives for each micro-batch: our stages have theirs already."""
        nothing = torch.empty(0, device=self.world.device)
        return repeat((nothing, nothing))

    def _sum_stats(self, local: Sequence[Tensor]) -> list[float]:
        last = self.world.pp_rank == self.world.pp_size - 1
        return self.world.broadcast(
            super()._sum_stats(local) if last else None, source_rank=self.world.world_size - 1
        )


class _Stage(nn.Module):
    """The one layer that DeepSpeed sees: brings the module its micro-batches, in the order of the passes."""

    def __init__(self, module: nn.Module, placeholders: nn.ParameterList, world: World) -> None:
        """`placeholders`: parameters that DeepSpeed is to find, and that nothing depends on."""
        super().__init__()
        self.module = module
        self.placeholders = placeholders
        self.device = world.device
        self.is_first, self.is_last = world.pp_rank == 0, world.pp_rank == world.pp_size - 1
        self.stats: list[Tensor] = []
        self.report: Any = None
        self.shape: torch.Size | None = None

    def bring(self, micro_batches: Sequence[MicroBatch], scale: float) -> None:
        """For the passes to come. The objective is multiplied by `scale`, before DeepSpeed averages over
        them: what the last stage returns, and so the gradients that it sends."""
        self.micro_batches, self.scale = iter(micro_batches), scale
        self.stats, self.report = [], None
        self.scale_of_own = scale / len(micro_batches)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden for the next stage; on the last the scaled objective. DeepSpeed's schedule passes on nothing
        else, so stats and report are left in `stats` and `report`."""
        micro_batch = next(self.micro_batches).to(self.device)
        result, other, report = self.module(micro_batch, None if self.is_first else hidden)
        self.report = report if self.report is None else self.report + report
        if self.is_last:
            self.stats.append(other.double())
            return result * self.scale
        if other is not None:
            result = _AlsoMinimise.apply(result, other * self.scale_of_own)
        # The next stage allocates once: another shape would be read wrongly there, or hang.
        assert self.shape in (None, result.shape), (self.shape, result.shape)
        self.shape = result.shape
        if torch.is_grad_enabled() and not result.requires_grad:
            # All before it is frozen, but DeepSpeed runs a backward pass on every stage: it ends here.
            result.requires_grad_()
        return result


class _AlsoMinimise(torch.autograd.Function):
    """`hidden`, whose backward pass is also that of `objective`, on which no later stage depends (the way of
    megatron-core 0.16.1's MoEAuxLossAutoScaler, transformer/moe/moe_utils.py)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, objective: Tensor) -> Tensor:
        ctx.one = torch.ones_like(objective)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, ctx.one
