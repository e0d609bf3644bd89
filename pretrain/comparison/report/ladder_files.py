"""The machine-readable files of a ladder: summary.json and the CSV files. This module imports no torch."""

import math
from dataclasses import asdict
from typing import Any

from pretrain.comparison.findings import ALL
from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_words import headline, level_text, runs_text, turn_sentence
from pretrain.comparison.published_shares import PUBLISHED
from pretrain.comparison.report.digest import SUMMARY_FORMAT
from pretrain.comparison.report.files import csv_text, effect_values, interval_values, plain, solved_values
from pretrain.comparison.report.ladder_tables import ladder_caveats
from pretrain.comparison.report.rate_table import rate_values
from pretrain.comparison.verdict import outcome_text

RUN_COLUMNS = (
    "size", "budget", "arm", "seed", "active_parameters", "tokens", "tokens_per_parameter", "train_flops",
    "modality", "loss_nats_per_token",
)  # fmt: skip
CELL_COLUMNS = (
    "size", "budget", "active_parameters", "tokens_per_parameter", "arm", "baseline", "modality", "base_loss",
    "arm_loss", "difference_nats", "low", "high", "outcome",
)  # fmt: skip
SHARE_COLUMNS = ("size", "budget", "tokens_per_parameter", "arm", "modality", "s", "low", "high", "reached")


def summary(ladder: LadderFindings) -> dict[str, Any]:
    """Everything that the page states, as plain JSON values; unknown and infinite values are null."""
    plan, config = ladder.plan, ladder.plan.config
    return plain(
        {
            "format": SUMMARY_FORMAT,
            "name": config.name,
            "question": config.question,
            "match": config.match,
            **solved_values(plan) | rate_values(plan),
            "deciding_metric": config.deciding_metric,
            "confidence": config.confidence,
            "baseline": config.baseline,
            "arms": list(plan.arms),
            "runs": runs_text(ladder),
            "num_verdicts": ladder.fit.num_verdicts,
            "level": level_text(ladder),
            "residual_deviation_nats": dict(ladder.fit.deviation),
            "residual_dof": ladder.fit.dof,
            "headlines": {arm: headline(ladder, arm) for arm in ladder.arms},
            "turns": [
                {"size": size, "arm": arm, "modality": modality}
                | asdict(turn)
                | {"sentence": turn_sentence(ladder, size, arm, modality)}
                for (size, arm, modality), turn in ladder.turns.items()
            ],
            "cells": _cells(ladder),
            "missing_cells": {cell.name: why for cell, why in ladder.missing.items()},
            "shares": _shares(ladder),
            "laws": _laws(ladder),
            "isoflop_minima": [
                {"arm": arm, "modality": modality, "budget": budget}
                | ({"none": found} if isinstance(found, str) else asdict(found))
                for (arm, modality, budget), found in ladder.minima.items()
            ],
            "published_shares": [asdict(share) for share in PUBLISHED],
            "caveats": [asdict(caveat) for caveat in ladder_caveats(ladder)],
            "run_ends": {name: asdict(end) for name, end in ladder.ends.items()},
        }
    )


def _cells(ladder: LadderFindings) -> list[dict[str, Any]]:
    """The effects of all cells."""
    return [
        asdict(cell)
        | {"tokens_per_parameter": cell.tokens_per_parameter, "contrast": name, "modality": modality}
        | {"outcome": outcome_text(findings, effect)}
        | effect_values(effect)
        for cell, findings in ladder.cells.items()
        for (name, modality), effect in findings.effects.items()
    ]


def _shares(ladder: LadderFindings) -> list[dict[str, Any]]:
    """The shares at equal loss, at every budget from the second on."""
    return [
        {"size": size, "budget": cell.budget, "tokens_per_parameter": cell.tokens_per_parameter}
        | {"arm": arm, "modality": modality, "s": share.value, "reached": share.reached}
        | {"interval": interval_values(share.interval)}
        for (size, arm, modality), by_cell in ladder.shares.items()
        for cell, share in by_cell.items()
    ]


def _laws(ladder: LadderFindings) -> list[dict[str, Any]]:
    """The laws of all arms, or why there is none."""
    confidence = ladder.plan.config.confidence
    rows: list[dict[str, Any]] = []
    for (arm, modality), law in ladder.laws.items():
        row: dict[str, Any] = {"arm": arm, "modality": modality}
        if isinstance(law, str):
            row["none"] = law
        else:
            numbers = law.fit.law.named()
            row |= numbers | {"off_at_most_tokens_log": law.largest_left_out}
            row["intervals"] = {n: interval_values(law.fit.interval(n, confidence)) for n in numbers}
        rows.append(row)
    return rows


def runs_csv(ladder: LadderFindings) -> str:
    """The final held-out losses of all runs."""
    lines = []
    for cell, findings in ladder.cells.items():
        for arm in findings.plan.arms:
            for at, run in enumerate(findings.runs(arm)):
                flops = run.curve("compute/train_flops").values
                for modality in (*ladder.modalities, ALL):
                    tokens = run.config.total_tokens
                    lines.append(
                        (
                            *(cell.size, cell.budget, arm, run.seed, cell.parameters, tokens),
                            *(cell.tokens_per_parameter, float(flops[-1]) if len(flops) else math.nan),
                            *(modality, findings.losses[arm, modality].per_seed[at]),
                        )
                    )
    return csv_text(RUN_COLUMNS, lines)


def cells_csv(ladder: LadderFindings) -> str:
    """The difference of every arm to the baseline in all cells, with its joint interval."""
    lines = []
    for cell, findings in ladder.cells.items():
        for contrast in findings.contrasts:
            final = contrast.final
            ends = (final.interval.low, final.interval.high) if final.interval else ("", "")
            lines.append(
                (
                    *(cell.size, cell.budget, cell.parameters, cell.tokens_per_parameter, contrast.arm),
                    *(contrast.baseline, contrast.modality, contrast.base_loss, contrast.other_loss),
                    *(final.estimate, *ends, final.outcome),
                )
            )
    return csv_text(CELL_COLUMNS, lines)


def shares_csv(ladder: LadderFindings) -> str:
    """The shares at equal loss; an end of an interval beyond all budgets is 0 or inf."""
    lines = []
    for (size, arm, modality), by_cell in ladder.shares.items():
        for cell, share in by_cell.items():
            ends = (share.interval.low, share.interval.high) if share.interval else ("", "")
            place = (size, cell.budget, cell.tokens_per_parameter, arm, modality)
            lines.append((*place, share.value, *ends, share.reached))
    return csv_text(SHARE_COLUMNS, lines)
