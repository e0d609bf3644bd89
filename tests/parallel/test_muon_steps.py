"""Muon with AdamW on one process against torch's own two optimizers."""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch

from parallel import world
from parallel.layout import ParallelConfig
from parallel.logical import LogicalTensor, mark
from parallel.muon import MuonSettings
from parallel.muon_steps import MuonWithAdamW
from parallel.testing import run_on_ranks
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.optimizer_config import OptimizerConfig
from pretrain.train.optimizer import parameter_groups
from tests.pretrain.models.random_batch import TWO_TOWERS, random_batch, tiny_config

STEPS = 10
EXPERTS = {"image": {"num_experts": 3, "routing": "token_choice", "top_k": 2}}
QKV = {"fused": [32], "parts": [16, 8, 8], "heads": [4] * 8}
"""By value of muon.qkv, rows of the matrices in a fused QKV of 4 heads and 2 x 2 of 4 features."""

View = tuple[torch.nn.Parameter, torch.nn.Parameter, Any]
"""A matrix, the parameter whose memory it shares, and where it is in the parameter."""


def _views(name: str, parameter: torch.nn.Parameter, qkv: list[int]) -> Iterator[View]:
    rows = parameter.shape[-2]
    sizes = qkv if "qkv" in name else [rows // 2] * 2 if "gate_up" in name else [rows]
    for expert in range(len(parameter)) if parameter.ndim == 3 else (...,):
        for size, stop in zip(sizes, accumulate(sizes), strict=True):
            part = (expert, slice(stop - size, stop), slice(None))
            yield torch.nn.Parameter(parameter.data[part]), parameter, part


def _torch_optimizers(
    module: Pretraining, config: OptimizerConfig
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, list[View]]:
    """Muon on views of the module's matrices, AdamW on the rest, and the views."""
    views: list[View] = []
    decayed, others = [], []
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or ".router." in name:
            others.append(parameter)
        elif "embedding" in name or "head" in name:
            decayed.append(parameter)
        else:
            views += _views(name, parameter, QKV[config.muon.qkv])
    own = config.muon
    assert own.learning_rate is not None
    muon = torch.optim.Muon(
        [view for view, _, _ in views], lr=own.learning_rate, weight_decay=0.1, momentum=own.momentum,
        nesterov=own.nesterov, ns_steps=own.ns_steps, adjust_lr_fn=own.adjust_lr,
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps,
    )  # fmt: skip
    return muon, adamw, views


@pytest.mark.parametrize(
    "muon",
    [
        {"qkv": "fused"},
        {"qkv": "parts", "adjust_lr": "original"},
        {"qkv": "heads", "nesterov": False, "momentum": 0.8, "ns_steps": 3},
    ],
    ids=str,
)
def test_ten_steps_are_those_of_torch(muon: dict[str, Any]) -> None:
    config = OptimizerConfig.model_validate(
        {"kind": "muon", "learning_rate": 1e-3, "eps": 1e-4, "muon": {"learning_rate": 2e-3, **muon}}
    )
    model = tiny_config(TWO_TOWERS, experts=EXPERTS)
    ours = Pretraining(Decoder(model, seed=2))
    theirs = copy.deepcopy(ours)
    groups = parameter_groups(ours.named_parameters(), config, model)
    optimizer = config.spec.build(
        [dict(group, lr=config.learning_rate * group["lr_scale"]) for group in groups], None
    )
    torch_muon, torch_adamw, views = _torch_optimizers(theirs, config)
    moved = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    for step in range(STEPS):
        inputs = build_inputs(random_batch(model, seed=step), model)
        for module in (ours, theirs):
            module.zero_grad()
            (module(inputs)[0] / inputs.weight).backward()
        for view, parameter, part in views:
            assert parameter.grad is not None
            view.grad = parameter.grad[part]
        optimizer.step()
        torch_muon.step()
        torch_adamw.step()
    worst = 0.0
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert not torch.equal(a, moved[name]), name
        worst = max(worst, float((a - b).detach().abs().max() / b.detach().abs().max()))
    # Measured: at most 6e-9, of AdamW's fused kernel.
    assert worst < 1e-6


LOGICAL = [
    (LogicalTensor((8, 6), 0, (4, 2, 2)), (4, 2, 2)),
    (LogicalTensor((6, 8), 1), (6,)),
    (LogicalTensor((3, 4, 6), 1, (2, 2)), (2, 2)),
    (LogicalTensor((3, 6, 2), 2), (6,)),
]
"""Matrices and stacks of experts' matrices, with rows that are orthogonalised together."""


def _gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(logical.shape, generator=generator) for logical, _ in LOGICAL]


def _partition(tensors: Sequence[torch.Tensor], rank: int, size: int) -> torch.Tensor:
    """Partition `rank` of `size` of the flat tensor that ZeRO-1 makes, padded to a multiple of 2 size."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * size)))
    return flat.chunk(size)[rank].clone()


def _step(layout: ParallelConfig, flat: bool) -> torch.Tensor:
    """This rank's partition of the weights after three steps."""
    w = world.start(layout)
    cut = lambda tensors: [  # noqa: E731
        logical.cut(tensor, w.tp_rank, w.tp_size).contiguous()
        for tensor, (logical, _) in zip(tensors, LOGICAL, strict=True)
    ]
    weights = cut(_gradients(99))
    parameters = [
        mark(torch.nn.Parameter(weight), logical)
        for weight, (logical, _) in zip(weights, LOGICAL, strict=True)
    ]
    group = {"name": "g", "params": parameters, "pieces": [rows for _, rows in LOGICAL]}
    settings = MuonSettings(momentum=0.9, nesterov=True, ns_steps=5, eps=1e-7, adjust_lr="original")
    optimizer = MuonWithAdamW(
        [group | {"lr": 0.01, "weight_decay": 0.1}], settings, betas=(0.9, 0.95), eps=1e-8, world=w
    )
    if flat:
        parameters = [torch.nn.Parameter(_partition(weights, w.dp_rank, w.dp_size))]
        optimizer.param_groups[0]["params"] = parameters
    for step in range(3):
        grads = cut(_gradients(step))
        if flat:
            grads = [_partition(grads, w.dp_rank, w.dp_size)]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    if flat:
        return parameters[0].detach()
    return _partition([parameter.detach() for parameter in parameters], 0, 1)


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_partitions_get_the_updates_of_whole_matrices_bit_for_bit(ranks: int, tp: int) -> None:
    """With 4 partitions of 52 elements the second matrix, of 48, lies in two of them."""
    (whole,) = run_on_ranks(_step, 1, ParallelConfig(), False)
    ends = [0, *accumulate(math.prod(logical.shape) for logical, _ in LOGICAL)]
    tensors = [
        whole[a:b].view(logical.shape) for a, b, (logical, _) in zip(ends, ends[1:], LOGICAL, strict=False)
    ]
    for flat in (True, False):
        found = run_on_ranks(_step, ranks, ParallelConfig(tp=tp), flat)
        for rank, values in enumerate(found):
            dp_rank, tp_rank = divmod(rank, tp)
            own = [logical.cut(t, tp_rank, tp) for t, (logical, _) in zip(tensors, LOGICAL, strict=True)]
            expected = _partition(own, dp_rank, ranks // tp) if flat else _partition(own, 0, 1)
            assert torch.equal(values, expected), (flat, rank, (values - expected).abs().max())
