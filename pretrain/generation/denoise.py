"""Vectors out of noise: DDPM, DDIM and Euler's method, as one step between two levels of noise.

A decoder's prediction is turned into clean vectors and eps, and the next vectors are made of both at the next
levels. With eta = 0 that is DDIM (Song et al. 2021) for diffusion, and Euler's method for flow, whose lines
are straight. With eta = 1 a share of eps is drawn anew, which is the ancestral step of DDPM (Ho et al. 2020).

All functions are pure and take arrays of numpy and tensors of torch alike. This module imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pretrain.models.noising import (
    DIFFUSION_STEPS,
    Levels,
    Objective,
    Prediction,
    clean_and_eps,
    levels,
    noised,
    shifted,
)

Sampler = Literal["ddpm", "ddim", "euler"]
SAMPLERS: dict[Objective, tuple[Sampler, ...]] = {"diffusion": ("ddpm", "ddim"), "flow": ("euler",)}
"""Objective -> the samplers that go with it, of which the first is the default."""
STEPS = 250
"""Steps of a sample unless others are asked for, as in Transfusion."""
CLEAN = Levels(1.0, 0.0)
_BEFORE_ONE = float(np.nextafter(1.0, 0.0))


@dataclass(frozen=True)
class Denoising:
    """How vectors are made of noise; see `denoising`."""

    objective: Objective
    prediction: Prediction
    sampler: Sampler
    times: tuple[float, ...]
    """Descending, of which a step begins at every one; the last step ends at clean vectors."""
    bounds: tuple[float, float] | None = None
    """The range of clean values, to which what is predicted is clipped; None: they have no range."""

    @property
    def eta(self) -> float:
        """The standard deviation of fresh noise in a step, as a share of that in DDPM's."""
        return 1.0 if self.sampler == "ddpm" else 0.0


def denoising(
    objective: Objective,
    prediction: Prediction,
    *,
    steps: int = STEPS,
    sampler: Sampler | None = None,
    shift: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> Denoising:
    """Denoising in `steps` even steps. `sampler`: one of SAMPLERS[objective]; None: the first. `shift`: of
    the times of flow, as in training."""
    sampler = sampler or SAMPLERS[objective][0]
    assert sampler in SAMPLERS[objective], f"{sampler} does not go with {objective}"
    edges = 1 - np.arange(steps) / steps
    if objective == "flow":
        times = np.minimum(shifted(edges, shift), _BEFORE_ONE)
    else:
        assert steps <= DIFFUSION_STEPS, f"{steps} steps of a schedule of {DIFFUSION_STEPS}"
        # The middle of a step of the schedule, of which the last comes first ("trailing", Lin et al. 2024).
        times = (np.rint(edges * DIFFUSION_STEPS) - 0.5) / DIFFUSION_STEPS
    return Denoising(objective, prediction, sampler, tuple(times.tolist()), bounds)


def denoise(
    how: Denoising, predict: Callable[[Any, float], Any], start: Any, fresh: Callable[[], Any]
) -> Any:
    """Clean vectors from `start`, which is noise of the standard normal distribution.

    `predict`: (vectors, time) -> what the decoder predicts of them. `fresh`: draws such noise as `start`; it
    is asked once a step, in their order, if eta > 0.
    """
    vectors = start
    after = [levels(how.objective, time) for time in how.times[1:]]
    for time, following in zip(how.times, [*after, CLEAN], strict=True):
        at = levels(how.objective, time)
        clean, eps = clean_and_eps(how.prediction, at, vectors, predict(vectors, time))
        if how.bounds is not None:
            clean = clean.clip(*how.bounds)
            eps = (vectors - at.signal * clean) / at.noise
        vectors = _step(at, following, how.eta, clean, eps, fresh)
    return vectors


def _step(at: Levels, following: Levels, eta: float, clean: Any, eps: Any, fresh: Callable[[], Any]) -> Any:
    """Vectors at the following levels. The deviation of fresh noise is equation 16 of DDIM; with eta = 1 it
    is that of the posterior of vectors at these levels, given those at the levels before and clean ones."""
    if eta == 0:
        return noised(following, clean, eps)
    share = 1 - (at.signal / following.signal) ** 2
    deviation = eta * following.noise / at.noise * share**0.5
    kept = (following.noise**2 - deviation**2) ** 0.5
    return noised(Levels(following.signal, kept), clean, eps) + deviation * fresh()
