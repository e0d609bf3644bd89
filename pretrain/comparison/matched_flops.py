"""How many steps each arm of a comparison makes for the training FLOPs of its baseline. Imports no torch.

FLOPs are the ledger's, with the tokens that the arms will see on average: those of the training shards, of
whose documents the index knows the lengths. Padding is the same share of every arm's slots and falls out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.config import RunConfig
from pretrain.models.accounting import train_flops
from pretrain.models.depth_accounting import over_run

TOLERANCE = 0.005
"""Share of the baseline's FLOPs by which an arm's may differ."""
_TOKENS = 1_000_000


@dataclass(frozen=True)
class Mix:
    """What a million tokens of the training data are."""

    tokens: dict[str, int]
    """Modality -> how many."""
    visible_pairs: int


def expected_mix(config: RunConfig) -> Mix:
    """Of the sources' documents, drawn by their weights. Raises ConfigError for shards that are missing."""
    from data_pipeline.shards.index import TokenSource  # numpy; only comparisons that match FLOPs need it

    tokens, pairs, context = dict.fromkeys(config.model.modalities, 0.0), 0.0, config.model.context_tokens
    weights = sum(source.weight for source in config.data.train)
    for each in config.data.train:
        source = TokenSource.open(Path(each.path))
        share = each.weight / weights / source.num_documents
        for modality, count in source.manifest["tokens"].items():
            tokens[modality] = tokens.get(modality, 0.0) + share * count
        # A document of n ids fills n - 1 slots; a long one is cut into parts of a context.
        slots = source.lengths.astype(float) - 1
        whole, rest = slots // context, slots % context
        pairs += share * float((whole * context * (context + 1) / 2 + rest * (rest + 1) / 2).sum())
    total = sum(tokens.values())
    scale = _TOKENS / total
    return Mix({m: round(count * scale) for m, count in tokens.items()}, round(pairs * scale))


def matched(runs: Sequence[tuple[str, RunConfig]], baseline: str, source: str) -> list[RunConfig]:
    """The runs of (arm, config) with as many steps as the baseline of their seed has FLOPs for; warm-ups keep
    their share of the steps, as the rest of the schedule does by itself.

    Raises ConfigError, with the numbers, where whole steps come no closer than TOLERANCE.
    """
    mix = expected_mix(runs[0][1])
    of_baseline = {config.seed: config for arm, config in runs if arm == baseline}
    return [_stretched(arm, config, of_baseline[config.seed], mix, source) for arm, config in runs]


def step_flops(config: RunConfig, mix: Mix) -> Fraction:
    """Training FLOPs of a step whose slots all hold a token."""
    skipped = over_run(config.model, mix.tokens, mix.visible_pairs)
    flops = train_flops(config.model, mix.tokens, mix.visible_pairs, skipped=skipped)
    return Fraction(flops * config.tokens_per_step, _TOKENS)


def _stretched(arm: str, config: RunConfig, base: RunConfig, mix: Mix, source: str) -> RunConfig:
    budget, each = base.num_steps * step_flops(base, mix), step_flops(config, mix)
    steps = max(1, round(budget / each))
    off = float(steps * each / budget) - 1
    if abs(off) > TOLERANCE:
        needed = -(-each // (2 * Fraction(TOLERANCE).limit_denominator() * step_flops(base, mix)))
        raise ConfigError(
            f'{source}: match = "train_flops": arms."{arm}" costs {float(each):.4g} FLOPs a step, the '
            f"baseline {float(step_flops(base, mix)):.4g}; for its {base.num_steps} steps {steps} come "
            f"closest, {100 * off:+.2f} % off, more than {100 * TOLERANCE:g} %; set total_tokens to at least "
            f"{needed * base.tokens_per_step} ({needed} steps of the baseline)"
        )
    schedule = config.optimizer.schedule
    values = config.model_dump()
    values["total_tokens"] = steps * config.tokens_per_step
    values["optimizer"]["schedule"]["warmup_steps"] = round(schedule.warmup_steps * steps / base.num_steps)
    return validate(RunConfig, values, source=f'{source}: arms."{arm}" of {steps} steps')
