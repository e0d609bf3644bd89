"""Two ways to compute one thing, compared in fp64, where a mistake cannot hide in rounding, and in fp32."""

from dataclasses import replace

import torch
from torch import Tensor

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs

PRECISIONS = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}
"""How far two ways may be apart, relative to the largest entry of a tensor. fp64 is the proof: the order of
sums leaves 2e-15. fp32 shows that nothing loses bits on the way: 2.9e-6 is the worst that rounding makes on
the arithmetic paths of tools/arithmetic.sh."""


def cast(decoder: Decoder, inputs: ModelInputs, dtype: torch.dtype) -> tuple[Decoder, ModelInputs]:
    """The model, and inputs whose loss is summed in the same dtype."""
    return decoder.to(dtype), replace(inputs, loss_weights=inputs.loss_weights.to(dtype))


def assert_close(
    ours: Tensor, theirs: Tensor, what: str, *, floor: float = 0.0, fp32: float = TOLERANCE[torch.float32]
) -> None:
    """`theirs` may be a reference in fp64; the dtype of `ours` chooses the tolerance. `floor`: the least that
    counts as a tensor's largest entry. `fp32`: the tolerance there, where a test's is another."""
    difference = float((ours.detach().double() - theirs.detach().double()).abs().max())
    scale = max(floor, float(theirs.detach().abs().max()))
    limit = fp32 if ours.dtype == torch.float32 else TOLERANCE[ours.dtype]
    assert difference <= limit * scale, f"{what}: {difference:.3g} on a scale of {scale:.3g} in {ours.dtype}"
