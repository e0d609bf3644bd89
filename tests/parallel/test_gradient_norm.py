"""Norms of gradients that ranks hold parts, copies and partitions of."""

import math

import pytest
import torch

from parallel import world
from parallel.engine import ParameterGroup
from parallel.gradient_norm import GradientNorm, Norms, _clip
from parallel.layout import ParallelConfig
from parallel.logical import LogicalTensor, mark
from parallel.testing import RanksFailed, run_on_ranks
from tests.pretrain.models.precision import assert_close

CLIP = 0.5
TP_PP = ParallelConfig(tp=2, pp=2)


def _whole_gradients(stage: int) -> dict[str, torch.Tensor]:
    """Group -> gradient of its one parameter. Tower "late" has parameters on stage 1 only."""
    generator = torch.Generator().manual_seed(stage)
    towers = ("text",) if stage == 0 else ("text", "late")
    return {
        f"{tower}/{share}": torch.randn((4, 6) if share == "cut" else (6,), generator=generator).double()
        for tower in towers
        for share in ("cut", "whole")
    }


def _expected(stages: int) -> Norms:
    squares: dict[str, float] = {}
    for stage in range(stages):
        for name, gradient in _whole_gradients(stage).items():
            tower = name.split("/")[0]
            squares[tower] = squares.get(tower, 0.0) + float(gradient.double().square().sum())
    by_tower = {tower: math.sqrt(square) for tower, square in squares.items()}
    return Norms(math.sqrt(sum(squares.values())), by_tower)


def _groups(w: world.World) -> list[ParameterGroup]:
    """This rank's parameters, with their gradients."""
    groups = []
    for name, gradient in _whole_gradients(w.pp_rank).items():
        logical = LogicalTensor(tuple(gradient.shape), 0 if name.endswith("cut") else None)
        parameter = torch.nn.Parameter(torch.zeros(logical.cut_shape(w.tp_size), dtype=torch.float64))
        parameter.grad = logical.cut(gradient, w.tp_rank, w.tp_size).clone()
        if logical.dim is not None:
            mark(parameter, logical)
        tower = name.split("/")[0]
        groups.append(
            ParameterGroup(name=name, tower=tower, params=[parameter], lr_scale=1.0, weight_decay=0.0)
        )
    return groups


def _whole(layout: ParallelConfig, broken: bool) -> tuple[Norms, list[tuple[str, torch.Tensor | None]]]:
    """As at stage 0: every rank has all of the gradient of its parts of parameters."""
    w = world.start(layout)
    groups = _groups(w)
    if broken and w.rank == 0:
        groups[0]["params"][0].grad.fill_(math.nan)  # type: ignore[union-attr]
    norm = GradientNorm(groups, w, zero_stage=0, max_grad_norm=CLIP)
    norm.begin()
    norm.before_update(torch.optim.AdamW([dict(group) for group in groups]), None, None)
    return norm.norms(None), [(group["name"], group["params"][0].grad) for group in groups]


@pytest.mark.parametrize(
    ("ranks", "layout", "stages"), [(4, TP_PP, 2), (4, ParallelConfig(tp=2), 1), (2, ParallelConfig(), 1)]
)
def test_stage_0_counts_everything_once_and_clips_by_it(
    ranks: int, layout: ParallelConfig, stages: int
) -> None:
    expected = _expected(stages)
    for rank, (norms, clipped) in enumerate(run_on_ranks(_whole, ranks, layout, False)):
        assert norms.total == pytest.approx(expected.total, rel=1e-10)
        assert norms.by_tower == pytest.approx(expected.by_tower, rel=1e-10)
        whole = _whole_gradients(rank // 2 if stages == 2 else 0)
        for name, gradient in clipped:
            part = whole[name]
            if name.endswith("cut"):
                part = part.chunk(layout.tp)[rank % layout.tp]
            # As DeepSpeed does, 1e-6 is added to the norm.
            assert_close(gradient, part * (CLIP / (expected.total + 1e-6)), name)


def test_a_gradient_that_is_not_finite_on_one_rank_is_dropped_on_all() -> None:
    for norms, gradients in run_on_ranks(_whole, 4, TP_PP, True):
        assert norms.total == math.inf
        assert {tower: math.isnan(norm) for tower, norm in norms.by_tower.items()} == {
            "text": True,
            "late": True,
        }
        assert all(gradient is None for _, gradient in gradients)


def _partitioned(layout: ParallelConfig, reported_factor: float, steps: int) -> Norms:
    """As at stages 1-3: AdamW is given one group after another, a partition over data-parallel ranks of each,
    clipped already."""
    w = world.start(layout)
    groups = _groups(w)
    expected = _expected(w.pp_size)
    norm = GradientNorm(groups, w, zero_stage=1, max_grad_norm=CLIP)
    for _ in range(steps):
        norm.begin()
        for group in groups:
            (whole,) = (parameter.grad for parameter in group["params"])
            assert whole is not None
            partition = torch.nn.Parameter(torch.zeros(whole.numel() // w.dp_size, dtype=torch.float64))
            partition.grad = whole.flatten().chunk(w.dp_size)[w.dp_rank] * CLIP / expected.total
            norm.before_update(torch.optim.AdamW([dict(group, params=[partition])]), None, None)
    return norm.norms(expected.total * reported_factor)


@pytest.mark.parametrize(("layout", "stages"), [(TP_PP, 2), (ParallelConfig(tp=2), 1)])
def test_partitions_sum_to_the_norm_before_clipping(layout: ParallelConfig, stages: int) -> None:
    expected = _expected(stages)
    for norms in run_on_ranks(_partitioned, 4, layout, 1.0, 2):
        assert norms.total == expected.total
        assert norms.by_tower == pytest.approx(expected.by_tower, rel=1e-10)


def test_no_update_is_a_gradient_that_was_not_finite() -> None:
    for norms in run_on_ranks(_partitioned, 4, TP_PP, 1.0, 0):
        assert norms.total == math.inf and all(map(math.isnan, norms.by_tower.values()))


def _applied(norm_of_deepspeed: float) -> Norms:
    """What DeepSpeed clipped by is not the norm of what was there."""
    w = world.start(ParallelConfig())
    groups = _groups(w)
    norm = GradientNorm(groups, w, zero_stage=1, max_grad_norm=100.0)
    norm.begin()
    norm.before_update(torch.optim.AdamW([dict(group) for group in groups]), None, None)
    return norm.norms(norm_of_deepspeed)


def test_a_norm_that_deepspeed_reports_wrongly_is_seen() -> None:
    right = _expected(1).total
    assert run_on_ranks(_applied, 1, right)[0].total == right
    with pytest.raises(RanksFailed, match="is a tensor-parallel parameter not marked as such"):
        run_on_ranks(_applied, 1, 1.01 * right)


@pytest.mark.parametrize(("bound", "scale"), [(10.0, 1.0), (2.5, 0.5), (0.0, 1.0)])
def test_only_a_gradient_above_the_bound_is_scaled(bound: float, scale: float) -> None:
    """Of norm 5; a bound of 0 is none."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    _clip(torch.optim.SGD([parameter], lr=1.0), 5.0, bound)
    # DeepSpeed adds 1e-6 to the norm before it divides.
    torch.testing.assert_close(parameter.grad, scale * torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)
