"""The frequencies of rotary positions under `model.rope_scaling`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.models.rope_config import RopeScalingConfig


def scaled_frequencies(
    frequencies: Float[Tensor, " pairs"], theta: float, scaling: RopeScalingConfig
) -> Float[Tensor, " pairs"]:
    """Frequencies under the scaling, computed in the dtype and on the device of `frequencies`, without asking
    the device for a value. Follows transformers 5.23, modeling_rope_utils.py."""
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor
        case "llama3":
            return _llama3(frequencies, scaling)
        case "yarn":
            return _yarn(frequencies, theta, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Between the two wavelengths the result is a mean of scaled and unscaled, by the number of waves in the
    original context."""
    context, low, high = scaling.original_context_tokens, scaling.low_freq_factor, scaling.high_freq_factor
    assert context is not None and low is not None and high is not None
    waves = context * frequencies / (2 * math.pi)
    unscaled = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled) * (frequencies / scaling.factor) + unscaled * frequencies


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """The ramp from unscaled to scaled frequencies is linear in the number of the pair."""
    pairs, context = frequencies.shape[0], scaling.original_context_tokens
    assert context is not None

    def pair_of(turns: float) -> float:
        """The pair, as a real number, that turns this often in the original context."""
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.fast_turns), pair_of(scaling.slow_turns)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # as in transformers: a step, without division by 0
    number = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
    share = ((number - first) / (last - first)).clamp(0, 1)
    return (1 - share) * frequencies + share * (frequencies / scaling.factor)
