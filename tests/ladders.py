"""Synthetic ladders, to measure how often the statistics of a ladder are right.

    python -m tests.ladders --count 500 --seed 0

prints, per case, the share of ladders with a false claim (family-wise error), the share in which all
intervals hold the true differences (joint coverage), and the share of true effects that were decided (power),
with 95 % intervals of the shares. Noise is that of real runs, as in tests/comparisons.py.

    python -m tests.ladders --fits 200

prints how often the 90 % intervals of a fitted law hold the numbers that synthetic losses were made with.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pretrain.comparison.ladder_effects import ladder_half_widths
from pretrain.comparison.scaling_fit import Law, Runs, fit_law
from pretrain.comparison.simultaneous import Design, fit, local_level
from tests.comparisons import ALPHA, DEVIATION, LOSS, Share, mean_of, share_of

SIZES = ("d24", "d48", "d96")
BUDGETS = ("4tpp", "16tpp", "64tpp", "250tpp")

Arm = tuple[str, str, str]
"""Size, budget and arm."""


@dataclass(frozen=True)
class LadderCase:
    """How ladders are drawn: two arms or more at all sizes and budgets."""

    seeds: int = 3
    arms: tuple[str, ...] = ("dense", "mot")
    effect: Callable[[Arm], float] = lambda arm: 0.0
    """True difference of an arm to the baseline, as a share of the loss."""
    spread: Callable[[Arm], float] = lambda arm: 1.0
    """Factor on the noise of an arm."""
    missing_share: float = 0.0
    """Share of the runs that are not there: the same ones in all ladders of a case."""

    @property
    def cells(self) -> list[tuple[str, str]]:
        return [(size, budget) for size in SIZES for budget in BUDGETS]

    @property
    def arms_of_cells(self) -> list[Arm]:
        """Every arm of every cell."""
        return [(*cell, arm) for cell in self.cells for arm in self.arms]

    @property
    def design(self) -> Design:
        """The design of the runs that are there."""
        num_arms, cells = len(self.arms_of_cells), len(self.cells)
        arm = np.repeat(np.arange(num_arms), self.seeds)
        seed = arm // len(self.arms) * self.seeds + np.tile(np.arange(self.seeds), num_arms)
        generator = np.random.Generator(np.random.Philox(11))
        there = generator.random(len(arm)) >= self.missing_share
        of_cell = np.hstack((-np.ones((len(self.arms) - 1, 1)), np.eye(len(self.arms) - 1)))
        _, seed = np.unique(seed[there], return_inverse=True)
        return Design(arm[there], seed, np.kron(np.eye(cells), of_cell))


@dataclass(frozen=True)
class LadderRates:
    """How often the statistics were right."""

    false_claims: Share
    coverage: Share
    power: Share
    """Not a number without a true effect."""
    half_width: float
    """Median half width of the intervals on text, in nats."""


def draw(case: LadderCase, count: int, seed: int) -> Float[np.ndarray, "ladders modalities runs"]:
    """Final losses."""
    generator, design = np.random.Generator(np.random.Philox(seed)), case.design
    means = np.array([1 + case.effect(arm) for arm in case.arms_of_cells])
    spread = np.array([case.spread(arm) for arm in case.arms_of_cells])
    noise = generator.standard_normal((count, len(LOSS), len(design.arm))) * spread[design.arm]
    return LOSS[:, None] * means[design.arm] + DEVIATION[:, None] * noise


def rates(case: LadderCase, count: int, seed: int) -> LadderRates:
    """How often the statistics are right over `count` ladders of a case."""
    design, losses = case.design, draw(case, count, seed)
    table = losses.reshape(-1, losses.shape[-1])
    level = local_level(design, ALPHA, len(LOSS))
    half = ladder_half_widths(table, design, case.arms_of_cells, level).reshape(count, len(LOSS), -1)
    estimates = fit(table, design).estimates.reshape(half.shape)
    means = np.array([case.effect(arm) for arm in case.arms_of_cells])
    truth = LOSS[:, None] * (design.weights @ means)
    known = np.isfinite(half)
    held = (np.abs(estimates - truth) <= half) | ~known
    decided = np.abs(estimates) > half
    wrong = decided & ((truth == 0) | (np.sign(estimates) != np.sign(truth)))
    seen = (decided & ~wrong)[:, np.abs(truth) > 0].reshape(count, -1)
    return LadderRates(
        false_claims=share_of(wrong.any(axis=(1, 2))),
        coverage=share_of(held.all(axis=(1, 2))),
        power=mean_of(seen),
        half_width=float(np.nanmedian(half[:, 0])),
    )


def turning(arm: Arm) -> float:
    """An effect that turns its sign: from 2 % worse at the smallest budget to 4 % better at the largest."""
    return 0.02 * (1 - BUDGETS.index(arm[1])) if arm[2] == "mot" else 0.0


CASES = {
    "nothing differs, 3 seeds": LadderCase(),
    "nothing differs, 5 seeds": LadderCase(seeds=5),
    "nothing differs, 4 arms": LadderCase(arms=("dense", "mot", "moe", "hybrid")),
    "nothing differs, 10 % of runs missing": LadderCase(missing_share=0.1),
    "smallest budget spreads twice as far": LadderCase(spread=lambda arm: 2.0 if arm[1] == "4tpp" else 1.0),
    "smallest size spreads twice as far": LadderCase(spread=lambda arm: 2.0 if arm[0] == "d24" else 1.0),
    "mot spreads twice as far": LadderCase(spread=lambda arm: 2.0 if arm[2] == "mot" else 1.0),
    "spreads halve from budget to budget": LadderCase(spread=lambda arm: 0.5 ** BUDGETS.index(arm[1])),
    "one cell spreads three times as far": LadderCase(
        spread=lambda arm: 3.0 if arm[:2] == ("d48", "16tpp") else 1.0
    ),
    "one arm of one cell spreads three times as far": LadderCase(
        spread=lambda arm: 3.0 if arm == ("d48", "16tpp", "mot") else 1.0
    ),
    "the sign turns, 2 % a budget": LadderCase(effect=turning),
    "the sign turns, 5 seeds": LadderCase(seeds=5, effect=turning),
}


def table_text(count: int, seed: int) -> str:
    """The rates of all cases as a Markdown table."""
    lines = [
        f"{len(SIZES)} sizes x {len(BUDGETS)} budgets, {count} ladders a case",
        "",
        "| case | false claim in | all intervals hold in | effects seen | half width, text |",
        "|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        found = rates(case, count, seed)
        lines.append(
            f"| {name} | {found.false_claims} | {found.coverage} | {found.power} | {found.half_width:.3f} |"
        )
    return "\n".join(lines)


LAW = Law(np.array([*np.log([1.5, 20.0, 60.0]), 0.35, 0.3]))
"""The law of synthetic losses: E 1.5, A 20, B 60, alpha 0.35, beta 0.3."""
FIT_SIZES, FIT_RATIOS = (1.4e4, 2.8e4, 5.5e4, 1.1e5, 2.2e5), (4, 16, 64, 250)
"""Parameters of the sizes, and tokens per parameter of the budgets."""
FIT_DEVIATION = 0.007
"""Standard deviation over seeds of log loss: .022 nats of 3.1."""
FIT_CONFIDENCE = 0.9


def law_runs(seed: int, *, seeds: int = 3, ratios: Sequence[int] = FIT_RATIOS) -> Runs:
    """Runs of a synthetic ladder that follows LAW."""
    cells = [(n, n * ratio) for n in FIT_SIZES for ratio in ratios]
    parameters, tokens = np.repeat(np.array(cells), seeds, axis=0).T
    noise = np.random.Generator(np.random.Philox(seed)).standard_normal(len(parameters))
    return Runs(parameters, tokens, LAW.loss(parameters, tokens) * np.exp(FIT_DEVIATION * noise))


def recovered(count: int, seed: int, *, draws: int = 200) -> dict[str, Share]:
    """By name of a number of the law, the share of fits whose interval holds it."""
    truth = LAW.named()
    held: dict[str, list[bool]] = {name: [] for name in truth}
    for trial in range(count):
        found = fit_law(law_runs(seed + trial), draws=draws)
        for name, value in truth.items():
            interval = found.interval(name, FIT_CONFIDENCE)
            held[name].append(interval.low <= value <= interval.high)
    return {name: share_of(np.array(hits)) for name, hits in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fits", type=int, default=0, help="number of fits of a known law")
    args = parser.parse_args()
    if args.fits:
        for name, share in recovered(args.fits, args.seed).items():
            print(f"{name}: in its {FIT_CONFIDENCE:.0%} interval in {share} of {args.fits} fits")
    else:
        print(table_text(args.count, args.seed))


if __name__ == "__main__":
    main()
