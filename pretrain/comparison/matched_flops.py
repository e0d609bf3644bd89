"""The number of steps with which an arm of a comparison spends the training FLOPs of the baseline.

FLOPs are counted by the ledger (pretrain/models/accounting.py) for the average token of the training shards,
whose index holds the length of every document. Padding is the same share of all arms' slots and cancels. This
module imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.run_length import with_steps
from pretrain.config import RunConfig
from pretrain.models.accounting import train_flops
from pretrain.models.depth_accounting import over_run

TOLERANCE = 0.005
"""Largest difference of an arm's FLOPs from the baseline's, as a share of the baseline's."""
UNITS = {"train_flops": "FLOPs", "seconds": "seconds"}
"""What a budget is counted in."""
_TOKENS = 1_000_000


@dataclass(frozen=True)
class Mix:
    """The composition of a million tokens of training data."""

    tokens: dict[str, int]
    """Number of tokens by modality."""
    visible_pairs: int
    """Number of (query, key) pairs that attention sees."""


def expected_mix(config: RunConfig) -> Mix:
    """The mix of a run's training data over its weighted sources. Raises ConfigError for missing shards."""
    from pretrain.training_stream import training_stream  # numpy; only comparisons that match FLOPs need it

    tokens, pairs, context = dict.fromkeys(config.model.modalities, 0.0), 0.0, config.model.context_tokens
    stream = training_stream(config)
    for source, of_documents in zip(stream.sources, stream.shares, strict=True):
        share = float(of_documents) / source.num_documents
        for modality, count in source.manifest["tokens"].items():
            tokens[modality] = tokens.get(modality, 0.0) + share * count
        # A document of n ids fills n - 1 slots; a long one is cut into parts of context_tokens.
        slots = source.lengths.astype(float) - 1
        whole, rest = slots // context, slots % context
        pairs += share * float((whole * context * (context + 1) / 2 + rest * (rest + 1) / 2).sum())
    total = sum(tokens.values())
    scale = _TOKENS / total
    return Mix({m: round(count * scale) for m, count in tokens.items()}, round(pairs * scale))


def match_flops(runs: Sequence[tuple[str, RunConfig]], baseline: str, source: str) -> list[RunConfig]:
    """The configs of (arm, config) with the number of steps that spends the FLOPs of their seed's baseline.

    Raises ConfigError, with the numbers, if no whole number of steps comes within TOLERANCE.
    """
    mix = expected_mix(runs[0][1])
    return match_budgets(
        runs, baseline, lambda _, config: step_flops(config, mix), match="train_flops", source=source
    )


def match_budgets(
    runs: Sequence[tuple[str, RunConfig]],
    baseline: str,
    cost: Callable[[str, RunConfig], Fraction],
    *,
    match: Literal["train_flops", "seconds"],
    source: str,
) -> list[RunConfig]:
    """The configs of (arm, config) with the number of steps that costs what their seed's baseline costs.

    `cost`: what a step of an arm costs. Warm-up keeps its share of the steps; the rest of the schedule is
    defined by shares. Raises ConfigError, with the numbers, if no whole number comes within TOLERANCE.
    """
    of_baseline = {config.seed: config for arm, config in runs if arm == baseline}
    matched = []
    for arm, config in runs:
        base = of_baseline[config.seed]
        costs = cost(baseline, base), cost(arm, config)
        matched.append(_stretched(arm, config, base, costs, match, source))
    return matched


def step_flops(config: RunConfig, mix: Mix) -> Fraction:
    """Training FLOPs of an optimizer step whose slots all hold a token."""
    skipped = over_run(config.model, mix.tokens, mix.visible_pairs)
    flops = train_flops(config.model, mix.tokens, mix.visible_pairs, skipped=skipped)
    return Fraction(flops * config.tokens_per_step, _TOKENS)


def _stretched(
    arm: str, config: RunConfig, base: RunConfig, costs: tuple[Fraction, Fraction], match: str, source: str
) -> RunConfig:
    """The config of an arm with as many steps as the budget of `base` allows. `costs`: of a step of both."""
    base_cost, arm_cost = costs
    budget = base.num_steps * base_cost
    steps = max(1, round(budget / arm_cost))
    off = float(steps * arm_cost / budget) - 1
    if abs(off) > TOLERANCE:
        needed = -(-arm_cost // (2 * Fraction(TOLERANCE).limit_denominator() * base_cost))
        raise ConfigError(
            f'{source}: match = "{match}": arms."{arm}" costs {float(arm_cost):.4g} {UNITS[match]} a step, '
            f"the baseline {float(base_cost):.4g}; for its {base.num_steps} steps {steps} come "
            f"closest, {100 * off:+.2f} % off, more than {100 * TOLERANCE:g} %; set total_tokens to at least "
            f"{needed * base.tokens_per_step} ({needed} steps of the baseline)"
        )
    return with_steps(config, steps, base.num_steps, source=f'{source}: arms."{arm}" of {steps} steps')
