"""Parameters and FLOPs of the adapters of modalities of vectors. Imports no torch."""

from collections.abc import Mapping

from pretrain.models.config import ModelConfig
from pretrain.models.vectors_config import TIME_FEATURES


def adapter_parameters(config: ModelConfig, modality: str) -> int:
    """Weights and biases of one modality's adapters; 0 for a modality of ids."""
    if modality not in config.vectors:
        return 0
    own, d, wide = config.vectors[modality], config.d_model, TIME_FEATURES
    enter, learned = (own.features + 1) * d, (wide + 1) * (wide + d) + (d + 1) * own.features
    return enter + (learned if own.learns else 0)


def shard_parameters(config: ModelConfig) -> dict[str, int]:
    """Weight shard -> parameters of the adapters that belong to it."""
    found: dict[str, int] = {}
    for modality in config.vectors:
        shard = config.vectors_shard(modality)
        found[shard] = found.get(shard, 0) + adapter_parameters(config, modality)
    return found


def enter_flops(config: ModelConfig, modality: str) -> int:
    """Forward FLOPs of one vector on its way into the stream; 0 for an id."""
    return 2 * config.vectors[modality].features * config.d_model if modality in config.vectors else 0


def leave_flops(config: ModelConfig, modality: str) -> int:
    """Forward FLOPs of the prediction of one vector; 0 for an id."""
    return enter_flops(config, modality) if modality in config.learned_vectors else 0


def image_flops(config: ModelConfig) -> int:
    """Forward FLOPs of the time of one image that has one."""
    return 2 * TIME_FEATURES * (TIME_FEATURES + config.d_model)


def spared_flops(config: ModelConfig, tokens: Mapping[str, int], num_images: int) -> int:
    """FLOPs that a backward pass over `tokens` (modality -> count) and `num_images` times spares, since no
    gradient of vectors and times is asked for."""
    entering = sum(count * enter_flops(config, modality) for modality, count in tokens.items())
    return entering + num_images * 2 * TIME_FEATURES**2


def describe(config: ModelConfig, modality: str) -> str:
    """What a modality of vectors is, for a person."""
    own = config.vectors[modality]
    learned = f"{own.objective} ({own.predicted})" if own.learns else "context alone"
    sees = "an image sees itself whole (below, attention pairs are causal)"
    sees = sees if own.bidirectional else "causal inside an image"
    return f"vectors of {modality}: {own.features} features, {own.adapter} adapters, {learned}, {sees}"
