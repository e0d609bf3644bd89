"""The Frechet distance between the features of two sets of pictures, as FID computes it (Heusel et al. 2017).

FID takes features of an Inception network, which needs its weights. Here they are those of the judge of the
demo corpus (data_pipeline/demo/picture_judge.py), so distances are comparable with each other and with no
FID.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "pictures features"]


class PictureDistance(NamedTuple):
    """Frechet distances to the same pictures of held-out scans."""

    samples: float
    truths: float
    """Of the true pictures of the prompts, which are as many as the samples: what perfect samples reach."""


def frechet_distance(a: Features, b: Features) -> float:
    """The squared Frechet distance between normal distributions with the means and covariances of two sets:
    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)).

    A set has two pictures or more. The distance of few pictures is too large, by an amount that depends
    on their number.
    """
    means = a.mean(axis=0) - b.mean(axis=0)
    first, second = (np.cov(each, rowvar=False) for each in (a.astype(np.float64), b.astype(np.float64)))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2).
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    distance = float(means @ means + np.trace(first) + np.trace(second) - 2 * shared)
    return max(distance, 0.0)  # rounding may leave less
