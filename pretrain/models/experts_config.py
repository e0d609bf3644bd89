"""Experts in the feed-forward of a tower: how many, how wide, and who chooses whom. Imports no torch."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(gt=0, lt=2**31)]
"""A length of a side of a tensor."""


class ExpertsConfig(BaseModel):
    """The table model.experts.<tower>. MoE-4x of the MoT paper (arXiv 2411.04996, section 3.2.1): 4 experts
    of the dense width, expert choice, one tower."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[dict[str, str]] = {"hidden": "ffn_hidden"}

    num_experts: Size
    routing: Literal["expert_choice", "token_choice"] = "expert_choice"
    """expert_choice: each expert takes the tokens of a sequence that it scores highest (Zhou et al., arXiv
    2202.09368): equal loads, but what becomes of a token depends on later ones. token_choice: each token goes
    to its top_k experts, none is dropped (Switch, arXiv 2101.03961, without a capacity): causal."""
    top_k: Size = 1
    """Of token_choice: experts of a token."""
    ffn_hidden: Size | None = None
    """SwiGLU width of one expert. None: that of the model's feed-forward."""
    capacity_factor: float = Field(default=1.0, gt=0)
    """Of expert_choice: experts that a token has on average; 1 costs what the dense feed-forward costs."""
    load_balance: float = Field(default=0.0, ge=0)
    """Of token_choice: weight, per token, of num_experts x sum over experts of (share of choices x mean
    probability), of each sequence (Switch, equation 4: 0.01)."""
    router_z: float = Field(default=0.0, ge=0)
    """Weight, per token, of log^2 of the sum of exponentiated logits (ST-MoE, arXiv 2202.08906: 0.001)."""

    @model_validator(mode="after")
    def _check(self) -> "ExpertsConfig":
        token_choice = self.routing == "token_choice"
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} of num_experts = {self.num_experts}; at most all of them")
        if not token_choice and self.top_k != 1:
            raise ValueError(
                f'top_k = {self.top_k} belongs to routing = "token_choice"; under expert_choice '
                f"capacity_factor = {self.top_k} gives a token as many experts on average"
            )
        if token_choice and self.capacity_factor != 1:
            raise ValueError(
                f'capacity_factor = {self.capacity_factor} belongs to routing = "expert_choice"; '
                "token_choice drops no token: use top_k"
            )
        if self.capacity_factor > self.num_experts:
            raise ValueError(
                f"capacity_factor = {self.capacity_factor} of num_experts = {self.num_experts}: an expert "
                f"cannot take a token twice; at most {self.num_experts}"
            )
        if self.load_balance and not token_choice:
            raise ValueError(
                f"load_balance = {self.load_balance}, but under expert_choice loads are equal; leave it out, "
                'or set routing = "token_choice"'
            )
        return self

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on it and what came before it alone."""
        return self.routing == "token_choice"

    @property
    def experts_per_token(self) -> float:
        """On average."""
        return self.top_k if self.routing == "token_choice" else self.capacity_factor

    @property
    def chooses_one(self) -> bool:
        """Whether the result of a token is that of one expert times its gate."""
        return self.routing == "token_choice" and self.top_k == 1 and self.num_experts > 1

    def capacity(self, tokens: int) -> int:
        """Of expert_choice: what one expert takes of `tokens` tokens of a sequence."""
        # Rounded first: 30 x 1.1 / 3 is 11.000000000000002.
        return min(tokens, math.ceil(round(tokens * self.capacity_factor / self.num_experts, 6)))
