"""Which expert of a tower's feed-forward computes which token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.collectives import ONE_RANK, TensorParallel, of_first_rank
from parallel.dispatch import ExpertAssignment
from parallel.precision import at_least_fp32
from parallel.routing import TowerTokens
from parallel.towers import Initialise
from pretrain.models.experts_config import ExpertsConfig
from pretrain.models.router_report import ExpertCounts, score_histogram


class Router(nn.Module):
    """For each tower with experts the logits w x / rms(x) of its tokens, in fp32. Divided by the root mean
    square of x, they do not grow with the residual stream.

    In one product equal rows get equal logits from four experts on (in all of 840 products measured on a
    CPU); of three or fewer a last bit may decide between equal rows (in 11 to 42 of 168 products).
    """

    def __init__(
        self, num_experts: Mapping[str, int], d_model: int, eps: float, initialise: Initialise
    ) -> None:
        """`num_experts`: of each weight shard that has experts."""
        super().__init__()
        self.eps = eps
        self.weight = nn.ParameterDict()
        for shard, count in num_experts.items():
            whole = torch.empty(count, d_model)
            initialise(whole, shard)
            self.weight[shard] = nn.Parameter(whole)

    def forward(self, pieces: Sequence[Float[Tensor, "tokens d_model"]]) -> tuple[Tensor, ...]:
        """`pieces`: tokens of each of those towers. Returns the logits [tokens, experts] of each."""
        found = []
        for x, weight in zip(pieces, self.weight.values(), strict=True):
            wide = at_least_fp32(x)
            inverse_rms = wide.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
            # Behind the product: a normalised copy of x would be kept for the backward pass.
            found.append(wide.mm(at_least_fp32(weight).t()) * inverse_rms)
        return tuple(found)


@dataclass(frozen=True)
class Choice:
    """Which tokens the experts of one tower and layer take."""

    assignment: ExpertAssignment
    gates: Float[Tensor, " dispatched"]
    """fp32: the weight of each dispatched row in the sum over its token's experts."""
    counts: ExpertCounts
    """The auxiliary losses in it have a gradient."""


def assign(
    config: ExpertsConfig,
    logits: Float[Tensor, "tokens experts"],
    tokens: TowerTokens,
    *,
    thresholds: Sequence[float] | None = None,
    counts_on_device: bool = False,
    tp: TensorParallel = ONE_RANK,
) -> Choice:
    """Assign tokens to experts from router logits of a tower's tokens, padding left out; the same on all
    ranks of `tp`.

    `thresholds`: instead of expert choice, each expert takes the tokens whose score is at least its own.
    `counts_on_device`: under token choice the device is not asked for numbers of rows (see
    `ExpertAssignment`).
    """
    probabilities = logits.softmax(dim=1)
    # Ranks that hold equal numbers may still differ in a last bit, and then in what they choose.
    scores = of_first_rank(logits.detach().log_softmax(dim=1), tp)
    if thresholds is not None:
        expert, token = (scores >= scores.new_tensor(thresholds)).t().nonzero().unbind(1)
        gates, per_expert = probabilities[token, expert], _count(expert, config.num_experts)
        counts = tuple(map(int, per_expert.tolist()))
    elif config.routing == "expert_choice":
        chosen = best_tokens(config, scores, tokens.per_sequence)
        counts = (chosen.shape[1],) * config.num_experts
        gates, token, per_expert = probabilities.t().gather(1, chosen).flatten(), chosen.flatten(), None
    else:
        gates, token, per_expert = _best_experts(config, probabilities, scores)
        counts = None if counts_on_device else tuple(map(int, per_expert.tolist()))
    if per_expert is None:
        per_expert = torch.tensor(counts, device=logits.device)
    untaken = torch.ones_like(scores[:, 0], dtype=torch.int64).index_fill_(0, token, 0).sum()
    load_balance, router_z = _auxiliary(config, logits, probabilities, scores, tokens.per_sequence)
    rows = token if tokens.rows is None else tokens.rows[token]
    return Choice(
        ExpertAssignment(
            rows=(rows,) if counts is None else rows.split(counts),
            ends=per_expert.cumsum(0).to(torch.int32),
            counts=counts,
        ),
        gates,
        ExpertCounts(
            # Token choice needs no thresholds, hence no bins.
            histogram=per_expert.new_zeros(config.num_experts, 0)
            if config.causal
            else score_histogram(scores.t()),
            taken=per_expert,
            tokens=torch.tensor(scores.shape[0]),
            dropped=untaken,
            load_balance=load_balance,
            router_z=router_z,
        ),
    )


def best_tokens(
    config: ExpertsConfig, scores: Float[Tensor, "tokens experts"], per_sequence: Sequence[int]
) -> Int[Tensor, "experts taken"]:
    """Expert choice: of each sequence the tokens that an expert scores highest, the earlier of equals."""
    found, start = [], 0
    for piece in scores.split(list(per_sequence)):
        # A stable sort, since topk leaves it open which of equals it takes.
        order = piece.sort(dim=0, descending=True, stable=True).indices
        found.append(order[: config.capacity(len(piece))].t() + start)
        start += len(piece)
    return torch.cat(found, dim=1)


def best_experts(config: ExpertsConfig, scores: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens k"]:
    """Token choice: the experts of highest score, the first of equals."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, : config.top_k]


def _best_experts(config: ExpertsConfig, probabilities: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    """Token choice: gate and token of each dispatched row, tokens of each expert."""
    experts = best_experts(config, scores)
    gates = probabilities.gather(1, experts)
    if config.top_k > 1:
        gates = gates / gates.sum(dim=1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    return gates.flatten()[order], order // config.top_k, _count(experts, config.num_experts)


def _count(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert is there; unlike bincount without asking a GPU for the highest."""
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    return zeros.scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))


def _auxiliary(
    config: ExpertsConfig, logits: Tensor, probabilities: Tensor, scores: Tensor, per_sequence: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sums over tokens. A sequence of n tokens is balanced by itself, so that no layout changes the loss: n
    times num_experts sum_e f_e P_e, f the share of its choices, P its mean probability (Switch, eq. 4-6)."""
    balance = z = logits.new_zeros(())
    if config.router_z:
        z = logits.logsumexp(dim=1).square().sum()
    if config.load_balance:
        experts = best_experts(config, scores).split(list(per_sequence))
        for chosen, p in zip(experts, probabilities.split(list(per_sequence)), strict=True):
            share = _count(chosen, config.num_experts).to(p.dtype) / max(chosen.numel(), 1)
            balance = balance + config.num_experts * (share * p.sum(dim=0)).sum()
    return balance, z
