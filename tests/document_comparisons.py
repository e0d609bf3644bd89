"""Synthetic comparisons whose losses vary over runs and over documents by known amounts.

    python -m tests.document_comparisons --count 500

prints, per case, the share of comparisons in which all joint intervals hold the true differences, with the
variance over documents and without it, the standard deviation of an estimated difference, and how much of its
variance is due to documents. A row of docs/results/error_rates.md is made by it. In each comparison seeds and
documents are drawn anew: the true difference is that over all seeds and all documents. The loss of a run on a
document is the arm's mean, plus the effect of the run, of the document, of arm and document, and of run and
document; documents differ in length as 50 to 400 targets do.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.document_variance import DocumentLosses, over_documents
from pretrain.comparison.simultaneous import Design, fit, half_widths, local_level
from tests.comparisons import Share, share_of

ALPHA, LOSS = 0.05, 3.6


@dataclass(frozen=True)
class DocumentCase:
    """How comparisons are drawn. Arm 0 is the baseline; no arm differs from it. Deviations are in nats."""

    arms: int
    seeds: int
    documents: int
    run: float = 0.022
    """Deviation of a run's mean loss."""
    document: float = 0.6
    """Deviation of a document's mean loss, the same in all runs."""
    arm_document: float = 0.15
    """Deviation of what an arm changes on single documents."""
    run_document: float = 0.1
    """Deviation of what a run changes on single documents."""

    @property
    def design(self) -> Design:
        """The complete design: every arm has every seed."""
        arm, seed = np.indices((self.arms, self.seeds)).reshape(2, -1)
        return Design(arm, seed, np.hstack((-np.ones((self.arms - 1, 1)), np.eye(self.arms - 1))))


@dataclass(frozen=True)
class DocumentRates:
    """How often intervals hold."""

    coverage: Share
    without_documents: Share
    deviation: float
    """Of an estimated difference, in nats."""
    share_of_documents: float
    """Share of the estimated variance that is due to documents."""


def draw(case: DocumentCase, generator: np.random.Generator) -> DocumentLosses:
    """The losses of one comparison, in one modality."""
    runs, count = case.arms * case.seeds, case.documents
    targets = np.rint(np.exp(generator.uniform(np.log(50), np.log(400), count)))
    losses = LOSS + case.document * generator.standard_normal(count)
    losses = losses + np.repeat(
        case.arm_document * generator.standard_normal((case.arms, count)), case.seeds, axis=0
    )
    losses = losses + case.run * generator.standard_normal((runs, 1))
    losses = losses + case.run_document * generator.standard_normal((runs, count))
    return DocumentLosses(losses * targets, targets)


def measure(case: DocumentCase, count: int, seed: int = 0) -> DocumentRates:
    """The rates over `count` comparisons."""
    generator, design = np.random.Generator(np.random.Philox(seed)), case.design
    level = local_level(design, ALPHA, 1)
    held, held_without, estimates, shares = [], [], [], []
    for _ in range(count):
        losses = draw(case, generator)
        fitted = fit(losses.losses[None], design)
        over = over_documents([losses], design)
        held.append(bool((np.abs(fitted.estimates) <= half_widths(fitted, level, over)).all()))
        held_without.append(bool((np.abs(fitted.estimates) <= half_widths(fitted, level)).all()))
        estimates.append(fitted.estimates[0])
        shares.append(float((over.variance / (over.variance + fitted.errors**2)).mean()))
    return DocumentRates(
        share_of(np.array(held)),
        share_of(np.array(held_without)),
        float(np.std(estimates)),
        float(np.mean(shares)),
    )


def cases() -> dict[str, DocumentCase]:
    """The cases of the table that `main` prints."""
    return {
        "2 arms x 5 seeds, 1,000 documents": DocumentCase(2, 5, 1000),
        "2 arms x 5 seeds, 226 documents": DocumentCase(2, 5, 226),
        "8 arms x 3 seeds, 1,000 documents": DocumentCase(8, 3, 1000),
        "8 arms x 3 seeds, 226 documents": DocumentCase(8, 3, 226),
        "8 arms x 3 seeds, 226 documents that arms change more": DocumentCase(8, 3, 226, arm_document=0.3),
        "2 arms x 5 seeds, 50 documents, quiet runs": DocumentCase(2, 5, 50, run=0.005),
        "8 arms x 3 seeds, documents that arms do not change": DocumentCase(8, 3, 226, arm_document=0.0),
        "8 arms x 3 seeds, runs that change documents alone": DocumentCase(
            8, 3, 226, run=0.0, arm_document=0.0, run_document=0.4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="comparisons per case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| case | all intervals hold | without documents | deviation | due to documents |")
    print("|---|---|---|---|---|")
    for name, case in cases().items():
        rates = measure(case, arguments.count, arguments.seed)
        cells = (name, rates.coverage, rates.without_documents, f"{rates.deviation:.4f}")
        print(f"| {' | '.join(map(str, cells))} | {100 * rates.share_of_documents:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
