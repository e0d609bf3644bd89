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
from pretrain.comparison.ladder_effects import ladder_half_widths
from pretrain.comparison.simultaneous import Design, OverDocuments, fit, half_widths, local_level
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


CELLS = 12
"""Cells of a synthetic ladder: 3 sizes x 4 budgets, of two arms and three seeds."""


@dataclass(frozen=True)
class LadderDocumentCase:
    """How ladders are drawn whose cells are all judged on the same documents. No arm differs."""

    documents: int
    alike: float
    """Share of the variance of what an arm changes on single documents that is the same in all cells."""
    of_cell: DocumentCase = DocumentCase(2, 3, 0)


def measure_ladder(case: LadderDocumentCase, count: int, seed: int = 0) -> DocumentRates:
    """The rates over `count` ladders, in one modality."""
    generator, one = np.random.Generator(np.random.Philox(seed)), case.of_cell
    cell, number = one.design, len(one.design.arm)
    which = np.repeat(np.arange(CELLS), number)
    design = Design(
        np.tile(cell.arm, CELLS) + one.arms * which,
        np.tile(cell.seed, CELLS) + one.seeds * which,
        np.kron(np.eye(CELLS), cell.weights),
    )
    arms = [(f"size {c // 4}", f"budget {c % 4}", f"arm {a}") for c in range(CELLS) for a in range(one.arms)]
    level = local_level(design, ALPHA, 1)
    held, held_without, estimates, shares = [], [], [], []
    for _ in range(count):
        losses = _draw_ladder(case, generator)
        found = [over_documents([of_cell], cell) for of_cell in losses]
        over = OverDocuments(np.hstack([of.variance for of in found]), found[0].dof)
        table = np.hstack([of_cell.losses for of_cell in losses])[None]
        fitted = fit(table, design)
        both = (ladder_half_widths(table, design, arms, level, of) for of in (over, None))
        for hits, half in zip((held, held_without), both, strict=True):
            hits.append(bool((np.abs(fitted.estimates) <= half).all()))
        estimates.append(fitted.estimates[0])
        shares.append(float((over.variance / (over.variance + fitted.errors**2)).mean()))
    return DocumentRates(
        share_of(np.array(held)),
        share_of(np.array(held_without)),
        float(np.std(estimates)),
        float(np.mean(shares)),
    )


def _draw_ladder(case: LadderDocumentCase, generator: np.random.Generator) -> list[DocumentLosses]:
    """By cell, the losses of its runs on the documents."""
    one, count = case.of_cell, case.documents
    targets = np.rint(np.exp(generator.uniform(np.log(50), np.log(400), count)))
    hard = LOSS + one.document * generator.standard_normal(count)
    common = generator.standard_normal((one.arms, count))
    cells = []
    for _ in range(CELLS):
        own = generator.standard_normal((one.arms, count))
        of_arms = one.arm_document * (np.sqrt(case.alike) * common + np.sqrt(1 - case.alike) * own)
        losses = hard + np.repeat(of_arms, one.seeds, axis=0)
        losses = losses + one.run * generator.standard_normal((len(losses), 1))
        losses = losses + one.run_document * generator.standard_normal(losses.shape)
        cells.append(DocumentLosses(losses * targets, targets))
    return cells


def ladder_cases() -> dict[str, LadderDocumentCase]:
    """The cases of ladders that `main` prints."""
    return {
        "ladder of 12 cells, 1,000 documents that arms change alike in all": LadderDocumentCase(1000, 1.0),
        "ladder, 226 documents that arms change alike in all cells": LadderDocumentCase(226, 1.0),
        "ladder, 226 documents that arms change alike by half": LadderDocumentCase(226, 0.5),
        "ladder, 226 documents that arms change anew in every cell": LadderDocumentCase(226, 0.0),
    }


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
    measured = {name: measure(case, arguments.count, arguments.seed) for name, case in cases().items()}
    for name, case in ladder_cases().items():
        measured[name] = measure_ladder(case, arguments.count, arguments.seed)
    for name, rates in measured.items():
        cells = (name, rates.coverage, rates.without_documents, f"{rates.deviation:.4f}")
        print(f"| {' | '.join(map(str, cells))} | {100 * rates.share_of_documents:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
