"""The ledger: parameters and FLOPs of a ModelConfig, per module and per modality. Imports no torch.

FLOPs are those of matrix products, 2 per multiply-add, as in torch.utils.flop_counter. Counted are the linear
layers, the head, and attention by the (query, key) pairs that its mask shows; not counted are the embedding
(a lookup), norms, softmax, and work done twice to save memory. A backward pass costs twice its forward pass.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pretrain.models.config import SHARED_TOWER, ModelConfig, UntiedPart

MODULES = ("embedding", "attention", "feed_forward", "norm", "head")
"""QK-norm weights belong to attention; norm is the norms of the residual stream and the final one."""

TRAIN_FACTOR = 3
"""FLOPs of forward and backward over those of forward."""


@dataclass(frozen=True)
class Cost:
    """Of one module, all layers together."""

    parameters: dict[str, int]
    """Weight shard -> its parameters."""
    flops: int
    """Forward FLOPs per token, attention's pairs left out."""


def module_costs(config: ModelConfig) -> dict[str, Cost]:
    """Cost of each of MODULES."""
    d, layers = config.d_model, config.num_layers
    attention_matrices = d * (2 * config.num_heads + 2 * config.kv_heads) * config.head_dim  # q, out; k, v
    qk_norm = 2 * config.head_dim if config.qk_norm else 0
    feed_forward = 3 * d * config.ffn_width

    def untied(part: UntiedPart, each: int) -> dict[str, int]:
        return dict.fromkeys(config.shards_of(part), each)

    table = {SHARED_TOWER: config.vocab_tokens * d}
    return {
        "embedding": Cost(table, 0),
        "attention": Cost(
            untied("attention", layers * (attention_matrices + qk_norm)), 2 * layers * attention_matrices
        ),
        "feed_forward": Cost(untied("feed_forward", layers * feed_forward), 2 * layers * feed_forward),
        "norm": Cost(untied("norm", (2 * layers + 1) * d), 0),
        "head": Cost(table, 2 * config.vocab_tokens * d),
    }


def total_parameters(config: ModelConfig) -> int:
    """All weights that are stored."""
    return sum(sum(cost.parameters.values()) for cost in module_costs(config).values())


def active_parameters(config: ModelConfig, modality: str) -> int:
    """Weights that one token of the modality meets, the whole embedding and head included."""
    tower = config.towers[modality]
    return sum(
        cost.parameters[tower if tower in cost.parameters else SHARED_TOWER]
        for cost in module_costs(config).values()
    )


def flops_per_pair(config: ModelConfig) -> int:
    """Forward FLOPs of one visible (query, key) pair over all layers: its score, and its share of the
    values."""
    return 4 * config.num_layers * config.num_heads * config.head_dim


def flops_per_token(config: ModelConfig, modality: str) -> dict[str, int]:
    """Forward FLOPs of a token of the modality in each of MODULES, attention's pairs left out.

    So far the same for every modality: all towers have one shape.
    """
    assert modality in config.towers, modality
    return {module: cost.flops for module, cost in module_costs(config).items()}


def forward_flops(config: ModelConfig, tokens: Mapping[str, int], visible_pairs: int) -> int:
    """FLOPs of a forward pass over `tokens` (modality -> count) whose masks show `visible_pairs` pairs in
    all."""
    linear = sum(
        count * sum(flops_per_token(config, modality).values()) for modality, count in tokens.items()
    )
    return linear + visible_pairs * flops_per_pair(config)


def train_flops(config: ModelConfig, tokens: Mapping[str, int], visible_pairs: int) -> int:
    """FLOPs of a forward and backward pass; arguments as in forward_flops."""
    return TRAIN_FACTOR * forward_flops(config, tokens, visible_pairs)


def sublayer_costs(config: ModelConfig, document_tokens: int | None = None) -> list[int]:
    """Forward FLOPs of one sequence in each sublayer: embedding (0), attention and feed-forward of each block
    in turn, and final norm with head.

    What pipeline stages are cut by. Attention's pairs are those of documents of `document_tokens` tokens
    (None: one document fills the context).
    """
    length = document_tokens or config.context_tokens
    costs = module_costs(config)
    tokens, layers = config.context_tokens, config.num_layers
    pairs = flops_per_pair(config) * visible_pairs([length]) * tokens // length
    block = [
        (costs["attention"].flops * tokens + pairs) // layers,
        costs["feed_forward"].flops * tokens // layers,
    ]
    return [0, *block * layers, costs["head"].flops * tokens]


def visible_pairs(document_tokens: Iterable[int]) -> int:
    """(query, key) pairs of causal attention within documents of these lengths."""
    return sum(n * (n + 1) // 2 for n in document_tokens)


def describe(config: ModelConfig, document_tokens: int | None = None) -> str:
    """Table of parameters and FLOPs, for a person. Attention's pairs are counted for documents of
    `document_tokens` tokens (None: one document fills the context)."""
    length = document_tokens or config.context_tokens
    costs = module_costs(config)
    shards = tuple(dict.fromkeys(name for cost in costs.values() for name in cost.parameters))
    towers = ", ".join(f"{modality} -> {tower}" for modality, tower in config.towers.items())
    tied = [part for part in ("attention", "feed_forward", "norm") if part not in config.untied]
    lines = [
        f"{config.num_layers} layers, d_model {config.d_model}, {config.num_heads} heads of"
        f" {config.head_dim} ({config.kv_heads} for keys and values), feed-forward {config.ffn_width},"
        f" context {config.context_tokens}, vocabulary {config.vocab_tokens}",
        f"towers: {towers}" + (f"; tied between them: {', '.join(tied)}" if tied else ""),
        "",
    ]
    rows = [["parameters", *shards, "all"]]
    for module, cost in costs.items():
        numbers = [cost.parameters.get(shard, 0) for shard in shards]
        rows.append([module, *(_count(n) for n in numbers), _count(sum(numbers))])
    sums = [sum(cost.parameters.get(shard, 0) for cost in costs.values()) for shard in shards]
    rows.append(["all", *(_count(n) for n in sums), _count(sum(sums))])
    lines += [*aligned(rows), ""]

    pair_flops = flops_per_pair(config) * visible_pairs([length]) // length
    rows = [["per token", *config.towers]]
    rows.append(["active parameters", *(_count(active_parameters(config, m)) for m in config.towers)])
    for module in MODULES:
        if costs[module].flops:
            rows.append(
                [
                    f"{module} FLOPs",
                    *(_count(flops_per_token(config, modality)[module]) for modality in config.towers),
                ]
            )
    rows.append(["attention pairs FLOPs", *(_count(pair_flops) for _ in config.towers)])
    forward = [sum(flops_per_token(config, modality).values()) + pair_flops for modality in config.towers]
    rows.append(["forward FLOPs", *(_count(n) for n in forward)])
    rows.append(["training FLOPs", *(_count(TRAIN_FACTOR * n) for n in forward)])
    lines += [*aligned(rows), "", f"attention pairs: causal, in documents of {length} tokens"]
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number:,}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
