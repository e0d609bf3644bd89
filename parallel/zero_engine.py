"""The engine of one pipeline stage: DeepSpeed's ZeRO 0-3 around a torch optimizer."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from parallel.deepspeed_config import PERSISTENT_ELEMENTS, deepspeed_config
from parallel.engine import MicroBatch, NothingToLearn, ParameterGroup, Refuse, StepResult
from parallel.fragments import Fragment, counters, load_fragments, local_fragments, swap_averages
from parallel.gradient_norm import GradientNorm
from parallel.layout import Precision
from parallel.optimizer import OptimizerSpec
from parallel.refusal import Refusal
from parallel.world import World


class ZeroEngine:
    """See parallel.engine.Engine.

    Every trainable parameter of the module must be in one group and get a gradient, if only of zeros, in
    every backward pass on every rank: ZeRO's collectives follow the parameters.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        groups: Sequence[ParameterGroup],
        world: World,
        *,
        optimizer: OptimizerSpec,
        max_grad_norm: float,
        learning_rate_at: Callable[[int], float],
        zero_stage: Literal[0, 1, 2, 3] = 1,
        precision: Precision = "fp32",
        micro_batch_sequences: int = 1,
        accumulation_steps: int = 1,
        persistent_elements: int = PERSISTENT_ELEMENTS,
        prefix: str = "",
    ) -> None:
        """`learning_rate_at(step)`: the rate of the step that `step` others came before. `max_grad_norm`: the
        gradient is scaled down to this global norm; 0 leaves it as it is. `prefix`: what the module puts
        before the names that its parameters have in every layout."""
        self.world, self.module, self.optimizer = world, module, optimizer
        self.learning_rate_at = learning_rate_at
        self.zero_stage = zero_stage
        self.precision = precision
        self.accumulation_steps = accumulation_steps
        self._stats: list[torch.Tensor] = []
        self.named_parameters = {
            name.removeprefix(prefix): parameter for name, parameter in module.named_parameters()
        }
        _check_groups(module, groups)
        config = deepspeed_config(
            zero_stage=zero_stage,
            precision=precision,
            micro_batch_sequences=micro_batch_sequences,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            persistent_elements=persistent_elements,
        )
        self.torch_optimizer = optimizer.build(
            [dict(group, lr=0.0) for group in (*groups, *self._absent_groups(groups))], world
        )
        self.gradient_norm = GradientNorm(groups, world, zero_stage=zero_stage, max_grad_norm=max_grad_norm)
        self.torch_optimizer.register_step_pre_hook(self.gradient_norm.before_update)
        self.refusal = Refusal()
        self.torch_optimizer.register_step_pre_hook(self.refusal.before_update)
        with _unasked_prints_dropped():
            self.deepspeed = self._initialise(module, config)

    def _absent_groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """What stands for groups that other ranks have and this one has not."""
        return ()

    def _initialise(self, module: torch.nn.Module, config: dict[str, Any]) -> Any:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=module.to(self.world.device),
            optimizer=self.torch_optimizer,
            config=config,
            mpu=self.world.mpu,
            dist_init_required=False,
        )
        return engine

    def train_step(
        self, micro_batches: Sequence[MicroBatch], step: int, refuse: Refuse | None = None
    ) -> StepResult:
        assert len(micro_batches) == self.accumulation_steps, (len(micro_batches), self.accumulation_steps)
        weight = self.world.sum_over_dp([sum(batch.weight for batch in micro_batches)])[0]
        if not weight > 0:
            raise NothingToLearn(
                f"step {step + 1}: the loss weights of the global batch sum to {weight}; nothing to learn"
            )
        learning_rate = self.learning_rate_at(step)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self.gradient_norm.begin()
        self.refusal.begin(None if refuse is None else self._ask(refuse))
        self.deepspeed.train()
        local, report = self._train(micro_batches, weight)
        stats = self._sum_stats(local)
        norms = self.gradient_norm.norms(self._reported_norm())
        return StepResult(
            stats=stats,
            local_stats=[each.tolist() for each in local],
            weight=weight,
            grad_norm=norms.total,
            grad_norm_by_group=norms.by_tower,
            learning_rate=learning_rate,
            report=report,
            applied=math.isfinite(norms.total) and not self.refusal.refused,
        )

    def _ask(self, refuse: Refuse) -> Callable[[], bool]:
        """Return a function that asks `refuse` about a step whose gradient is complete. All ranks call it."""

        def ask() -> bool:
            norm = self.gradient_norm.before_clipping(self._reported_norm())
            return refuse(self._sum_stats(self._local_stats()), norm)

        return ask

    def _reported_norm(self) -> float | None:
        """DeepSpeed's global norm of the gradient, which it knows before it updates; None at stage 0."""
        if self.zero_stage == 0:
            return None
        return float(self.deepspeed.optimizer._global_grad_norm or 0.0)  # a tensor in stages 1 and 2

    def _local_stats(self) -> Sequence[torch.Tensor]:
        """The stats of the micro-batches that `_train` has had so far."""
        return self._stats

    def _train(self, micro_batches: Sequence[MicroBatch], weight: float) -> tuple[list[torch.Tensor], Any]:
        """Forward and backward passes and the update; returns the stats of each micro-batch, in float64, and
        the sum of their reports."""
        local = self._stats = []
        total: Any = None
        for batch in micro_batches:
            objective_sum, stats, report = self.deepspeed(batch.to(self.world.device))
            total = report if total is None else total + report
            # The one normalisation: DeepSpeed averages over data-parallel ranks, hence the factor dp.
            self.deepspeed.backward(objective_sum * (self.world.dp_size / weight), scale_wrt_gas=False)
            local.append(stats.double())
            self.deepspeed.step()
        return local, total

    def eval_step(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[float], Any]:
        if self.zero_stage == 3:  # a forward pass gathers parameters: unequal numbers of them would hang
            counts = self.world.gather(len(micro_batches))
            if len(set(counts)) != 1:
                raise ValueError(f"ranks bring different numbers of micro-batches to an evaluation: {counts}")
        self.deepspeed.eval()
        assert micro_batches, "an evaluation needs a micro-batch"
        local, report = self._evaluate(micro_batches)
        self.deepspeed.train()
        return self._sum_stats(local), report

    def _evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[torch.Tensor], Any]:
        """Forward passes; returns the stats of each micro-batch, in float64, and the sum of their reports."""
        local: list[torch.Tensor] = []
        total: Any = None
        with torch.no_grad():
            for batch in micro_batches:
                _, stats, report = self.deepspeed(batch.to(self.world.device))
                total = report if total is None else total + report
                local.append(stats.double())
        return local, total

    def _sum_stats(self, local: Sequence[torch.Tensor]) -> list[float]:
        """Return stats summed over micro-batches and data-parallel ranks; all ranks get equal sums."""
        return self.world.sum_over_dp(torch.stack(list(local)).sum(dim=0).tolist())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, forward passes use the averages of weights (parallel/weight_average.py), and `fragments`
        have the two exchanged. All ranks enter and leave it. After an error the two stay exchanged."""
        swap_averages(self.deepspeed)
        yield
        swap_averages(self.deepspeed)

    def fragments(self) -> list[Fragment]:
        return local_fragments(self.deepspeed, self.named_parameters, self.world, self.optimizer)

    def counters(self) -> dict[str, float] | None:
        return counters(self.deepspeed, self.optimizer)

    def load(self, counters: Mapping[str, float] | None, fill: Callable[[Sequence[Fragment]], None]) -> None:
        load_fragments(self.deepspeed, self.named_parameters, self.world, self.optimizer, counters, fill)

    @property
    def layout(self) -> dict[str, Any]:
        return {
            "dp": self.world.dp_size,
            "tp": self.world.tp_size,
            "pp": self.world.pp_size,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
        }


def _unasked_prints_dropped() -> contextlib.AbstractContextManager[object]:
    """runtime/bf16_optimizer.py prints memory sizes and names of its functions; errors come as exceptions."""
    return contextlib.redirect_stdout(io.StringIO())


def _check_groups(module: torch.nn.Module, groups: Sequence[ParameterGroup]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in set(grouped)]
    assert not missing, f"trainable parameters in no group: {missing}"
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) <= trainable.keys(), "a group holds a frozen or foreign parameter"
    assert len({group["name"] for group in groups}) == len(groups), [group["name"] for group in groups]
