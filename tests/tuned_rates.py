"""Synthetic comparisons whose learning rates a grid has chosen, to measure what the choice costs.

    python -m tests.tuned_rates --count 20000

prints, per case, how often a difference is claimed between arms that are equal at the best rate of the grid,
how often all intervals hold the differences at the rates that were chosen and at the best ones, how often an
arm was given the best rate, and how much loss the choice costs. The loss of an arm is a parabola over the
logarithm of the rate, with its minimum anywhere between two rates of the grid. Noise is that of real runs, as
in tests/comparisons.py.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from pretrain.comparison.simultaneous import Design, half_widths, local_level
from tests.comparisons import ALPHA, DEVIATION, LOSS, Share, analyse, share_of

SHARE_OF_TARGETS = np.array([0.4, 0.5, 0.1])
"""Weights of the modalities in the loss over all targets, by which a grid chooses."""


@dataclass(frozen=True)
class GridCase:
    """How comparisons are drawn. All arms have the same loss at every rate; arm 0 is the baseline."""

    curvature: float
    """Share by which the loss is higher at a factor of 2 from the best rate."""
    tuning_seeds: int = 3
    arms: int = 2
    seeds: int = 5
    rates: int = 5

    @property
    def design(self) -> Design:
        """The design of the runs that are compared."""
        arm, seed = np.divmod(np.arange(self.arms * self.seeds), self.seeds)
        return Design(arm, seed, np.hstack((-np.ones((self.arms - 1, 1)), np.eye(self.arms - 1))))


@dataclass(frozen=True)
class GridRates:
    """How often the statistics were right."""

    false_claims: Share
    """A difference is claimed, and there is none at the best rates."""
    at_chosen: Share
    """All intervals hold the difference at the rates that were chosen."""
    at_best: Share
    """All intervals hold the difference at the best rates, which is 0."""
    best_chosen: float
    """Share of the arms that were given the best rate of the grid."""
    regret: float
    """Mean share by which the loss at the chosen rate is above that at the best one."""


def all_of(holds: Bool[np.ndarray, "comparisons modalities contrasts"]) -> Bool[np.ndarray, " comparisons"]:
    """By comparison, whether all of its intervals hold."""
    return np.asarray(holds.reshape(len(holds), -1).all(axis=1))


def measure(case: GridCase, count: int, seed: int = 0) -> GridRates:
    """The rates over `count` comparisons of a case."""
    generator, design = np.random.Generator(np.random.Philox(seed)), case.design
    minimum = generator.uniform(-0.5, 0.5, (count, 1)) + case.rates // 2
    excess = case.curvature * (np.arange(case.rates) - minimum) ** 2  # comparisons x rates
    noise = generator.standard_normal((count, case.arms, case.seeds, case.rates, len(LOSS)))
    losses = LOSS * (1 + excess[:, None, None, :, None]) + DEVIATION * noise
    tried = (count, case.arms, case.tuning_seeds, case.rates, len(LOSS))
    tuning = LOSS * (1 + excess[:, None, None, :, None]) + DEVIATION * generator.standard_normal(tried)
    chosen: Int[np.ndarray, "comparisons arms"] = (tuning @ SHARE_OF_TARGETS).mean(axis=2).argmin(axis=2)
    best = excess.argmin(axis=1)
    final: Float[np.ndarray, "comparisons arms seeds modalities"] = np.take_along_axis(
        losses, chosen[:, :, None, None, None], axis=3
    )[:, :, :, 0]
    table = final.reshape(count, -1, len(LOSS)).swapaxes(1, 2)
    fitted = analyse(table, design)
    half = half_widths(fitted, local_level(design, ALPHA, len(LOSS))).reshape(count, len(LOSS), -1)
    estimates = fitted.estimates.reshape(half.shape)
    costs = np.take_along_axis(excess, chosen, axis=1)
    truth = LOSS[:, None] * (costs[:, 1:] - costs[:, :1])[:, None, :]
    return GridRates(
        false_claims=share_of(~all_of(np.abs(estimates) <= half)),
        at_chosen=share_of(all_of(np.abs(estimates - truth) <= half)),
        at_best=share_of(all_of(np.abs(estimates) <= half)),
        best_chosen=float((chosen == best[:, None]).mean()),
        regret=float((costs - excess.min(axis=1, keepdims=True)).mean()),
    )


def cases() -> dict[str, GridCase]:
    """The cases of the table in docs/results/error_rates.md."""
    out = {
        f"{100 * c:g} % at a factor of 2, {t} tuning seed{'s' * (t > 1)}": GridCase(c, t)
        for c in (0.0025, 0.01, 0.04)
        for t in (1, 2, 3)
    }
    out["1 %, 8 arms x 3 seeds, 3 tuning seeds"] = GridCase(0.01, 3, arms=8, seeds=3)
    return out


def row(name: str, rates: GridRates) -> str:
    """A row of the table."""
    shares = f"{rates.false_claims} | {rates.at_chosen} | {rates.at_best}"
    return f"| {name} | {shares} | {100 * rates.best_chosen:.0f} % | {100 * rates.regret:.2f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="comparisons per case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| case | false claim | holds at the chosen rates | at the best ones | best chosen | loss added |")
    print("|---|---|---|---|---|---|")
    for name, case in cases().items():
        print(row(name, measure(case, arguments.count, arguments.seed)), flush=True)


if __name__ == "__main__":
    main()
