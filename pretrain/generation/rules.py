"""The rules by which depth routers choose tokens of a prompt, and tokens that are written behind it.

p-MoD (arXiv 2412.04449) reads a prompt under top_k, which looks at all of its tokens, and lets every written
token run in all layers. A written token cannot be compared with later ones, so it runs by a threshold, or
always. This module imports no torch.
"""

from dataclasses import dataclass, replace
from typing import Literal

from data_pipeline.files.toml_config import ConfigError
from pretrain.models.config import ModelConfig
from pretrain.models.routing_state import RoutingState
from pretrain.train import depth_steps

PrefillRule = Literal["threshold", "top_k"]
DecodeRule = Literal["threshold", "all"]


@dataclass(frozen=True)
class DecodingRules:
    """By what routers choose tokens of prompts, and tokens that are written."""

    prefill: RoutingState
    decode: RoutingState
    told: str | None = None
    """The rules in words; None where they are those of evaluations."""


def decoding_rules(
    model: ModelConfig,
    routing_state: RoutingState,
    prefill_rule: PrefillRule = "threshold",
    decode_rule: DecodeRule = "threshold",
) -> DecodingRules:
    """The rules of a model whose causal form is `routing_state`. Raises ConfigError for rules that it lacks.

    `prefill_rule`: top_k reads prompts under the model's own rules. `decode_rule`: behind such prompts, "all"
    lets every written token run in every layer.
    """
    if prefill_rule == "threshold":
        if decode_rule != "threshold":
            raise ConfigError(
                f"--decode-rule {decode_rule}: goes with --prefill-rule top_k alone: a model whose prompts "
                "are read by thresholds was trained or judged with tokens that skip; leave it out"
            )
        return DecodingRules(routing_state, routing_state)
    if not any(depth.rule == "top_k" for depth in model.depth.values()):
        rules = ", ".join(f"{m} by {depth.rule}" for m, depth in model.depth.items()) or "no token skips"
        raise ConfigError(
            f'--prefill-rule top_k: no model.depth of the model has rule = "top_k" ({rules}), so it never '
            "chose tokens that way; leave it out"
        )
    routers, decode = depth_steps.routers(model), routing_state
    if decode_rule == "all":  # a router without a threshold lets every token through
        kept = {name: value for name, value in routing_state.thresholds.items() if name not in routers}
        decode = replace(routing_state, thresholds=kept)
    written = {"threshold": "run by thresholds", "all": "run in all layers"}[decode_rule]
    return DecodingRules(
        replace(routing_state, own_depth_rule=True),
        decode,
        f"prompts are read under the model's own rule, top_k; tokens that are written {written}",
    )
