"""What forward passes keep for backward ones on a rank, in bytes. Pure; imports no torch.

Layers are counted by sublayer: 0 the embedding, odd numbers attention, even ones feed-forward, then final
norm and head.
"""

from collections.abc import Mapping

from parallel.engine_memory import format_bytes
from parallel.layout import ParallelConfig
from pretrain.config import RunConfig
from pretrain.models.config import ModelConfig


def sublayer_activations(
    config: RunConfig, layout: ParallelConfig, run: float | None = None
) -> tuple[int, int]:
    """Bytes that a block's feed-forward and attention keep for the backward pass of one micro-batch,
    checkpointing left aside. `run`: with depth routers, the share of tokens that run; None: no routers.

    T tokens, R of them in this rank's chunk (T / tp with sequence parallel, else T), b bytes each. Both: 2 R
    d b: inputs of its first matrix and of its norm (parallel/towers.py); 4 R: the norm's scale in fp32.
    Attention: T (q + 2 k) b twice, once without QK-norm: QKV before and after norm and rotation, and T heads
    4 of scales (models/query_key.py); T q b twice: its output in sequence and in sorted order, once where one
    tower serves all, and T heads 4 of log-sums (models/attention.py). Feed-forward: 3 T f b: gate, up and
    their product (models/feed_forward.py). q, k, f and heads are this rank's.

    With depth routers R and T are the C = run T tokens that run, on every rank, but T in attention's keys and
    values with keys = "all", and in all of attention where only the feed-forward is skipped. Beside it: T d b
    and 12 T: the stream and what scores keep of it; T d b with scale = "all", else C d b: what gates are
    multiplied with, and 4 T of gates; C d b unless scale = "selected": what torch's index_copy keeps of its
    source; 4 C head_dim: turns; 24 C: where the tokens that run are.
    """
    model, b = config.model, format_bytes(config.precision)
    tokens, rows = layout.micro_batch_sequences * model.context_tokens, rows_on_rank(config, layout)
    if run is None:
        return _feed_forward(config, layout, rows, tokens), _attention(config, layout, rows, tokens, tokens)
    ran, block = round(run * tokens), model.depth_block
    whole = block.parts == "feed_forward"  # attention
    queries, keys = (tokens if whole else ran), (ran if block.keys == "selected" else tokens)
    # In pre-norm what keys and values are made of is normalised.
    rows = queries if model.norm_placement == "post" else (queries + keys) // 2
    gated = {"selected": ran, "all_as_released": 2 * ran, "all": tokens + ran}[block.scale]
    routing = (tokens + gated) * model.d_model * b
    routing += 16 * tokens + ran * (24 if whole else 24 + 4 * model.head_dim)
    attention = _attention(config, layout, rows, queries, keys)
    if queries < keys and model.qk_norm:  # values are then no part of what norms and turns write anew
        attention -= keys * model.kv_heads * model.head_dim // layout.tp * b
    return _feed_forward(config, layout, ran, ran), attention + routing


def _attention(config: RunConfig, layout: ParallelConfig, rows: int, queries: int, keys: int) -> int:
    """Of `queries` tokens over `keys` tokens, `rows` of both in its norm and before its first matrix."""
    model, b, tp = config.model, format_bytes(config.precision), layout.tp
    of_query, of_key = model.num_heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp
    # With depth routing one tower is sorted by modality, too.
    orders = 2 if len(model.tower_names) > 1 or model.depth else 1
    qkv = (queries * of_query + 2 * keys * of_key) * b * (2 if model.qk_norm else 1)
    scales = (queries * model.num_heads + keys * model.kv_heads) // tp * 4 if model.qk_norm else 0
    seen = queries * of_query * b * orders + queries * model.num_heads // tp * 4
    return rows * (2 * model.d_model * b + 4) + qkv + scales + seen


def _feed_forward(config: RunConfig, layout: ParallelConfig, rows: int, tokens: int) -> int:
    """Of `tokens`, `rows` of them in its norm and before its first matrix."""
    model, b = config.model, format_bytes(config.precision)
    norm = rows * (model.d_model * b + 4)
    if model.experts:
        return norm + max(_experts_activations(config, layout, s, tokens) for s in model.tower_names)
    return norm + rows * model.d_model * b + 3 * tokens * model.ffn_width // layout.tp * b


def _experts_activations(config: RunConfig, layout: ParallelConfig, tower: str, tokens: int) -> int:
    """Bytes that the feed-forward of a model with experts keeps, its norm left aside, if all T `tokens` are
    of `tower`, of which experts take D.

    Router: T d 4, its input in fp32; T (2 E + 2) 4: products, their scale and probabilities; 20 D: rows and
    gates (models/experts.py). D d b and 3 D f b as without experts, of what they take. A plain tower: T d b
    and 3 T f b.
    """
    model, b, d = config.model, format_bytes(config.precision), config.model.d_model
    experts, width = model.experts.get(tower), model.width_of(tower) // layout.tp
    if experts is None:
        return tokens * d * b + 3 * tokens * width * b
    taken = round(experts.experts_per_token * tokens)
    router = tokens * (d + 2 * experts.num_experts + 2) * 4 + 20 * taken
    return router + taken * (d + 3 * width) * b


def head_activations(config: RunConfig, layout: ParallelConfig) -> int:
    """Bytes that final norm and loss keep: the norm's input and scale; the gradients of hidden states and
    head weight, which the loss makes on the way forward (pretrain/models/cross_entropy.py)."""
    model, b, rows = config.model, format_bytes(config.precision), rows_on_rank(config, layout)
    return 2 * rows * model.d_model * b + 4 * rows + model.vocab_tokens * model.d_model // layout.tp * b


def stage_activations(
    config: RunConfig, layout: ParallelConfig, sublayers: range, in_flight: int, run: Mapping[int, float]
) -> int:
    """Bytes kept on a stage with `in_flight` micro-batches between their forward and backward pass: 1F1B's
    pp - stage, or all of a step if they are fewer. Checkpointed blocks keep their input, those with depth
    routers also what these have seen, and one block at a time is computed anew. RoPE's turns are made once a
    micro-batch; a stage also keeps what it has sent on. `run`: layer with depth routers -> share of tokens
    that run in it."""
    model, last = config.model, last_sublayer(config.model) in sublayers
    tokens = layout.micro_batch_sequences * model.context_tokens
    hidden, held, again, kept = hidden_bytes(config, layout), of_blocks(model, sublayers), 0, 0
    costs = {share: sublayer_activations(config, layout, share) for share in {None, *run.values()}}
    for layer in {(number - 1) // 2 for number in held}:
        kept_by = costs[run.get(layer)]
        if layout.activation_checkpointing:
            kept += _routed_input(config, layout, run[layer]) if layer in run else hidden
            again = max(again, sum(kept_by))
        else:
            kept += sum(kept_by[half] for half in (0, 1) if 2 * layer + 2 - half in held)
    kept += tokens * model.head_dim // 2 * 8
    kept += head_activations(config, layout) if last else hidden
    return in_flight * kept + again


def _routed_input(config: RunConfig, layout: ParallelConfig, run: float) -> int:
    """Of a checkpointed block: the whole stream, also behind an attention that none skips, and its choice."""
    model, tokens = config.model, layout.micro_batch_sequences * config.model.context_tokens
    streams = 2 if model.depth_block.parts == "feed_forward" else 1
    return tokens * (streams * model.d_model * format_bytes(config.precision) + 16) + 24 * round(run * tokens)


def hidden_bytes(config: RunConfig, layout: ParallelConfig) -> int:
    """What a stage hands on of a micro-batch, and gets the gradient of."""
    return rows_on_rank(config, layout) * config.model.d_model * format_bytes(config.precision)


def rows_on_rank(config: RunConfig, layout: ParallelConfig) -> int:
    tokens = layout.micro_batch_sequences * config.model.context_tokens
    return tokens // layout.tp if layout.sequence_parallel else tokens


def last_sublayer(model: ModelConfig) -> int:
    """Number of final norm and head among the sublayers."""
    return 2 * model.num_layers + 1


def of_blocks(model: ModelConfig, sublayers: range) -> range:
    """Those that belong to blocks: odd numbers are attention, even ones feed-forward."""
    return range(max(sublayers.start, 1), min(sublayers.stop, last_sublayer(model)))
