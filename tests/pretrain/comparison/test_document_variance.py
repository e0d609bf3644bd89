"""The variance over documents, on data of known variances."""

from dataclasses import replace

import numpy as np
import pytest

from pretrain.comparison.document_variance import DocumentLosses, over_documents
from tests.document_comparisons import DocumentCase, draw, measure


def test_the_estimate_is_the_variance_that_was_drawn() -> None:
    """Two arms: the difference of arms on a document has the variance 2 t^2, and targets differ in number."""
    case = DocumentCase(2, 5, 400, arm_document=0.2)
    generator = np.random.Generator(np.random.Philox(1))
    estimates, expected = [], []
    for _ in range(100):
        losses = draw(case, generator)
        over = over_documents([losses], case.design)
        assert over.dof.tolist() == [399]
        estimates.append(over.variance[0, 0])
        shares = losses.targets / losses.targets.sum()
        expected.append(2 * 0.2**2 * float((shares**2).sum()))
    # Measured with three seeds: 1.022, 0.995, 0.993; an estimate has a relative deviation of 11 %.
    assert np.mean(estimates) / np.mean(expected) == pytest.approx(1, abs=0.05)


def test_what_all_runs_share_moves_no_difference_and_one_document_tells_nothing() -> None:
    case = DocumentCase(2, 3, 200, arm_document=0.0, run_document=0.0)
    losses = draw(case, np.random.Generator(np.random.Philox(2)))
    over = over_documents([losses], case.design)
    assert over.variance[0, 0] == pytest.approx(0, abs=1e-9)  # documents differ by 0.6 nats
    lone = DocumentLosses(losses.nats[:, :1], losses.targets[:1])
    assert over_documents([lone], case.design).variance.tolist() == [[0.0]]


def test_intervals_hold_with_documents_and_do_not_without() -> None:
    """Few documents, and runs that are alike: nine tenths of the variance is due to documents."""
    case = DocumentCase(2, 5, 50, run=0.005)
    rates = measure(case, 300)
    # Measured with 1,000: 0.958 and 0.572. 300 have a standard error of 0.012 and 0.029.
    assert 0.91 < rates.coverage.value < 0.99
    assert rates.without_documents.value < 0.7
    assert rates.share_of_documents > 0.8


def test_documents_without_targets_count_as_none() -> None:
    case = DocumentCase(2, 3, 100)
    losses = draw(case, np.random.Generator(np.random.Philox(3)))
    padded = DocumentLosses(
        np.hstack((losses.nats, np.zeros((6, 20)))), np.concatenate((losses.targets, np.zeros(20)))
    )
    both = [over_documents([one], case.design) for one in (losses, padded)]
    assert both[0].variance == pytest.approx(both[1].variance, abs=1e-15)
    assert both[1].dof.tolist() == [99]


def test_what_seeds_change_on_documents_is_not_counted_twice() -> None:
    """Runs that differ on single documents alone: the spread of runs holds all of that already."""
    case = DocumentCase(8, 3, 226, run=0.0, arm_document=0.0, run_document=0.4)
    rates = measure(replace(case, arms=2, seeds=5), 200)
    assert rates.share_of_documents < 0.25  # measured 0.07; it would be a half
