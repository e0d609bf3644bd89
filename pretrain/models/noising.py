"""Noise on the vectors of an image, and what a decoder predicts of them: diffusion and flow matching.

A noised vector is signal * clean + noise * eps, with eps of the standard normal distribution. The two levels
follow from a time in [0, 1): at 0 the vector is clean, or all but clean, and towards 1 it is noise. What is
predicted is a combination of eps and clean, too, so a prediction can be turned into both.

All functions are pure; this module imports no torch. Functions of vectors use plain arithmetic, so they take
arrays of numpy and tensors of torch alike.
"""

from functools import cache
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Objective = Literal["diffusion", "flow"]
"""Diffusion: DDPM (Ho et al. 2020) with the cosine schedule. Flow: straight lines from clean to eps (Lipman
et al. 2022)."""
Prediction = Literal["epsilon", "v", "velocity"]
"""Of diffusion: eps, or v (Salimans & Ho 2022). Of flow: the velocity, eps - clean."""
TimeDistribution = Literal["uniform", "logit_normal"]
"""Logit-normal: the logistic function of a standard normal number (Esser et al. 2024)."""

DIFFUSION_STEPS = 1000
"""Steps of the cosine schedule; a time t in [0, 1) means its step floor(1000 t)."""


class Levels(NamedTuple):
    """Of noised vectors: signal * clean + noise * eps. Numbers, or arrays that broadcast with vectors."""

    signal: Any
    noise: Any


class Target(NamedTuple):
    """What is predicted: eps * of_eps + clean * of_clean. Numbers, or arrays that broadcast with vectors."""

    of_eps: Any
    of_clean: Any


def levels(objective: Objective, times: Any) -> Levels:
    """Levels at times in [0, 1), float64, in the shape of `times`."""
    times = np.asarray(times, dtype=np.float64)
    assert ((times >= 0) & (times < 1)).all(), "times outside of [0, 1)"
    if objective == "flow":
        return Levels(1 - times, times)
    kept = signal_shares()[np.floor(times * DIFFUSION_STEPS).astype(np.int64)]
    return Levels(np.sqrt(kept), np.sqrt(1 - kept))


@cache
def signal_shares() -> Float[np.ndarray, " steps"]:
    """signal ** 2 at every step of the cosine schedule (Nichol & Dhariwal 2021), where signal ** 2 and
    noise ** 2 sum to 1; float64. A step keeps at least 0.001 of the share before it."""
    edges = np.arange(DIFFUSION_STEPS + 1) / DIFFUSION_STEPS
    curve = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    shares = np.cumprod(1 - betas)
    shares.flags.writeable = False
    return shares


def noised(at: Levels, clean: Any, eps: Any) -> Any:
    """Clean vectors with noise, at these levels."""
    return at.signal * clean + at.noise * eps


def target(prediction: Prediction, at: Levels) -> Target:
    """What is to be predicted of vectors at these levels."""
    if prediction == "epsilon":
        return Target(1.0, 0.0)
    return Target(at.signal, -at.noise) if prediction == "v" else Target(1.0, -1.0)


def clean_and_eps(prediction: Prediction, at: Levels, vectors: Any, predicted: Any) -> tuple[Any, Any]:
    """(clean, eps) by which noised `vectors` at these levels would have `predicted` as their target."""
    of = target(prediction, at)
    scale = 1 / (at.signal * of.of_eps - at.noise * of.of_clean)
    clean = (of.of_eps * vectors - at.noise * predicted) * scale
    return clean, (at.signal * predicted - of.of_clean * vectors) * scale


def shifted(times: Any, shift: float) -> Any:
    """Times with more noise for a shift > 1: s t / (1 + (s - 1) t), which keeps 0 and 1."""
    return shift * times / (1 + (shift - 1) * times)


def time_at(
    quantile: float, distribution: TimeDistribution = "uniform", shift: float = 1.0, most: float = 1.0
) -> float:
    """The time in [0, 1) below which the share `quantile`, in (0, 1), of all drawn times lies. `most`: the
    times are drawn from [0, most) in place of [0, 1), by the same distribution, scaled."""
    time = quantile
    if distribution == "logit_normal":
        time = 1 / (1 + np.exp(-NormalDist().inv_cdf(quantile)))
    return min(float(shifted(time, shift)) * most, np.nextafter(1.0, 0.0).item())


def training_draw(
    seed: int, step: int, sequence: int, position: int, size: tuple[int, int]
) -> tuple[float, Float[np.ndarray, "vectors features"]]:
    """(quantile of its time, eps as float32) of an image of `size` (vectors, features), which begins at
    `position` of a sequence of the global batch.

    Both are functions of these numbers alone, so they are equal on every layout and in a resumed run.
    """
    generator = _generator((seed, step), (position, sequence, 1))
    # Odd multiples of 2 ** -53: neither 0 nor 1, where quantiles of a normal distribution are infinite.
    quantile = (int(generator.integers(2**52)) + 0.5) / 2**52
    return quantile, generator.standard_normal(size, dtype=np.float32)


def evaluation_draw(
    text: int, modality: int, image: int, size: tuple[int, int]
) -> tuple[float, Float[np.ndarray, "vectors features"]]:
    """The same of an image of held-out data, from the numbers of its text, of its modality and of the image
    in the text: one fixed draw for all runs and steps.

    Quantiles are spread evenly, as multiples of two irrational numbers are over the unit interval (a
    Kronecker sequence), so that the mean over images depends less on luck.
    """
    quantile = (0.5 + text * (2**0.5 - 1) + image * (5**0.5 - 1) / 2) % 1.0
    generator = _generator((0, 0), (modality << 32 | image, text, 2))
    return max(quantile, 2.0**-53), generator.standard_normal(size, dtype=np.float32)


def _generator(key: tuple[int, int], counter: tuple[int, int, int]) -> np.random.Generator:
    """The stream of random numbers of a 128-bit key that begins at counter * 2 ** 64; it is no longer than
    that, so streams of different counters are disjoint."""
    return np.random.Generator(np.random.Philox(key=key, counter=(0, *counter)))
