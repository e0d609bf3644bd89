"""The engine of one pipeline stage: DeepSpeed's ZeRO 0-3 around a torch AdamW."""

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from parallel.deepspeed_config import deepspeed_config
from parallel.engine import AdamWSettings, LayoutMismatch, MicroBatch, ParameterGroup, StepResult
from parallel.world import World

_TAG = "engine"
_LAYOUT_FILE = "layout.json"


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
        settings: AdamWSettings,
        learning_rate_at: Callable[[int], float],
        zero_stage: Literal[0, 1, 2, 3] = 1,
        precision: Literal["fp32", "bf16"] = "fp32",
        micro_batch_sequences: int = 1,
        accumulation_steps: int = 1,
        persistent_elements: int = 100_000,
    ) -> None:
        """`learning_rate_at(step)`: the rate of the step that `step` others came before."""
        import deepspeed

        self.world = world
        self.settings = settings
        self.learning_rate_at = learning_rate_at
        self.zero_stage = zero_stage
        self.precision = precision
        self.accumulation_steps = accumulation_steps
        self.towers = {group["name"]: group["tower"] for group in groups}
        _check_groups(module, groups)
        config = deepspeed_config(
            zero_stage=zero_stage,
            precision=precision,
            micro_batch_sequences=micro_batch_sequences,
            accumulation_steps=accumulation_steps,
            clip_norm=settings.clip_norm,
            persistent_elements=persistent_elements,
        )
        self.adamw = torch.optim.AdamW(
            [dict(group, lr=0.0) for group in groups],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        self._squares: dict[str, torch.Tensor] = {}
        self.adamw.register_step_pre_hook(self._before_update)
        with _unasked_prints_dropped():
            self.deepspeed, *_ = deepspeed.initialize(
                model=module.to(world.device),
                optimizer=self.adamw,
                config=config,
                mpu=world.mpu,
                dist_init_required=False,
            )

    def train_step(self, micro_batches: Sequence[MicroBatch], step: int) -> StepResult:
        assert len(micro_batches) == self.accumulation_steps, (len(micro_batches), self.accumulation_steps)
        weight = self.world.sum_over_dp([sum(batch.weight for batch in micro_batches)])[0]
        if not weight > 0:
            raise ValueError(
                f"step {step}: the loss weights of the global batch sum to {weight}; nothing to learn"
            )
        learning_rate = self.learning_rate_at(step)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        self._squares = {}
        self.deepspeed.train()
        local: list[torch.Tensor] = []
        for batch in micro_batches:
            objective_sum, stats = self.deepspeed(batch.to(self.world.device))
            # The one normalisation: DeepSpeed averages over data-parallel ranks, hence the factor dp.
            self.deepspeed.backward(objective_sum * (self.world.dp_size / weight), scale_wrt_gas=False)
            local.append(stats.double())
            self.deepspeed.step()
        return self._result(torch.stack(local), weight, learning_rate)

    def eval_step(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        if self.zero_stage == 3:  # a forward pass gathers parameters: unequal numbers of them would hang
            counts = self.world.gather(len(micro_batches))
            if len(set(counts)) != 1:
                raise ValueError(f"ranks bring different numbers of micro-batches to an evaluation: {counts}")
        self.deepspeed.eval()
        total: torch.Tensor | None = None
        with torch.no_grad():
            for batch in micro_batches:
                _, stats = self.deepspeed(batch.to(self.world.device))
                total = stats.double() if total is None else total + stats
        self.deepspeed.train()
        assert total is not None, "an evaluation needs a micro-batch"
        return self.world.sum_over_dp(total.tolist())

    def save(self, folder: Path) -> None:
        self.deepspeed.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        if self.world.rank == 0:
            (folder / _TAG / _LAYOUT_FILE).write_text(json.dumps(self.layout, indent=1) + "\n")
        self.world.barrier()

    def load(self, folder: Path) -> None:
        theirs = json.loads((folder / _TAG / _LAYOUT_FILE).read_text())
        if theirs != self.layout:
            changed = [name for name in self.layout if theirs.get(name) != self.layout[name]]
            raise LayoutMismatch(
                f"{folder} was written by another layout: "
                + ", ".join(f"{name} = {theirs.get(name)} (now {self.layout[name]})" for name in changed)
                + ". This version resumes only on the layout that wrote a checkpoint: go back to it"
            )
        with _unasked_prints_dropped():
            loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=_TAG)
        assert loaded is not None, folder

    @property
    def layout(self) -> dict[str, Any]:
        return {
            "dp": self.world.dp_size,
            "tp": self.world.tp_size,
            "pp": self.world.pp_size,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
            "groups": list(self.towers),
        }

    def _before_update(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Runs before AdamW, for all groups at once (stage 0) or one after another: their sums of squares.

        Stages 1-3 come here with this rank's partition of the gradient, already clipped. At stage 0 the
        whole, unclipped gradient is here, and is clipped, or dropped where it is not finite.
        """
        grads = []
        for group in optimizer.param_groups:
            found = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if found:
                grads += found
                squares = (
                    torch.stack([torch.linalg.vector_norm(grad.float()) for grad in found]).square().sum()
                )
                self._squares[group["name"]] = self._squares.get(group["name"], 0.0) + squares.double()
        if self.zero_stage > 0:
            return
        norm = math.sqrt(torch.stack(list(self._squares.values())).sum().item())
        if not math.isfinite(norm):
            self._squares = {}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW passes such parameters over
        elif 0 < self.settings.clip_norm < norm:
            for grad in grads:
                grad.mul_(self.settings.clip_norm / (norm + 1e-6))

    def _result(self, local: torch.Tensor, weight: float, learning_rate: float) -> StepResult:
        """`local`: float64 [micro-batches, stats] of this rank."""
        stats = local.sum(dim=0)
        names = list(self.towers)
        zero = stats.new_zeros(())
        squares = torch.stack([self._squares.get(name, zero) for name in names])
        if self.zero_stage == 0:  # whole gradients: every data-parallel rank has the same sums
            squares = squares / self.world.dp_size
        both = self.world.sum_over_dp(torch.cat([stats, squares]).tolist())
        sums, squares_of = both[: len(stats)], dict(zip(names, both[len(stats) :], strict=True))
        by_tower = {tower: 0.0 for tower in self.towers.values()}
        for name, value in squares_of.items():
            by_tower[self.towers[name]] += value
        updated = len(self._squares) > 0
        norm = math.sqrt(sum(squares_of.values())) if updated else math.inf
        unclip = 1.0
        if self.zero_stage > 0 and updated:
            reported = float(self.deepspeed.get_global_grad_norm() or 0.0)
            unclip = reported / norm if norm > 0 else 1.0
            norm = reported
        return StepResult(
            stats=sums,
            local_stats=local.tolist(),
            weight=weight,
            grad_norm=norm if math.isfinite(norm) else math.inf,
            grad_norm_by_group={
                tower: math.sqrt(value) * unclip if updated else math.nan for tower, value in by_tower.items()
            },
            learning_rate=learning_rate,
        )


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
