"""The ledger: parameters and FLOPs of a ModelConfig, per module and per modality. Imports no torch.

FLOPs are those of matrix products, 2 per multiply-add, as in torch.utils.flop_counter. Counted are the linear
layers, the head, the adapters of vectors, and attention by the (query, key) pairs that its mask shows; not
counted are the embedding (a lookup), norms, softmax, and work done twice to save memory. A backward pass
costs twice its forward pass, but for layers whose input needs no gradient.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from pretrain.models import depth_accounting, vectors_accounting
from pretrain.models.config import SHARED_TOWER, ModelConfig, Norm, Part
from pretrain.models.depth_accounting import Skipped

MODULES = ("embedding", "attention", "feed_forward", "norm", "head")
"""QK-norm weights and biases of queries, keys and values belong to attention; norm is the norms of the
residual stream and the final one. Models with depth routers have one more, "depth", and those with modalities
of vectors "vectors"."""

TRAIN_FACTOR = 3
"""FLOPs of forward and backward over those of forward."""


@dataclass(frozen=True)
class Cost:
    """The parameters and FLOPs of one kind of module, summed over all layers."""

    parameters: dict[str, int]
    """Weight shard -> its parameters."""
    flops: dict[str, int]
    """Modality -> forward FLOPs of a token that runs in all layers, attention's pairs left out; of experts as
    many as a token has on average."""


def module_costs(config: ModelConfig) -> dict[str, Cost]:
    """Cost of each of MODULES."""
    d, layers = config.d_model, config.num_layers
    attention_out = d * config.num_heads * config.head_dim
    attention: dict[Part, int] = {
        "qkv": config.qkv_features * (d + config.qkv_bias),
        "qk_norm": _norm_parameters(config.query_key_norm, 2 * config.head_dim),
        "attention_out": attention_out,
    }
    norm = _norm_parameters(config.norm, d)

    def untied(numbers: Mapping[Part, int]) -> dict[str, int]:
        """Weight shard -> parameters, of parts with `numbers` in each shard."""
        found: dict[str, int] = {}
        for part, number in numbers.items():
            for shard in config.shards_of(part):
                found[shard] = found.get(shard, 0) + number
        return found

    def same(flops: int) -> dict[str, int]:
        return dict.fromkeys(config.towers, flops)

    table = config.vocab_tokens * d
    feed_forward = {s: layers * config.feed_forward_parameters(s) for s in config.shards_of("feed_forward")}
    of_feed_forward = {
        m: 2 * layers * config.feed_forward_parameters(tower, active=True)
        for m, tower in config.towers.items()
    }
    routers: dict[str, int] = {}
    for modality, of_modality in config.depth.items():
        tower = config.towers[modality]
        routers[tower] = routers.get(tower, 0) + d * of_modality.routed_layers(layers)
    others = {"depth": Cost(routers, same(0))} if config.depth else {}
    if config.vectors:
        adapters = (vectors_accounting.enter_flops, vectors_accounting.leave_flops)
        of_vectors = {m: sum(flops(config, m) for flops in adapters) for m in config.towers}
        others["vectors"] = Cost(vectors_accounting.shard_parameters(config), of_vectors)
    return {
        "embedding": Cost(untied({"embedding": table}), same(0)),
        "attention": Cost(
            untied({part: layers * number for part, number in attention.items() if number}),
            same(2 * layers * (config.qkv_features * d + attention_out)),
        ),
        "feed_forward": Cost(feed_forward, of_feed_forward),
        "norm": Cost(untied({"block_norm": 2 * layers * norm, "final_norm": norm}), same(0)),
        # Tied to the embedding, it has no parameters of its own, and its products all the same.
        "head": Cost({} if config.tied_embeddings else untied({"head": table}), same(2 * table)),
        **others,
    }


def _norm_parameters(kind: Norm | None, features: int) -> int:
    """Of one norm over `features`; None: there is no norm."""
    return {None: 0, "rms": 1, "layer": 2}[kind] * features


def total_parameters(config: ModelConfig) -> int:
    """All weights that are stored."""
    return sum(sum(cost.parameters.values()) for cost in module_costs(config).values())


def active_parameters(config: ModelConfig, modality: str) -> int:
    """Weights that one token of the modality meets, the whole embedding and head included; of experts as
    many as it has on average, of layers with a depth router all."""
    return sum(_met_parameters(config, modality).values())


def active_body_parameters(config: ModelConfig, modality: str) -> int:
    """active_parameters without the embedding and the head, which are most of a small model."""
    met = _met_parameters(config, modality)
    return sum(number for module, number in met.items() if module not in ("embedding", "head"))


def _met_parameters(config: ModelConfig, modality: str) -> dict[str, int]:
    """The active parameters of one token of the modality, by module."""
    tower, costs = config.towers[modality], module_costs(config)
    met = {m: sum(c.parameters.get(s, 0) for s in (tower, SHARED_TOWER)) for m, c in costs.items()}
    met["feed_forward"] = config.num_layers * config.feed_forward_parameters(tower, active=True)
    if modality in config.depth:
        met["depth"] = config.d_model * config.depth[modality].routed_layers(config.num_layers)
    if config.vectors:
        met["vectors"] = vectors_accounting.adapter_parameters(config, modality)
    return met


def flops_per_pair(config: ModelConfig) -> int:
    """Forward FLOPs of one visible (query, key) pair over all layers: its score, and its share of the
    values."""
    return 4 * config.num_layers * config.num_heads * config.head_dim


def flops_per_token(config: ModelConfig, modality: str) -> dict[str, int]:
    """Forward FLOPs of a token of the modality in each of MODULES, attention's pairs left out; of layers that
    tokens skip as many as expected."""
    found = {module: cost.flops[modality] for module, cost in module_costs(config).items()}
    if modality in config.depth:
        skipped = depth_accounting.skipped_per_token(config, modality)
        for module, flops in depth_accounting.skippable_flops(config, modality).items():
            found[module] -= round(skipped * flops)
    return found


def forward_flops(
    config: ModelConfig,
    tokens: Mapping[str, int],
    visible_pairs: int,
    expert_rows: Mapping[str, int] | None = None,
    skipped: Skipped | None = None,
    *,
    num_images: int = 0,
) -> int:
    """FLOPs of a forward pass over `tokens` (modality -> count) whose masks show `visible_pairs` pairs in
    all.

    `expert_rows`: tower -> tokens that its experts took, in all layers together: a token that two took is
    two. None: as many as expected; expert choice takes up to num_experts - 1 a sequence and layer more, for
    its capacities are whole numbers. `skipped`: by tokens with a depth router. None: as much as expected.
    `num_images`: of modalities of vectors with a loss.
    """
    costs = module_costs(config).values()
    linear = sum(count * sum(cost.flops[modality] for cost in costs) for modality, count in tokens.items())
    ran = {modality: config.num_layers * Fraction(count) for modality, count in tokens.items()}
    if config.depth:
        skipped = skipped or depth_accounting.expected(config, tokens, visible_pairs)
        linear -= depth_accounting.saved_flops(config, skipped)
        ran = {m: count - Fraction(skipped.tokens.get(m, 0)) for m, count in ran.items()}
    for tower, rows in (expert_rows or {}).items():
        experts, one = config.experts[tower], 3 * config.d_model * config.width_of(tower)
        of_tower = sum(count for m, count in ran.items() if config.towers[m] == tower)
        linear += round(2 * (rows * one - round(experts.experts_per_token * one) * of_tower))
    linear += num_images * vectors_accounting.image_flops(config)
    return linear + visible_pairs * flops_per_pair(config)


def train_flops(
    config: ModelConfig,
    tokens: Mapping[str, int],
    visible_pairs: int,
    expert_rows: Mapping[str, int] | None = None,
    skipped: Skipped | None = None,
    *,
    num_images: int = 0,
) -> int:
    """FLOPs of a forward and backward pass; arguments as in forward_flops."""
    forward = forward_flops(config, tokens, visible_pairs, expert_rows, skipped, num_images=num_images)
    return TRAIN_FACTOR * forward - vectors_accounting.spared_flops(config, tokens, num_images)


def kv_numbers_per_token(config: ModelConfig, modality: str) -> float:
    """Keys and values that a decoding cache holds of one token of the modality, over all layers and after
    warm-up: numbers, not bytes."""
    layers: float = config.num_layers
    if modality in config.depth and config.depth_block.keys == "selected":
        layers -= depth_accounting.skipped_per_token(config, modality)
    return 2 * config.kv_heads * config.head_dim * layers


def sublayer_costs(config: ModelConfig, document_tokens: int | None = None) -> list[int]:
    """Forward FLOPs of one sequence in each sublayer: embedding (0), attention and feed-forward of each block
    in turn, and final norm with head.

    What pipeline stages are cut by. Attention's pairs are those of documents of `document_tokens` tokens
    (None: one document fills the context); tokens are of every modality alike.
    """
    length = document_tokens or config.context_tokens
    costs = module_costs(config)
    tokens, layers = config.context_tokens, config.num_layers
    pairs = flops_per_pair(config) * visible_pairs([length]) * tokens // length

    def of(module: str) -> int:
        return sum(costs[module].flops.values()) * tokens // len(config.towers)

    shares = dict.fromkeys(config.towers, tokens / len(config.towers))
    blocks: list[int] = []
    skippable = {m: depth_accounting.skippable_flops(config, m) for m in config.depth}
    for ratios in config.ratios_of_layers():
        saved = {"attention": 0.0, "feed_forward": 0.0}
        for modality, ratio in ratios.items():
            for module, flops in skippable[modality].items():
                saved[module] += (1 - ratio) * shares[modality] * flops
        saved["attention"] += (1 - depth_accounting.pairs_share(config, ratios, shares)) * pairs / layers
        blocks.append((of("attention") + pairs) // layers - round(saved["attention"]))
        blocks.append(of("feed_forward") // layers - round(saved["feed_forward"]))
    enter, leave = (
        sum(flops(config, m) for m in config.vectors) * tokens // len(config.towers)
        for flops in (vectors_accounting.enter_flops, vectors_accounting.leave_flops)
    )
    return [enter, *blocks, of("head") + leave]


def visible_pairs(document_tokens: Iterable[int]) -> int:
    """(query, key) pairs of causal attention within documents of these lengths."""
    return sum(n * (n + 1) // 2 for n in document_tokens)


def later_pairs(image_vectors: Iterable[int]) -> int:
    """(query, key) pairs that images of these lengths add to causal attention if they see themselves both
    ways."""
    return sum(n * (n - 1) // 2 for n in image_vectors)


def _shape_lines(config: ModelConfig) -> list[str]:
    """What the layers of the model are, for a person."""
    towers = ", ".join(f"{modality} -> {tower}" for modality, tower in config.towers.items())
    tied = [part for part in config.tied_parts if part not in ("embedding", "head")]
    apart = [part for part in ("embedding", "head") if config.shards_of(part) == config.tower_names]
    experts = [
        f"experts of {tower}: {e.num_experts} of width {config.width_of(tower)}, {e.routing}, "
        f"{e.experts_per_token:g} a token"
        for tower, e in config.experts.items()
    ]
    return [
        f"{config.num_layers} layers, d_model {config.d_model}, {config.num_heads} heads of"
        f" {config.head_dim} ({config.kv_heads} for keys and values), feed-forward {config.ffn_width},"
        f" context {config.context_tokens}, vocabulary {config.vocab_tokens}",
        f"towers: {towers}"
        + (f"; tied between them: {', '.join(tied)}" if tied else "")
        + (f"; untied besides: {', '.join(apart)}" if apart else "")
        + ("; the head has the embedding's weights" if config.tied_embeddings else ""),
        *experts,
        *(depth_accounting.describe(config, modality) for modality in config.depth),
        *(vectors_accounting.describe(config, modality) for modality in config.vectors),
    ]


def describe(config: ModelConfig, document_tokens: int | None = None) -> str:
    """Table of parameters and FLOPs, for a person. Attention's pairs are counted for documents of
    `document_tokens` tokens (None: one document fills the context)."""
    length = document_tokens or config.context_tokens
    costs = module_costs(config)
    shards = tuple(dict.fromkeys(name for cost in costs.values() for name in cost.parameters))
    lines = [*_shape_lines(config), ""]
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
    flops = [flops_per_token(config, modality) for modality in config.towers]
    for module in costs:
        if any(costs[module].flops.values()):
            rows.append([f"{module} FLOPs", *(_count(of_modality[module]) for of_modality in flops)])
    of_pairs = [round(pair_flops * share) for share in depth_accounting.query_shares(config).values()]
    rows.append(["attention pairs FLOPs", *(_count(n) for n in of_pairs)])
    forward = [sum(of_modality.values()) + n for of_modality, n in zip(flops, of_pairs, strict=True)]
    rows.append(["forward FLOPs", *(_count(n) for n in forward)])
    rows.append(["training FLOPs", *(_count(TRAIN_FACTOR * n) for n in forward)])
    cached = (2 * kv_numbers_per_token(config, m) for m in config.towers)
    rows.append(["cached keys and values, bytes", *(_count(round(n)) for n in cached)])
    lines += [
        *aligned(rows),
        "",
        f"cache: 2 bytes a number; attention pairs: causal, in documents of {length} tokens",
    ]
    if config.depth:
        lines.append(
            "depth: after warm-up; where tokens that skip are no keys, as many keys of each modality"
        )
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
