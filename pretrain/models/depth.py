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
from pretrain.models.router_report import BlockReport, DepthCounts, score_histogram


@dataclass(frozen=True)
class Chosen:
    """The tokens of a micro-batch that run in a block, and the gates of all its tokens."""

    tokens: ChosenTokens
    gates: Float[Tensor, "tokens 1"]
    """fp32; 1 for modalities without a router."""


class DepthRouter(nn.Module):
    """The router of one modality in one block: a vector that scores tokens."""

    def __init__(self, config: DepthConfig, ratio: float, name: str, tower: str, eps: float) -> None:
        """`ratio`: that of the layer after warm-up. `name`: "blocks.3.depth.image"."""
        super().__init__()
        self.config, self.ratio, self.name, self.tower, self.eps = config, ratio, name, tower, eps
        self.weight = nn.ParameterDict()

    def draw(self, d_model: int, weights: InitialWeights) -> "DepthRouter":
        """The same router with its initial weight."""
        weight = torch.empty(d_model)
        weights.depth_router(f"{self.name}.weight", zero=self.config.zero_init)(weight)
        self.weight[self.tower] = nn.Parameter(weight)
        return self

    def forward(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " tokens"]:
        """Raw scores, fp32."""
        return depth_gates.scores(x, self.weight[self.tower], self.eps)


class DepthRouting(nn.Module):
    """The depth routers of one block, one for each modality that has a ratio in the layer."""

    def __init__(
        self, config: ModelConfig, index: int, weights: InitialWeights, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        super().__init__()
        self.tp, self.modalities = tp, config.modalities
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
        self.config = config.depth_block

    def routers(self) -> Mapping[str, DepthRouter]:
        """Modality -> its router, in the order of the config."""
        return {name: module for name, module in self.named_children() if isinstance(module, DepthRouter)}

    def forward(self, x: Float[Tensor, "tokens d_model"], inputs: ModelInputs) -> tuple[Chosen, BlockReport]:
        """Choose among the whole sorted stream. The host waits once, for the scores (depth_selection.py)."""
        table, routing_state = inputs.table, inputs.routing_state
        assert table is not None, "inputs of a model without depth routing"
        of_modality = dict(zip(self.modalities, inputs.routing.modality_rows, strict=True))
        # Routers in the order of their tokens' rows.
        routers = sorted(
            ((*of_modality[m], m, router) for m, router in self.routers().items()), key=lambda row: row[:2]
        )
        raw = [router(x[first:end]) for first, end, _, router in routers]
        # All tensor-parallel ranks must choose the same, and a sum over ranks may differ in its last bit.
        ranked = of_first_rank(torch.cat(raw).detach(), self.tp).cpu().split([s.shape[0] for s in raw])
        keep: Bool[np.ndarray, " tokens"] = np.ones(x.shape[0], bool)
        ones = x.new_ones(x.shape[0], dtype=torch.float32)
        pieces, last = [], 0
        for (first, end, _, router), score, on_host in zip(routers, raw, ranked, strict=True):
            rows = slice(first, end)
            keep[rows] = runs(
                router.config,
                on_host.numpy(),
                table.documents[rows],
                table.special[rows],
                router.config.ratio_at(router.ratio, routing_state.progress),
                threshold=routing_state.thresholds.get(router.name),
                causal=routing_state.causal and not routing_state.own_depth_rule,
            )
            documents = _documents(router.config, table, rows, x.device)
            pieces += [ones[last:first], depth_gates.gates(router.config, score, documents)]
            last = end
        gates = torch.cat((*pieces, ones[last:]))
        tokens = choose_tokens(
            keep,
            table,
            inputs.routing.counts,
            keys=self.config.keys,
            with_tokens=self.with_experts,
            past=inputs.mask.past,
        )
        counts = {
            modality: _counts(on_host, gates[first:end], keep[first:end], table, slice(first, end))
            for (first, end, modality, _), on_host in zip(routers, ranked, strict=True)
        }
        ran = ()
        if inputs.report_ran:
            ran = (keep[np.argsort(table.offsets)].reshape(-1, table.sequence_tokens),)
        report = BlockReport(
            visible_pairs=torch.tensor(tokens.visible_pairs),
            depth=counts,
            ran=ran,
        )
        return Chosen(tokens.to(x.device), gates.unsqueeze(1)), report


@torch.no_grad()
def _counts(scores: Tensor, gates: Tensor, runs: np.ndarray, table: TokenTable, rows: slice) -> DepthCounts:
    """Counts over the tokens of `rows` that may skip; `scores` are on the host, `gates` on the device."""
    free = (table.documents[rows] >= 0) & ~table.special[rows]
    if not free.all():
        may_skip = torch.from_numpy(free)
        scores, gates = scores[may_skip], gates[may_skip.to(gates.device)]
    return DepthCounts(
        histogram=score_histogram(scores),
        tokens=torch.tensor(int(free.sum())),
        run=torch.tensor(int((runs & free).sum())),
        gate=gates.sum(),
        gate_squared=gates.square().sum(),
    )


def _documents(config: DepthConfig, table: TokenTable, rows: slice, device: torch.device) -> Tensor | None:
    """Number of each token's document, from 0, for a modality whose gates are a softmax over the document;
    None for other gates."""
    if config.has_causal_gate:
        return None
    return torch.from_numpy(np.unique(table.documents[rows], return_inverse=True)[1]).to(device)
