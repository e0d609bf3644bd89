"""The machine-readable files of a report: summary.json and the CSV files. This module imports no torch."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pretrain.comparison.caveats import caveats
from pretrain.comparison.costs import step_time_ratio, systems
from pretrain.comparison.effects import Effect
from pretrain.comparison.facts import Fact
from pretrain.comparison.findings import ArmLoss, Contrast, Findings
from pretrain.comparison.foreign.question import Plan
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.report.digest import SUMMARY_FORMAT
from pretrain.comparison.report.rate_table import rate_values
from pretrain.comparison.results import AXES, HELD_OUT
from pretrain.comparison.statistics import Interval, RatioEstimate
from pretrain.comparison.verdict import (
    difference_text,
    headline,
    named_effects,
    outcome_text,
    overall,
    runs_text,
    verdict,
)
from pretrain.quantities import signed

CURVE_COLUMNS = ("arm", "seed", "step", "tokens", "train_flops", "train_s", "metric", "value")
FINAL_COLUMNS = ("arm", "seed", "metric", "step", "loss_nats_per_token")
MATCHING_COLUMNS = ("arm", "baseline", "modality", "seed", "axis", "baseline_x", "arm_x")


def summary(findings: Findings) -> dict[str, Any]:
    """Everything that the report states, as plain JSON values; unknown values are null."""
    plan = findings.plan
    return plain(
        {
            "format": SUMMARY_FORMAT,
            "name": plan.config.name,
            "question": plan.config.question,
            "match": plan.config.match,
            **solved_values(plan) | rate_values(plan),
            "deciding_metric": findings.deciding_metric,
            "confidence": plan.config.confidence,
            "baseline": plan.config.baseline,
            "arms": list(plan.arms),
            "seeds": list(findings.seeds),
            "extra_baseline_seeds": _extra_seeds(findings),
            "margin": plan.config.margin,
            "primary": list(plan.config.verdicts),
            "interim": findings.scope.interim,
            "documents_in_intervals": findings.num_documents,
            "runs": runs_text(findings),
            "run_ends": {name: asdict(end) for name, end in findings.scope.ends.items()},
            "step": findings.scope.until_step,
            "tokens": findings.tokens,
            "overall": overall(findings),
            "headlines": {arm: headline(findings, arm) for arm in plan.others},
            "contrasts": [_contrast(findings, c) for c in findings.contrasts],
            "named_contrasts": [
                {"contrast": name, "modality": effect.modality, "outcome": outcome_text(findings, effect)}
                | {"sentence": f"{name}, {effect.modality}: {_named_sentence(findings, effect)}"}
                | effect_values(effect)
                for name, by_modality in named_effects(findings)
                for effect in by_modality
            ],
            "final_losses": _losses(findings.losses, "modality"),
            "by_rule": _losses(findings.by_rule, "modality"),
            "conditional": _losses(findings.conditional, "metric"),
            "facts": [_fact(fact) for fact in findings.facts],
            "systems": {arm: asdict(system) for arm, system in systems(findings).items()},
            "step_time_ratio": {arm: _ratio(step_time_ratio(findings, arm)) for arm in plan.others},
            "same_data": {
                "proven": findings.fingerprints.proven,
                "stated": findings.fingerprints.stated,
                "steps_compared": findings.fingerprints.compared,
                "last_fingerprint": findings.fingerprints.last,
                "broken": list(findings.fingerprints.broken),
                "unreadable": findings.fingerprints.unreadable,
            },
            "caveats": [asdict(caveat) for caveat in caveats(findings)],
        }
    )


def solved_values(plan: Plan) -> dict[str, Any]:
    """What was solved in arms of a comparison; nothing where nothing was."""
    if not isinstance(plan, ComparisonPlan) or not plan.solved:
        return {}
    return {"solve": plan.config.solve, "solved": {name: asdict(of) for name, of in plan.solved.items()}}


def _extra_seeds(findings: Findings) -> list[int]:
    """The seeds that the comparison file gives to the baseline alone."""
    return list(getattr(findings.plan.config, "extra_baseline_seeds", ()))


def _losses(losses: Mapping[tuple[str, str], ArmLoss], key: str) -> list[dict[str, Any]]:
    """A list of the losses by (arm, name); the name is stored under `key`."""
    return [{"arm": arm, key: name} | asdict(loss) for (arm, name), loss in losses.items()]


def _contrast(findings: Findings, contrast: Contrast) -> dict[str, Any]:
    final, words = contrast.final, verdict(findings, contrast)
    return {
        "arm": contrast.arm,
        "modality": contrast.modality,
        "winner": contrast.winner,
        "lower": contrast.leader,
        "outcome": words.outcome,
        "sentence": words.sentence,
        **effect_values(final),
        "seeds": contrast.seeds,
        "differences_per_seed": contrast.differences,
        "step_matching": {
            axis: {
                "s": _ratio(m.slope),
                "end_point_ratio": _ratio(m.end),
                "end_point_reached": m.end_reached,
                "never_reached_frac": m.never_reached_frac,
            }
            for axis, m in contrast.matching.items()
        },
        "crossings": [
            {
                "tokens": c.x,
                "loss": c.loss,
                "leads_after": contrast.arm if c.other_leads else contrast.baseline,
            }
            for c in contrast.crossings
        ],
        "gap_per_doubling_nats": contrast.trend,
    }


def effect_values(effect: Effect) -> dict[str, Any]:
    """The numbers of an effect. A joint interval holds together with all others that are joint."""
    return {
        "primary": effect.primary,
        "difference_nats": effect.estimate,
        "difference_frac": effect.relative,
        "interval_nats": interval_values(effect.interval),
        "interval_is_joint": effect.primary,
        "margin_nats": effect.margin,
        "spreads_differ": effect.spreads_differ,
    }


def _named_sentence(findings: Findings, effect: Effect) -> str:
    share = f"{signed(100 * effect.relative, 1)} %"
    return f"{outcome_text(findings, effect)}, {share} ({difference_text(findings, effect)})."


def _fact(fact: Fact) -> dict[str, Any]:
    """An accuracy of facts by arm, in shares of 1, with what chance gives and the judge's own."""
    return {
        "metric": fact.name,
        "arms": [
            {"arm": arm, "per_seed": shares, "by_chance": fact.foreign[arm]}
            for arm, shares in fact.accuracy.items()
        ],
        "judge": fact.judge,
        "contrasts": [
            {
                "contrast": name,
                "difference": effect.estimate,
                "interval": interval_values(effect.interval),
                "interval_is_joint": effect.primary,
            }
            for name, effect in fact.effects.items()
        ],
    }


def interval_values(interval: Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None


def _ratio(estimate: RatioEstimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "value": estimate.value,
        "per_seed": estimate.per_seed,
        "interval": interval_values(estimate.interval),
    }


def plain(value: Any) -> Any:
    """A value with plain JSON types. JSON has no nan, so a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------------------- CSV


def curves_csv(findings: Findings) -> str:
    """All losses and gains of all runs in scope, one value a line; train_s is what a run itself measured."""
    lines = []
    for run in findings.results:
        measured = {row["step"]: row.get("time/train_s", math.nan) for row in run.rows}
        names = sorted({n for row in run.rows for n in row if n.startswith(("train/loss", "eval/"))})
        for name in names:
            curve = run.curve(name, until=findings.scope.until(run))
            columns = (curve.steps, curve.tokens, curve.flops, curve.values)
            for step, tokens, flops, value in zip(*columns, strict=True):
                at = (run.arm, run.seed, int(step), int(tokens), flops, float(measured[int(step)]))
                lines.append((*at, name, value))
    return csv_text(CURVE_COLUMNS, lines)


def final_csv(findings: Findings) -> str:
    """The held-out losses of all runs at the last step."""
    lines = []
    for run in findings.results:
        at = findings.runs(run.arm).index(run)
        for modality in findings.outcomes:
            loss = findings.losses[run.arm, modality].per_seed[at]
            lines.append((run.arm, run.seed, modality, findings.scope.until(run), loss))
        for (arm, metric), loss in findings.conditional.items():
            if arm == run.arm:
                value, step = loss.per_seed[at], findings.scope.until(run)
                lines.append((run.arm, run.seed, metric.removeprefix(HELD_OUT), step, value))
    return csv_text(FINAL_COLUMNS, lines)


def step_matching_csv(findings: Findings) -> str:
    """The points of all step-matching plots.

    arm_x is empty where the arm never reached the loss, or had it from its first evaluation on.
    """
    lines = []
    for contrast in findings.contrasts:
        for axis in AXES:
            for seed, match in zip(contrast.seeds, contrast.matching[axis].matches, strict=True):
                for x, reached in zip(match.base_x, match.other_x, strict=True):
                    at = float(reached) if math.isfinite(reached) else ""
                    lines.append(
                        (contrast.arm, contrast.baseline, contrast.modality, seed, axis, float(x), at)
                    )
    return csv_text(MATCHING_COLUMNS, lines)


def csv_text(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        writer.writerow([f"{value:.10g}" if isinstance(value, float) else value for value in line])
    return text.getvalue()
