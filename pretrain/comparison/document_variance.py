"""Pure functions estimate how far differences between arms would move with other held-out documents.

All runs are judged on the same documents, so a document's losses in two arms are a pair, and what counts is
the variance of their difference over documents: a document that is hard for every arm moves no difference.
Runs and documents are crossed random effects. A difference of arms has the variance of runs (over the number
of seeds), which pretrain/comparison/simultaneous.py estimates from the runs' losses on these documents, plus
the variance over documents (over the number of documents). More seeds do not lessen the second. What a seed
changes on single documents is in both estimates, so it is taken out of the second once (Cornfield and Tukey
1956: the variance of a mean over crossed factors). This module imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from pretrain.comparison.simultaneous import Design, OverDocuments


@dataclass(frozen=True)
class DocumentLosses:
    """Sums of losses of all runs over the targets of every document, in one modality."""

    nats: Float[np.ndarray, "runs documents"]
    targets: Float[np.ndarray, " documents"]
    """Number of targets, equal in all runs."""

    @property
    def losses(self) -> Float[np.ndarray, " runs"]:
        """By run, the loss per target over all documents."""
        return self.nats.sum(axis=1) / self.targets.sum()

    def of_runs(self, chosen: Bool[np.ndarray, " runs"]) -> "DocumentLosses":
        """The losses of some of the runs."""
        return DocumentLosses(self.nats[chosen], self.targets)


def over_documents(outcomes: Sequence[DocumentLosses], design: Design) -> OverDocuments:
    """The variance over documents of the estimates of a design, by outcome and contrast."""
    both = [_variances(one, design) for one in outcomes]
    dof = [int((one.targets > 0).sum()) - 1 for one in outcomes]
    return OverDocuments(np.array(both).reshape(len(outcomes), -1), np.array(dof))


def _variances(one: DocumentLosses, design: Design) -> Float[np.ndarray, " contrasts"]:
    """The variance over documents of every contrast of arms' mean losses.

    A loss per target is a ratio of sums, so a document counts by its residual: its nats less its targets at
    the mean loss (the linearised ratio estimator; Cochran 1977, section 6.3).
    """
    there = one.targets > 0
    nats, targets = one.nats[:, there], one.targets[there]
    count, total = len(targets), targets.sum()
    if count < 2:
        return np.zeros(len(design.weights))
    residuals = nats - np.outer(nats.sum(axis=1) / total, targets)
    arms, _ = design.indicators
    means = (arms / design.num_runs).T @ residuals
    scale = count / (count - 1) / total**2
    of_contrasts = scale * ((design.weights @ means) ** 2).sum(axis=1)
    within = residuals - arms @ means
    dof = np.maximum(design.num_runs - 1, 1)
    # An arm of one run tells nothing of what seeds change on single documents, and nothing is taken out.
    of_seeds = scale * (arms.T @ (within**2).sum(axis=1)) / dof
    spread_of_seeds = design.weights**2 @ (of_seeds / design.num_runs)
    return np.maximum(of_contrasts - spread_of_seeds, 0.0)
