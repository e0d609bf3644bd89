"""Synthetic timing rounds, to measure how often the interval of a share of seconds holds the true one.

    python -m tests.timed_ratios --count 10000

A share of seconds is a share of steps, which differs between seeds, times the ratio of the seconds of a step,
which differs between timing rounds. Logarithms of both are normal, or Student's t with 3 degrees of freedom
and the same deviation. A slow spell of the machine moves both arms of a round alike.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.statistics import ratio_over_seeds
from pretrain.comparison.step_timing import over_rounds
from tests.comparisons import Share, share_of

SHARE, RATIO, CONFIDENCE = 0.8, 1.1, 0.95
"""True share of steps, and true ratio of the seconds of a step."""
SPELL = 0.2
"""Standard deviation of the logarithm of what slows both arms of a round."""


@dataclass(frozen=True)
class TimingCase:
    """How shares of seconds are drawn."""

    seeds: int
    rounds: int
    deviation: float
    """Of the logarithm of the share of steps, over seeds."""
    of_rounds: float
    """Of the logarithm of the seconds of an arm, over rounds, beside what both arms share."""
    heavy: bool = False


def cases() -> dict[str, TimingCase]:
    """The cases of the table in docs/results/error_rates.md."""
    return {
        "5 seeds that differ by 5 %, 5 rounds by 1 %": TimingCase(5, 5, 0.05, 0.01),
        "5 seeds that differ by 5 %, 5 rounds by 5 %": TimingCase(5, 5, 0.05, 0.05),
        "5 seeds that differ by 1 %, 5 rounds by 5 %": TimingCase(5, 5, 0.01, 0.05),
        "3 seeds that differ by 5 %, 5 rounds by 5 %": TimingCase(3, 5, 0.05, 0.05),
        "5 seeds, 9 rounds, all by 5 %": TimingCase(5, 9, 0.05, 0.05),
        "5 seeds, 5 rounds, all by 5 %, heavy tails": TimingCase(5, 5, 0.05, 0.05, heavy=True),
    }


def measure(case: TimingCase, count: int, seed: int = 0) -> tuple[Share, Share]:
    """How often the interval holds the true share of seconds, and how often that over seeds alone does."""
    generator = np.random.Generator(np.random.Philox(seed))

    def noise(*shape: int) -> np.ndarray:
        drawn = (
            generator.standard_t(3, shape) / np.sqrt(3) if case.heavy else generator.standard_normal(shape)
        )
        return np.asarray(drawn)

    held, alone = np.zeros(count, bool), np.zeros(count, bool)
    for trial in range(count):
        spell = SPELL * noise(case.rounds)
        base = np.exp(spell + case.of_rounds * noise(case.rounds))
        other = RATIO * np.exp(spell + case.of_rounds * noise(case.rounds))
        steps = SHARE * np.exp(case.deviation * noise(case.seeds))
        rounds = ratio_over_seeds([float(ratio) for ratio in other / base], CONFIDENCE)
        assert rounds is not None
        seeds = ratio_over_seeds([float(rounds.value * share) for share in steps], CONFIDENCE)
        both = over_rounds(seeds, rounds, CONFIDENCE)
        for hits, found in ((held, both), (alone, seeds)):
            assert found is not None and found.interval is not None
            hits[trial] = found.interval.low <= SHARE * RATIO <= found.interval.high
    return share_of(held), share_of(alone)


def row(name: str, shares: tuple[Share, Share]) -> str:
    """A row of the table."""
    return f"| {name} | {shares[0]} | {shares[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="draws per case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| case | the interval holds | that over seeds alone |\n|---|---|---|")
    for name, case in cases().items():
        print(row(name, measure(case, arguments.count, arguments.seed)), flush=True)


if __name__ == "__main__":
    main()
