"""RoPE scaling in config.json of Hugging Face, and as `model.rope_scaling`. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.models.rope_config import RopeScalingConfig

_NAMES = {"kind": "rope_type", "original_context_tokens": "original_max_position_embeddings"}
"""Key of `model.rope_scaling` -> field of config.json, where the names differ."""
_KINDS = ("linear", "llama3", "yarn")


def read_rope(path: Path, fields: Mapping[str, Any]) -> tuple[float, RopeScalingConfig | None]:
    """(`model.rope_theta`, `model.rope_scaling`) of the content `fields` of a config.json.

    Raises ConfigError for a kind of scaling, or a part of it, that Motley's decoder cannot compute.
    """
    # rope_scaling is the name before version 5 of transformers.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if kind not in ("default", *_KINDS) or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"{path}: rope_scaling = {rope} cannot be expressed: RoPE turns all pairs of a head, by angles "
            f"of kind default, {', '.join(_KINDS)}; import a model without scaling, such as the one "
            "that this one was extended from"
        )
    theta = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    if kind == "default":
        return theta, None
    foreign = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    ours = {theirs: key for key, theirs in _NAMES.items()}
    given = {str(name): value for name, value in rope.items() if name not in foreign and value is not None}
    values: dict[str, Any] = {ours.get(name, name): value for name, value in given.items()}
    if kind != "linear":
        # transformers puts the whole context there (standardize_rope_params).
        values.setdefault("original_context_tokens", fields.get("max_position_embeddings"))
    source = f"{path}: rope_scaling"
    return theta, validate(RopeScalingConfig, {"kind": kind, **values}, source=source)


def rope_fields(scaling: RopeScalingConfig | None) -> dict[str, Any] | None:
    """The value of rope_scaling in config.json, in a form that transformers 4 and 5 read."""
    if scaling is None:
        return None
    return {_NAMES.get(key, key): value for key, value in scaling.model_dump(exclude_none=True).items()}
