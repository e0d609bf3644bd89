"""Depth routing of one block: a router per modality, and which tokens of the micro-batch run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from parallel.collectives import ONE_RANK, TensorParallel, of_first_rank
from pretrain.models import depth_gates
from pretrain.models.config import ModelConfig
from pretrain.models.depth_config import DepthConfig
from pretrain.models.depth_selection import ChosenTokens, TokenTable, choose_tokens, runs
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.inputs import ModelInputs
from pretrain.models.routing_state import ScoreCounts


@dataclass(frozen=True)
class Chosen:
    """What a block makes of its routers' scores."""

    tokens: ChosenTokens
    gates: Float[Tensor, "tokens 1"]
    """fp32, of all tokens; 1 for modalities without a router."""


class DepthRouter(nn.Module):
    """One vector, which scores tokens."""

    def __init__(self, config: DepthConfig, ratio: float, name: str, tower: str, eps: float) -> None:
        """`ratio`: of the layer, after warm-up. `name`: of the place, "blocks.3.depth.image"."""
        super().__init__()
        self.config, self.ratio, self.name, self.tower, self.eps = config, ratio, name, tower, eps
        self.weight = nn.ParameterDict()
        self.score_counts = (ScoreCounts(name),)

    def draw(self, d_model: int, weights: InitialWeights) -> "DepthRouter":
        """With weights as at the start of a run."""
        weight = torch.empty(d_model)
        weights.depth_router(f"{self.name}.weight", zero=self.config.zero_init)(weight)
        self.weight[self.tower] = nn.Parameter(weight)
        return self

    def forward(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " tokens"]:
        """Raw scores, fp32."""
        return depth_gates.scores(x, self.weight[self.tower], self.eps)


class DepthRouting(nn.Module):
    """The routers of one block, by modality."""

    def __init__(
        self, config: ModelConfig, index: int, weights: InitialWeights, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        super().__init__()
        self.tp, self.index, self.modalities = tp, index, config.modalities
        self.with_experts = bool(config.experts)
        for modality, ratio in config.depth_ratios(index).items():
            router = DepthRouter(
                config.depth[modality],
                ratio,
                f"blocks.{index}.depth.{modality}",
                config.towers[modality],
                config.norm_eps,
            )
            self.add_module(modality, router.draw(config.d_model, weights))
        self.style = next(iter(config.depth.values()))
        """Whose scale, parts and keys are those of all modalities."""

    def routers(self) -> Mapping[str, DepthRouter]:
        """By modality, in the order of the config."""
        return {name: module for name, module in self.named_children() if isinstance(module, DepthRouter)}

    def forward(self, x: Float[Tensor, "tokens d_model"], inputs: ModelInputs) -> Chosen:
        """Choose among the whole sorted stream. The host waits once, for the scores (depth_selection.py)."""
        table, routing_state = inputs.table, inputs.routing_state
        assert table is not None, "inputs of a model without depth routing"
        of_modality = dict(zip(self.modalities, inputs.routing.modality_rows, strict=True))
        # In the order of their rows.
        places = sorted(
            ((*of_modality[m], router) for m, router in self.routers().items()), key=lambda place: place[:2]
        )
        raw = [router(x[first:end]) for first, end, router in places]
        # All tensor-parallel ranks must choose the same, and a sum over ranks may differ in its last bit.
        ranked = of_first_rank(torch.cat(raw).detach(), self.tp).cpu().split([s.shape[0] for s in raw])
        keep: Bool[np.ndarray, " tokens"] = np.ones(x.shape[0], bool)
        ones = x.new_ones(x.shape[0], dtype=torch.float32)
        pieces, last = [], 0
        for (first, end, router), score, on_host in zip(places, raw, ranked, strict=True):
            rows = slice(first, end)
            keep[rows] = runs(
                router.config,
                on_host.numpy(),
                table.documents[rows],
                table.special[rows],
                router.config.ratio_at(router.ratio, routing_state.progress),
                threshold=routing_state.thresholds.get(router.name),
                causal=routing_state.causal,
            )
            documents = _documents(router.config, table, rows, x.device)
            pieces += [ones[last:first], depth_gates.gates(router.config, score, documents)]
            last = end
        gates = torch.cat((*pieces, ones[last:]))
        tokens = choose_tokens(
            keep,
            table,
            inputs.routing.counts,
            keys=self.style.keys if self.style.parts != "feed_forward" else "all",
            with_tokens=self.with_experts,
        )
        if inputs.ran is not None:
            ran = keep[np.argsort(table.places)].reshape(-1, table.sequence_tokens)
            inputs.ran.update({(self.index, modality): ran for modality in self.routers()})
        if self.training:
            pairs = tokens.visible_pairs
            for (first, end, router), on_host in zip(places, ranked, strict=True):
                rows = slice(first, end)
                free = (table.documents[rows] >= 0) & ~table.special[rows]
                _count(router, on_host, gates[rows], keep[rows], free, pairs)
                pairs = 0
        return Chosen(tokens.to(x.device), gates.unsqueeze(1))


@torch.no_grad()
def _count(
    router: DepthRouter, scores: Tensor, gates: Tensor, runs: np.ndarray, free: np.ndarray, pairs: int
) -> None:
    """`free`: tokens that may skip."""
    if not free.all():
        mine = torch.from_numpy(free)
        scores, gates = scores[mine], gates[mine.to(gates.device)]
    (counts,) = router.score_counts
    counts.add(scores, int(free.sum()), int((runs & free).sum()), gates.sum(), gates.square().sum(), pairs)


def _documents(config: DepthConfig, table: TokenTable, rows: slice, device: torch.device) -> Tensor | None:
    """Numbers from 0 of the documents of a modality's tokens, where its gates ask for them."""
    if config.has_causal_gate:
        return None
    return torch.from_numpy(np.unique(table.documents[rows], return_inverse=True)[1]).to(device)
