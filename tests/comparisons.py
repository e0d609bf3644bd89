"""Synthetic comparisons, to measure how often the statistics of `motley compare` are right.

    python -m tests.comparisons --count 500

prints, per case, the share of comparisons with a false claim (family-wise error), the share in which all
intervals hold the true differences (joint coverage), the share of true effects that were decided (power), the
same by Holm's procedure over single tests, and the median half width on text. Losses and noise are those of
real runs (docs/results/sparse_family): standard deviation over runs .022 nats on text, .017 on images, .045
on speech, and an autoregression of order 1 along the evaluations of a run. All comparisons of a case are
drawn at once, so 500 of every case take seconds.

    python -m tests.comparisons --of sparse_family

prints the effects in a comparison whose final losses are in docs/results, by the statistics of this version.
"""

import argparse
import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy import stats

from data_pipeline.files.toml_config import load_toml, validate
from pretrain.comparison.config import CompareConfig
from pretrain.comparison.effects import Effect, Run, effects
from pretrain.comparison.simultaneous import Design, Fit, fit, half_widths, local_level

MODALITIES = ("text", "image", "speech")
LOSS = np.array([3.64, 1.39, 3.58])
DEVIATION = np.array([0.022, 0.017, 0.045])
EVALUATIONS, AUTOREGRESSION = 16, 0.8
ALPHA = 0.05


@dataclass(frozen=True)
class Case:
    """How comparisons are drawn. Arm 0 is the baseline; every other arm is compared with it."""

    arms: int
    seeds: int
    effects: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """True effects by (arm, modality), as a share of the loss."""
    spread: Mapping[int, float] = field(default_factory=dict)
    """Factors on the noise of an arm."""
    heavy: bool = False
    """Whether noise is Student's t with 3 degrees of freedom, scaled to the same deviation."""
    seed_ratio: float = 0.0
    """Variance of the effect of a seed over the variance of the noise."""
    more_baseline_seeds: int = 0
    missing: tuple[tuple[int, int], ...] = ()
    """(arm, seed) of runs that are not there."""

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(arm, seed) of every run."""
        grid = [(arm, seed) for seed in range(self.seeds) for arm in range(self.arms)]
        more = [(0, self.seeds + i) for i in range(self.more_baseline_seeds)]
        return [run for run in grid + more if run not in self.missing]

    @property
    def design(self) -> Design:
        arm, seed = np.array(self.runs).T
        weights = np.hstack((-np.ones((self.arms - 1, 1)), np.eye(self.arms - 1)))
        return Design(arm, seed, weights)

    @property
    def truth(self) -> Float[np.ndarray, "modalities contrasts"]:
        """The true differences to the baseline, in nats."""
        out = np.zeros((len(LOSS), self.arms - 1))
        for (arm, modality), share in self.effects.items():
            out[modality, arm - 1] = share * LOSS[modality]
        return out


@dataclass(frozen=True)
class Rates:
    """How often the statistics were right."""

    false_claims: float
    coverage: float
    power: float
    holm_false_claims: float
    holm_power: float
    half_width: float
    """Median half width of the intervals on text, in nats."""


def draw(case: Case, count: int, seed: int) -> Float[np.ndarray, "comparisons modalities runs"]:
    """Losses at the last evaluation."""
    generator = np.random.Generator(np.random.Philox(seed))
    shape = (EVALUATIONS, count, len(LOSS), len(case.runs))
    steps = generator.standard_t(3, shape) / np.sqrt(3) if case.heavy else generator.standard_normal(shape)
    noise = steps[0]
    for step in steps[1:]:
        noise = AUTOREGRESSION * noise + np.sqrt(1 - AUTOREGRESSION**2) * step
    arm, seed_of = np.array(case.runs).T
    noise = noise * np.array([case.spread.get(a, 1.0) for a in range(case.arms)])[arm]
    shared = np.sqrt(case.seed_ratio) * generator.standard_normal((count, len(LOSS), seed_of.max() + 1))
    means = np.hstack((np.zeros((len(LOSS), 1)), case.truth)) + LOSS[:, None]
    return means[:, arm] + DEVIATION[:, None] * (noise + shared[:, :, seed_of])


def analyse(losses: Float[np.ndarray, "comparisons modalities runs"], design: Design) -> Fit:
    """The fits of all comparisons; (comparison, modality) is one axis."""
    return fit(losses.reshape(-1, losses.shape[-1]), design)


def holm(p: Float[np.ndarray, "comparisons tests"], alpha: float) -> np.ndarray:
    """Which tests Holm's procedure rejects."""
    order = np.argsort(p, axis=1)
    steps = np.take_along_axis(p, order, axis=1) <= alpha / np.arange(p.shape[1], 0, -1)
    rejected = np.zeros_like(steps)
    np.put_along_axis(rejected, order, np.logical_and.accumulate(steps, axis=1), axis=1)
    return rejected


def measure(case: Case, count: int, seed: int = 0) -> Rates:
    """The rates over `count` comparisons."""
    design = case.design
    fitted = analyse(draw(case, count, seed), design)
    half = half_widths(fitted, local_level(design, ALPHA, len(LOSS))).reshape(count, -1)
    estimates, truth = fitted.estimates.reshape(count, -1), case.truth.reshape(-1)
    decided = np.abs(estimates) > half
    wrong = decided & ((truth == 0) | (np.sign(estimates) != np.sign(truth)))
    covered = (np.abs(estimates - truth) <= half).all(axis=1)
    p = 2 * stats.t.sf(np.abs(fitted.estimates / fitted.errors), fitted.dof)
    welch = 2 * stats.t.sf(np.abs(fitted.estimates / fitted.welch_errors), fitted.welch_dof)
    p = np.where(fitted.spreads_differ, np.maximum(p, welch), p).reshape(count, -1)
    by_holm = holm(p, ALPHA)
    real = truth != 0
    return Rates(
        false_claims=float(wrong.any(axis=1).mean()),
        coverage=float(covered.mean()),
        power=float((decided & ~wrong)[:, real].mean()) if real.any() else float("nan"),
        holm_false_claims=float(by_holm[:, ~real].any(axis=1).mean()),
        holm_power=float(by_holm[:, real].mean()) if real.any() else float("nan"),
        half_width=float(np.median(half[:, : case.arms - 1])),
    )


def cases() -> dict[str, Case]:
    """The cases of the table that `main` prints."""
    eight = Case(8, 3)
    out = {f"null, {a} arms x {s} seeds": Case(a, s) for a in (2, 3, 8, 12) for s in (3, 5)}
    out["null, 8 arms x 2 seeds (no verdict is given)"] = Case(8, 2)
    out |= {
        "2 % on text in 1 of 8 arms": replace(eight, effects={(1, 0): 0.02}),
        "2 % on text in 7 of 8 arms": replace(eight, effects={(a, 0): 0.02 for a in range(1, 8)}),
        "2 % on text, 2 arms x 5 seeds": Case(2, 5, effects={(1, 0): 0.02}),
        "20 % everywhere but one": replace(
            eight, effects={(a, m): 0.2 for a in range(1, 8) for m in range(3) if (a, m) != (1, 0)}
        ),
        "an arm spreads 3 times as far": replace(eight, spread={1: 3.0}),
        "the same, 5 seeds": replace(eight, seeds=5, spread={1: 3.0}),
        "the baseline spreads 3 times as far": replace(eight, spread={0: 3.0}),
        "the same, 5 seeds of each arm": replace(eight, seeds=5, spread={0: 3.0}),
        "2 arms x 5 seeds, one spreads 3 times as far": Case(2, 5, spread={1: 3.0}),
        "heavy tails": replace(eight, heavy=True),
        "a missing run": replace(eight, missing=((3, 1),)),
        "a missing run of the baseline": replace(eight, missing=((0, 1),)),
        "a missing run, seeds matter": replace(eight, missing=((0, 1),), seed_ratio=1.0),
        "seeds matter": replace(eight, seed_ratio=1.0),
        "3 more seeds of the baseline": replace(eight, more_baseline_seeds=3),
        "3 more seeds of the baseline, 2 % on text": replace(
            eight, more_baseline_seeds=3, effects={(1, 0): 0.02}
        ),
        "3 more seeds of the baseline, seeds matter": replace(eight, more_baseline_seeds=3, seed_ratio=1.0),
        "2 arms x 3 seeds, 5 more of the baseline": Case(2, 3, more_baseline_seeds=5),
        "the same, seeds matter a little": Case(2, 3, more_baseline_seeds=5, seed_ratio=0.3),
        "the same, seeds matter": Case(2, 3, more_baseline_seeds=5, seed_ratio=1.0),
        "the same, seeds matter more than anything": Case(2, 3, more_baseline_seeds=5, seed_ratio=10.0),
    }
    return out


def effects_of(name: str) -> dict[tuple[str, str], Effect]:
    """By (contrast, modality), the effects in docs/results/<name>/final.csv."""
    file = Path(f"pretrain/configs/compare/{name}.toml")
    config = validate(CompareConfig, load_toml(file), source=str(file))
    losses: dict[str, dict[Run, float]] = {modality: {} for modality in MODALITIES}
    with Path(f"docs/results/{name}/final.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["metric"] in losses:
                run = row["arm"], int(row["seed"])
                losses[row["metric"]][run] = float(row["loss_nats_per_token"])
    runs = list(losses[MODALITIES[0]])
    table = {modality: [by_run[run] for run in runs] for modality, by_run in losses.items()}
    return effects(config, runs, table, family=MODALITIES)


def print_effects(name: str) -> None:
    """Print the effects in a comparison of docs/results, a line each."""
    for (contrast, modality), effect in effects_of(name).items():
        interval = effect.interval
        bounds = f"{interval.low:+.3f} to {interval.high:+.3f}" if interval else ""
        share = f"{100 * effect.relative:+.1f} %"
        spread = "  (Welch)" if effect.spreads_differ else ""
        print(f"{contrast:20} {modality:8} {effect.estimate:+.3f} {share:>8}  {bounds:18}", end=" ")
        print(f"{effect.outcome}{spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="comparisons per case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", metavar="NAME", help="print the effects in docs/results/NAME instead")
    arguments = parser.parse_args()
    if arguments.of:
        return print_effects(arguments.of)
    print(f"{'':48} false  joint cover  power  Holm: false  power  half width")
    for name, case in cases().items():
        r = measure(case, arguments.count, arguments.seed)
        print(
            f"{name:48} {r.false_claims:5.3f}  {r.coverage:11.3f}  {r.power:5.2f}  "
            f"{r.holm_false_claims:11.3f}  {r.holm_power:5.2f}  {r.half_width:10.3f}"
        )


if __name__ == "__main__":
    main()
