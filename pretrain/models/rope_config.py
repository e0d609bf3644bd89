"""Scaled rotary positions: the table `model.rope_scaling`. Imports no torch.

Kinds and parameters are those of transformers' modeling_rope_utils; two keys have this project's names:
`kind` is its rope_type, and `original_context_tokens` its original_max_position_embeddings.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.models.experts_config import Size

_REQUIRED = {
    "linear": (),
    "llama3": ("original_context_tokens", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_context_tokens",),
}
"""Kind -> keys that it needs beside `factor`."""
_OPTIONAL = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
"""Kind -> keys that it has beside those that it needs."""


class RopeScalingConfig(BaseModel):
    """Table `model.rope_scaling`: how the frequencies of RoPE are lowered for contexts longer than those that
    the model was first trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all frequencies / factor (position interpolation, arXiv 2306.15595); llama3: low frequencies
    alone (Llama 3.1, arXiv 2407.21783); yarn: likewise, with a ramp over dimensions and a factor on queries
    and keys (arXiv 2309.00071)."""
    factor: float = Field(ge=1)
    """New context length over the original one."""
    original_context_tokens: Size | None = None
    """Of llama3 and yarn: the context length before scaling."""
    low_freq_factor: float | None = Field(None, gt=0)
    """Of llama3: waves longer than original_context_tokens / low_freq_factor are scaled by factor."""
    high_freq_factor: float | None = Field(None, gt=0)
    """Of llama3: waves shorter than original_context_tokens / high_freq_factor are left as they are."""
    beta_fast: float | None = Field(None, gt=0)
    """Of yarn: dimensions that turn more often than this in the original context are left as they are. None:
    32."""
    beta_slow: float | None = Field(None, gt=0)
    """Of yarn: dimensions that turn less often are scaled by factor. None: 1."""
    attention_factor: float | None = Field(None, gt=0)
    """Of yarn: factor on queries and keys. None: 0.1 ln(factor) + 1, or what mscale and mscale_all_dim
    say."""
    mscale: float | None = Field(None, gt=0)
    """Of yarn: with mscale_all_dim, attention_factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim
    ln(factor) + 1)."""
    mscale_all_dim: float | None = Field(None, gt=0)
    truncate: bool | None = None
    """Of yarn: whether the ends of the ramp are rounded to whole dimensions. None: true."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScalingConfig":
        required = _REQUIRED[self.kind]
        given = [key for key in self.model_fields_set if getattr(self, key) is not None]
        if missing := [key for key in required if key not in given]:
            raise ValueError(f'kind = "{self.kind}" needs {", ".join(missing)}; set them')
        legal = ("kind", "factor", *required, *_OPTIONAL.get(self.kind, ()))
        if foreign := sorted(set(given) - set(legal)):
            raise ValueError(
                f'kind = "{self.kind}" has no {", ".join(foreign)}; legal: {", ".join(legal)}; leave out the '
                "others"
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"low_freq_factor = {low} must be less than high_freq_factor = {high} (Llama 3.1: 1 and 4)"
            )
        if self.fast_turns < self.slow_turns:
            raise ValueError(
                f"beta_fast = {self.fast_turns} must not be less than beta_slow = {self.slow_turns}"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim act together; set both, or neither")
        return self

    @property
    def fast_turns(self) -> float:
        """`beta_fast`, or its default."""
        return 32.0 if self.beta_fast is None else self.beta_fast

    @property
    def slow_turns(self) -> float:
        """`beta_slow`, or its default."""
        return 1.0 if self.beta_slow is None else self.beta_slow

    @property
    def magnitude(self) -> float:
        """The factor on queries and keys, 1 for all kinds but yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0
