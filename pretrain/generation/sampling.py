"""The next id from logits: temperature, top-k and top-p, as pure functions in float64; and what is asked of
images that are vectors."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from pretrain.generation.denoise import Sampler


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn from the probabilities of a model, and images that are vectors from noise."""

    temperature: float = 1.0
    """Logits are divided by it; 0: the id of the highest logit, of equal ones the lowest id."""
    top_k: int | None = None
    """Only the `top_k` likeliest ids are drawn; None: all."""
    top_p: float = 1.0
    """Only the likeliest ids are drawn, as few as hold this share of the probability."""
    seed: int = 1
    image_steps: int | None = None
    """Steps in which an image of vectors is denoised; None: 250."""
    sampler: Sampler | None = None
    """How such an image is denoised; None: by the first that goes with the objective of the modality."""


def probabilities(
    logits: Float[np.ndarray, " ids"], allowed: Bool[np.ndarray, " ids"], sampling: Sampling
) -> Float[np.ndarray, " ids"]:
    """The probabilities by which ids are drawn, float64: first the ids that are not allowed are left out,
    then the temperature acts, then top_k, then top_p. Of equally likely ids the lower one comes first."""
    masked = np.where(allowed, logits.astype(np.float64), -np.inf)
    order = np.argsort(-masked, kind="stable")
    if sampling.temperature == 0:
        return np.where(np.arange(len(masked)) == order[0], 1.0, 0.0)
    kept = order[: min(sampling.top_k or len(order), int(allowed.sum()))]
    shares = np.exp((masked[kept] - masked[kept[0]]) / sampling.temperature)
    shares /= shares.sum()
    # The first ids whose sum reaches top_p: an id is kept if those before it do not.
    before = np.cumsum(shares) - shares
    shares = np.where(before < sampling.top_p, shares, 0.0)
    result = np.zeros(len(masked))
    result[kept] = shares / shares.sum()
    return result


def draw(shares: Float[np.ndarray, " ids"], uniform: float) -> int:
    """The id at `uniform`, in [0, 1), of the cumulated probabilities; never one of probability 0."""
    cumulated = np.cumsum(shares)
    index = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return min(index, int(np.flatnonzero(shares)[-1]))


def uniforms(seed: int, prompt: int, sample: int) -> np.random.Generator:
    """The source of the numbers that a sample is drawn by: a function of the seed and the numbers of prompt
    and sample, whatever is drawn beside it."""
    return np.random.Generator(np.random.Philox(key=[seed, prompt << 32 | sample]))
