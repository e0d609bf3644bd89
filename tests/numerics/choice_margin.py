"""How far the choices of a model are from turning: the least gap between scores on either side of a choice.

Where two scores are closer than rounding, another layout or processor may legally choose the other token, and
is another run from there. Tests that compare runs therefore use inputs with a margin.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.depth import DepthRouter, DepthRouting
from pretrain.models.feed_forward import ExpertFeedForward

LEAST_MARGIN = 2e-5
"""Below this, rounding might turn a choice: scores are of order 1 or less and are sums of 16 products in
fp32, so layouts and arithmetic paths leave 1e-6 of them after the steps of these tests."""


@dataclass
class Margin:
    """The least gap in all forward passes so far."""

    least: float = inf

    def add(self, gaps: Tensor) -> None:
        if gaps.numel():
            self.least = min(self.least, float(gaps.min()))


@contextmanager
def choice_margin(module: nn.Module) -> Iterator[Margin]:
    """Watch the routers of a model while it trains on one process."""
    margin, handles = Margin(), []
    for layer in module.modules():
        if isinstance(layer, DepthRouting):
            handles.append(layer.register_forward_pre_hook(_of_depth(margin)))
        elif isinstance(layer, ExpertFeedForward):
            handles.append(layer.register_forward_pre_hook(_of_experts(margin)))
    try:
        yield margin
    finally:
        for handle in handles:
            handle.remove()


def _of_depth(margin: Margin) -> Any:
    @torch.no_grad()
    def look(layer: DepthRouting, given: tuple[Tensor, Any]) -> None:
        x, inputs = given
        rows_of = dict(zip(layer.modalities, inputs.routing.modality_rows, strict=True))
        for modality, router in layer.routers().items():
            rows = slice(*rows_of[modality])
            documents = torch.from_numpy(inputs.table.documents[rows].copy())
            free = (documents >= 0) & ~torch.from_numpy(inputs.table.special[rows].copy())
            margin.add(_depth_gaps(router, x[rows][free], documents[free], inputs.routing_state))

    return look


def _depth_gaps(router: DepthRouter, x: Tensor, documents: Tensor, state: Any) -> Tensor:
    config, thresholds, scores = router.config, state.thresholds, router(x)
    if state.causal or config.rule == "threshold":
        return (scores - thresholds.get(router.name, -inf)).abs()
    ratio = config.ratio_at(router.ratio, state.progress)
    gaps = []
    for document in documents.unique():
        inside = documents == document
        gaps.append(_gap(scores[inside, None], int(int(inside.sum()) * ratio + 1e-9), x[inside]))
    return torch.cat([scores.new_empty(0), *gaps])


def _of_experts(margin: Margin) -> Any:
    @torch.no_grad()
    def look(layer: ExpertFeedForward, given: tuple[Any, ...]) -> None:
        x, routing, state = given
        pieces = x.split(routing.counts if len(layer.shards) > 1 else (x.shape[0],))
        chosen = [
            (
                f"{layer.block}.experts.{tower}",
                experts,
                piece if tokens.rows is None else piece[tokens.rows],
                tokens,
            )
            for tower, experts, piece, tokens in zip(
                layer.towers, layer.experts, pieces, routing.tokens, strict=True
            )
            if experts is not None
        ]
        logits = layer.router([piece for _, _, piece, _ in chosen])
        for (router, experts, rows, tokens), of_tower in zip(chosen, logits, strict=True):
            scores = of_tower.log_softmax(dim=1)
            if experts.routing == "token_choice":
                margin.add(_gap(scores.t(), experts.top_k))
            elif state is not None and state.causal:
                margin.add(_threshold_gaps(scores, router, state.thresholds))
            else:
                sizes = list(tokens.per_sequence)
                for piece, x in zip(scores.split(sizes), rows.split(sizes), strict=True):
                    margin.add(_gap(piece, experts.capacity(len(piece)), x))

    return look


def _threshold_gaps(scores: Tensor, router: str, thresholds: Mapping[str, float]) -> Tensor:
    of_experts = [thresholds.get(f"{router}.{expert}", -inf) for expert in range(scores.shape[1])]
    return (scores - scores.new_tensor(of_experts)).abs()


def _gap(scores: Tensor, taken: int, rows: Tensor | None = None) -> Tensor:
    """Of each column, between the last of the `taken` highest and the first that is not. No choice between
    two equal `rows` counts: their scores are one number, of which the earlier wins everywhere."""
    if not 0 < taken < scores.shape[0]:
        return scores.new_empty(0)
    ordered, order = scores.sort(dim=0, descending=True, stable=True)
    gaps = ordered[taken - 1] - ordered[taken]
    if rows is None:
        return gaps
    return gaps[(rows[order[taken - 1]] != rows[order[taken]]).any(dim=-1)]
