"""Batches of random documents with random modality spans, for tests of the model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.shards.vocabulary import SPECIAL_TOKENS
from data_pipeline.stream.batch import Batch
from pretrain.models.config import ModelConfig

DENSE = {"text": "all", "image": "all", "speech": "all"}
MOT = {"text": "text", "image": "image", "speech": "speech"}
IMAGE_SPEECH_SHARED = {"text": "text", "image": "other", "speech": "other"}
TWO_TOWERS = {"text": "text", "image": "image"}

ELEMENTS: dict[str, Any] = {
    "norm": "layer", "qk_norm": "layer", "qk_norm_eps": 1e-4, "qkv_bias": True, "dropout": 0.2,
    "embedding_dropout": 0.1,
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_context_tokens": 64},
}  # fmt: skip
"""Keys of a model config that change what a block is made of: none has its default."""


def tiny_config(towers: dict[str, str], **changes: object) -> ModelConfig:
    """2 layers, d_model 16, 4 heads in 2 groups, 40 ids."""
    values: dict[str, object] = {
        "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden": 24,
        "context_tokens": 12, "vocab_tokens": 40, "init_std": 0.2,
    }  # fmt: skip
    return ModelConfig.model_validate({**values, "towers": towers, **changes})


def depth_tables(modalities: Iterable[str], **keys: Any) -> dict[str, Any]:
    """Tables `depth` and `depth_block` of a model config: scale, parts and keys go into the block's table,
    all other keys into the table of each modality."""
    block = {key: keys.pop(key) for key in ("scale", "parts", "keys") if key in keys}
    return {"depth": dict.fromkeys(modalities, keys), "depth_block": block}


def with_ids(batch: Batch, ids: np.ndarray) -> Batch:
    """The batch with other input ids, of which those below len(SPECIAL_TOKENS) are special tokens."""
    return replace(batch, input_ids=ids.astype(np.int32), input_special=ids < len(SPECIAL_TOKENS))


def random_batch(
    config: ModelConfig,
    *,
    sequences: int = 2,
    seed: int = 0,
    document_tokens: tuple[int, int] = (2, 8),
    present: Sequence[int] | None = None,
    padding_tokens: int = 2,
) -> Batch:
    """Documents of `document_tokens` (inclusive) tokens, spans of 1-4 tokens of one of the modalities
    `present`; the last `padding_tokens` of the last sequence are padding."""
    rng = np.random.default_rng(seed)
    present = range(len(config.modalities)) if present is None else present
    shape = (sequences, config.context_tokens)
    documents, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    for row in range(sequences):
        end = shape[1] - (padding_tokens if row == sequences - 1 else 0)
        at = document = 0
        while at < end:
            length = min(end - at, int(rng.integers(*document_tokens, endpoint=True)))
            documents[row, at : at + length] = document
            positions[row, at : at + length] = np.arange(length)
            at, document = at + length, document + 1

    def spans() -> np.ndarray:
        drawn = np.repeat(rng.choice(list(present), size=2 * sequences * shape[1]), rng.integers(1, 5))
        return drawn[: sequences * shape[1]].reshape(shape).astype(np.uint8)

    filled = documents >= 0
    ids = rng.integers(1, config.vocab_tokens, (2, *shape), dtype=np.int32) * filled
    return Batch(
        input_ids=ids[0],
        target_ids=ids[1],
        loss_weights=filled.astype(np.float32),
        positions=positions,
        document_ids=documents,
        input_special=ids[0] < len(SPECIAL_TOKENS),
        input_modality=np.where(filled, spans(), 0).astype(np.uint8),
        target_modality=np.where(filled, spans(), 0).astype(np.uint8),
        samples=tuple((f"shard/{row}",) for row in range(sequences)),
    )
