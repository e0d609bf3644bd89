"""Activations that a rank keeps between forward and backward passes, in bytes, as pure functions.

Sublayers are numbered: 0 is the embedding, odd numbers are attention, even numbers feed-forward, and the last
is final norm with head. This module imports no torch.
"""

from collections.abc import Mapping

from parallel.engine_memory import element_bytes
from parallel.layout import ParallelConfig
from pretrain.config import RunConfig
from pretrain.models.config import ModelConfig, Norm


def sublayer_activations(
    config: RunConfig, layout: ParallelConfig, run_share: float | None = None
) -> tuple[int, int]:
    """(feed-forward, attention): bytes that a block keeps of one micro-batch without checkpointing.

    `run_share`: the share of tokens that run in a block with depth routers; None: a block without routers.

    Let T be the tokens, R the tokens of this rank's chunk (T / tp with sequence parallel, else T), b the
    bytes of an element, and q, k, f and heads the sizes on this rank. Both sublayers keep 2 R d b for the
    inputs of their first matrix and norm (parallel/towers.py) and 4 R for the norm's scale in fp32, 8 R for
    LayerNorm's scale and mean. Attention keeps T (q + 2 k) b twice (once without QK-norm), for QKV before and
    after norm and rotation, and 4 T heads of scales, 8 T heads with LayerNorm (models/query_key.py); T q b
    twice (once if one tower serves all modalities), for its output in sequence and in sorted order, and 4 T
    heads of log-sums (models/attention.py). Feed-forward keeps 3 T f b: gate, up and their product
    (models/feed_forward.py).

    With depth routers, R and T become C = run_share T, the tokens that run, on every rank; T stays for keys
    and values with keys = "all", and for all of attention if only the feed-forward is skipped. In addition a
    block keeps T d b and 12 T for the stream and its scores; T d b with scale = "all", else C d b, for the
    factors of the gates, and 4 T for gates; C d b unless scale = "selected", for the source of torch's
    index_copy; 4 C head_dim for rotary angles; 24 C for the positions of the tokens that run, and with
    dropout 8 C for their numbers in the global batch.
    """
    model, b = config.model, element_bytes(config.precision)
    tokens, rows = layout.micro_batch_sequences * model.context_tokens, rows_on_rank(config, layout)
    if run_share is None:
        return _feed_forward(config, layout, rows, tokens), _attention(config, layout, rows, tokens, tokens)
    ran, block = round(run_share * tokens), model.depth_block
    whole_attention = block.parts == "feed_forward"
    queries, keys = (tokens if whole_attention else ran), (ran if block.keys == "selected" else tokens)
    # In pre-norm the inputs of keys and values are normalised too.
    rows = queries if model.norm_placement == "post" else (queries + keys) // 2
    gated = {"selected": ran, "all_as_released": 2 * ran, "all": tokens + ran}[block.scale]
    routing = (tokens + gated) * model.d_model * b
    routing += 16 * tokens + ran * (24 if whole_attention else 24 + 4 * model.head_dim)
    routing += _number_bytes(model) * ran
    attention = _attention(config, layout, rows, queries, keys)
    if queries < keys and model.qk_norm:  # norms and rotation then do not copy the values
        attention -= keys * model.kv_heads * model.head_dim // layout.tp * b
    return _feed_forward(config, layout, ran, ran), attention + routing


def _attention(config: RunConfig, layout: ParallelConfig, rows: int, queries: int, keys: int) -> int:
    """Bytes that attention of `queries` tokens over `keys` tokens keeps; `rows` of them enter its norm."""
    model, b, tp = config.model, element_bytes(config.precision), layout.tp
    query_width, key_width = model.num_heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp
    # With depth routing the tokens of one tower are sorted too, by modality.
    orders = 2 if len(model.tower_names) > 1 or model.depth else 1
    qkv = (queries * query_width + 2 * keys * key_width) * b * (2 if model.qk_norm else 1)
    scales = (queries * model.num_heads + keys * model.kv_heads) // tp * _scale_bytes(model.query_key_norm)
    output = queries * query_width * b * orders + queries * model.num_heads // tp * 4
    return rows * (2 * model.d_model * b + _scale_bytes(model.norm)) + qkv + scales + output


def _scale_bytes(norm: Norm | None) -> int:
    """Bytes of fp32 numbers that a norm keeps of a row beside its input: the scale, and of LayerNorm the
    mean."""
    return {None: 0, "rms": 4, "layer": 8}[norm]


def _number_bytes(model: ModelConfig) -> int:
    """Bytes that dropout keeps of a token: its number in the global batch. Masks are hashed a second time."""
    return 8 if model.has_dropout else 0


def _feed_forward(config: RunConfig, layout: ParallelConfig, rows: int, tokens: int) -> int:
    """Bytes that a feed-forward of `tokens` keeps; `rows` of them enter its norm."""
    model, b = config.model, element_bytes(config.precision)
    norm = rows * (model.d_model * b + _scale_bytes(model.norm))
    if model.experts:
        return norm + max(_experts_activations(config, layout, s, tokens) for s in model.tower_names)
    return norm + rows * model.d_model * b + 3 * tokens * model.ffn_width // layout.tp * b


def _experts_activations(config: RunConfig, layout: ParallelConfig, tower: str, tokens: int) -> int:
    """Bytes that the feed-forward of a model with experts keeps, without its norm, if all tokens are of
    `tower`.

    Let T be the tokens and D the rows that E experts take. The router keeps 4 T d for its input in fp32,
    4 T (2 E + 2) for logits, their scale and probabilities, and 20 D for rows and gates (models/experts.py).
    Experts keep D d b + 3 D f b, as a plain tower keeps T d b + 3 T f b.
    """
    model, b, d = config.model, element_bytes(config.precision), config.model.d_model
    experts, width = model.experts.get(tower), model.width_of(tower) // layout.tp
    if experts is None:
        return tokens * d * b + 3 * tokens * width * b
    taken = round(experts.experts_per_token * tokens)
    router = tokens * (d + 2 * experts.num_experts + 2) * 4 + 20 * taken
    return router + taken * (d + 3 * width) * b


def head_activations(config: RunConfig, layout: ParallelConfig) -> int:
    """Bytes that final norm and loss keep.

    These are the norm's input and scale, and the gradients of hidden states and of the head's weights, which
    the loss computes in its forward pass (pretrain/models/cross_entropy.py).
    """
    model, b, rows = config.model, element_bytes(config.precision), rows_on_rank(config, layout)
    of_weights = len(model.shards_of("head")) * model.vocab_tokens * model.d_model // layout.tp * b
    return rows * (2 * model.d_model * b + _scale_bytes(model.norm)) + of_weights


def stage_activations(
    config: RunConfig,
    layout: ParallelConfig,
    sublayers: range,
    in_flight: int,
    run_shares: Mapping[int, float],
) -> int:
    """Bytes kept on a stage with `in_flight` micro-batches between their forward and backward passes.

    `in_flight` is 1F1B's pp - stage, or all micro-batches of a step if they are fewer. Checkpointed blocks
    keep their input, and with depth routers also the routers' input; one block at a time is recomputed.
    Rotary angles are computed once a micro-batch, and a stage keeps the output that it has sent.
    `run_shares`: by layer with depth routers, the share of tokens that run.
    """
    model, last = config.model, last_sublayer(config.model) in sublayers
    tokens = layout.micro_batch_sequences * model.context_tokens
    hidden, in_blocks, recompute, kept = hidden_bytes(config, layout), block_sublayers(model, sublayers), 0, 0
    costs = {share: sublayer_activations(config, layout, share) for share in {None, *run_shares.values()}}
    for layer in {(number - 1) // 2 for number in in_blocks}:
        share = run_shares.get(layer)
        kept_by = costs[share]
        if layout.activation_checkpointing:
            kept += hidden if share is None else _routed_input(config, layout, share)
            recompute = max(recompute, sum(kept_by))
        else:
            kept += sum(kept_by[half] for half in (0, 1) if 2 * layer + 2 - half in in_blocks)
    kept += tokens * (model.head_dim // 2 * 8 + _number_bytes(model))
    kept += head_activations(config, layout) if last else hidden
    kept += _adapter_activations(config, layout, first=0 in sublayers, last=last)
    return in_flight * kept + recompute


def _adapter_activations(config: RunConfig, layout: ParallelConfig, *, first: bool, last: bool) -> int:
    """Bytes that the adapters of vectors keep if every token is a vector of the modality with the most
    features: vectors in fp32 and as the matrix reads them; hidden states before the prediction; and in fp32
    what is predicted, its target and their difference."""
    model, b = config.model, element_bytes(config.precision)
    tokens = layout.micro_batch_sequences * model.context_tokens
    entering = max((own.features for own in model.vectors.values()), default=0) * (4 + b)
    leaving = [model.d_model * b + 3 * 4 * model.vectors[m].features for m in model.learned_vectors]
    return tokens * (first * entering + last * max(leaving, default=0))


def _routed_input(config: RunConfig, layout: ParallelConfig, run_share: float) -> int:
    """Bytes that a checkpointed block with depth routers keeps: the stream and the choice of the routers.

    If no token skips attention, the stream after attention is kept as well.
    """
    model, tokens = config.model, layout.micro_batch_sequences * config.model.context_tokens
    streams = 2 if model.depth_block.parts == "feed_forward" else 1
    return tokens * (streams * model.d_model * element_bytes(config.precision) + 16) + (
        24 + _number_bytes(model)
    ) * round(run_share * tokens)


def hidden_bytes(config: RunConfig, layout: ParallelConfig) -> int:
    """Bytes of the hidden states of a micro-batch, which a stage sends and receives the gradient of."""
    return rows_on_rank(config, layout) * config.model.d_model * element_bytes(config.precision)


def rows_on_rank(config: RunConfig, layout: ParallelConfig) -> int:
    """Tokens of a micro-batch in this rank's chunk of the stream."""
    tokens = layout.micro_batch_sequences * config.model.context_tokens
    return tokens // layout.tp if layout.sequence_parallel else tokens


def last_sublayer(model: ModelConfig) -> int:
    """The number of the last sublayer: final norm and head."""
    return 2 * model.num_layers + 1


def block_sublayers(model: ModelConfig, sublayers: range) -> range:
    """The sublayers that belong to blocks: odd numbers are attention, even numbers feed-forward."""
    return range(max(sublayers.start, 1), min(sublayers.stop, last_sublayer(model)))
