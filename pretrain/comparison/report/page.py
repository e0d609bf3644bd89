"""The report of a comparison: one HTML page that needs no network, a picture, JSON and CSV.

This module imports no torch.
"""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipeline.files.atomic import atomic_file
from data_pipeline.remote.location import without_queries
from pretrain import quantities
from pretrain.comparison.caveats import RULES, caveats
from pretrain.comparison.findings import Findings
from pretrain.comparison.foreign.question import ForeignPlan, Plan
from pretrain.comparison.report import board, cost_tables, figures, files, picture, tables
from pretrain.comparison.report.digest import digest_line
from pretrain.comparison.report.rate_table import rate_table
from pretrain.comparison.results import HELD_OUT
from pretrain.comparison.step_timing import timed_lines
from pretrain.comparison.verdict import (
    budget_text,
    headline,
    matched_text,
    overall,
    results_by_modality,
    runs_text,
    verdicts,
)
from pretrain.html_page import environment

TRAIN_SMOOTHING_ROWS = 9
"""Number of rows in the moving mean of training curves; held-out curves are not smoothed."""


def write_report(findings: Findings, folder: Path) -> Path:
    """Write the page, summary.json, the CSV files, pictures and TensorBoard's files; returns the page's path.

    Every file is replaced as a whole, so a reader never sees half of one. The page ends with the digest of
    summary.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = (json.dumps(files.summary(findings), indent=1, allow_nan=False) + "\n").encode()
    contents: dict[str, bytes] = {
        "summary.json": summary,
        "curves.csv": files.curves_csv(findings).encode(),
        "final.csv": files.final_csv(findings).encode(),
        "step_matching.csv": files.step_matching_csv(findings).encode(),
        "summary.png": picture.summary_png(findings),
        "summary.pdf": picture.summary_pdf(findings),
        "index.html": page(findings).encode() + digest_line(summary).encode(),
    }
    for name, content in contents.items():
        with atomic_file(folder / name) as file:
            file.write(content)
    board.write_board(findings, folder / board.FOLDER)
    return folder / "index.html"


def page(findings: Findings) -> str:
    """The whole report as one HTML document."""
    templates = environment(Path(__file__).parent)
    plan, arms = findings.plan, findings.plan.arms
    return templates.get_template("page.html.j2").render(
        findings=findings,
        plan=plan,
        config=plan.config,
        foreign=isinstance(plan, ForeignPlan),
        q=quantities,
        overall=overall(findings),
        matched=matched_text(plan.config),
        budget=budget_text(findings),
        runs=runs_text(findings),
        decided=any(effect.interval for effect in findings.effects.values()),
        overview=tables.overview_table(findings),
        results=results_by_modality(findings),
        headlines={arm: headline(findings, arm) for arm in plan.others},
        verdicts={arm: verdicts(findings, arm) for arm in plan.others},
        caveats=caveats(findings),
        rules_of_caveats=RULES,
        colours=figures.ARM_COLOURS,
        colour_of={arm: i % len(figures.ARM_COLOURS) for i, arm in enumerate(arms)},
        dashed=arms[len(figures.ARM_COLOURS) :],
        design=cost_tables.design_table(findings),
        losses=tables.loss_table(findings),
        matching={arm: tables.matching_table(findings, arm) for arm in plan.others},
        named=tables.contrast_table(findings),
        rates=rate_table(plan),
        timed=[] if isinstance(plan, ForeignPlan) else timed_lines(plan),
        rules=tables.rule_table(findings),
        conditional=tables.conditional_table(findings),
        facts=tables.fact_table(findings),
        system=cost_tables.system_table(findings),
        data=cost_tables.data_table(findings),
        panels=_panels(findings),
        smoothing=TRAIN_SMOOTHING_ROWS,
        command=reproduce_command(findings.plan),
        provenance=cost_tables.provenance(findings),
    )


def reproduce_command(plan: Plan) -> str:
    """The command line that makes the comparison, or the report of foreign runs, again. Queries of URLs,
    which may be signatures, are left out."""
    if isinstance(plan, ForeignPlan):
        question = [str(plan.path)] if plan.path not in plan.sources else []
        words = ["motley", "compare", *question, "--from", *map(str, plan.sources), *plan.overrides]
    else:
        words = ["motley", "compare", str(plan.path), *plan.overrides]
    return shlex.join(map(without_queries, words))


# --------------------------------------------------------------------------------------------------- figures


def _panels(findings: Findings) -> dict[str, Any]:
    """The SVG panels of every section by its name: a list, or a list per axis or per arm."""
    modalities, others = findings.modalities, findings.plan.others
    heldout = {
        axis: [_curves(findings, f"{HELD_OUT}loss", axis, m) for m in modalities] for axis in findings.axes
    }
    trained = any(
        name.startswith("train/loss/") for run in findings.results for row in run.rows for name in row
    )
    train = [_curves(findings, "train/loss", "tokens", m, TRAIN_SMOOTHING_ROWS) for m in modalities]
    return {
        "heldout": heldout,
        "train": train if trained else [],
        "overview": [_forest_of_modality(findings, m) for m in modalities],
        "gap": {arm: _per_modality(findings, arm, "gap", figures.draw_gap) for arm in others},
        "matching": {arm: _per_modality(findings, arm, "matching", figures.draw_matching) for arm in others},
        "gains": [
            _svg(
                f"gain-{a}-{b}",
                f"gain of {b} from {a}",
                partial(figures.draw_gain, findings=findings, a=a, b=b),
            )
            for a, b in findings.directions
        ],
    }


def _svg(key: str, label: str, draw: figures.Draw, **size: Any) -> Markup:
    """A panel for the page; `key` is unique on the page, `label` is read to the blind."""
    return Markup(figures.svg_panel(draw, key=key, label=str(Markup.escape(label)), **size))


def _curves(findings: Findings, prefix: str, axis: str, modality: str, window: int = 1) -> Markup:
    """The curves of the metric `prefix`/`modality` of all arms."""
    draw = partial(
        figures.draw_curves,
        findings=findings,
        metric=f"{prefix}/{modality}",
        axis=axis,
        title=modality,
        window=window,
    )
    key = f"{prefix.replace('/', '-')}-{axis}-{modality}"
    return _svg(key, f"{prefix} of {modality} against {axis}", draw)


def _forest_of_modality(findings: Findings, modality: str) -> Markup:
    """The final differences in one modality, a row per arm."""
    contrasts = [findings.contrast(arm, modality) for arm in findings.plan.others]
    return _svg(
        f"overview-{modality}",
        f"final differences of all arms on {modality}",
        partial(figures.draw_forest, findings=findings, contrasts=contrasts, by="arm"),
        inches=(figures.PANEL_INCHES[0], figures.forest_height(contrasts)),
    )


def _per_modality(findings: Findings, arm: str, kind: str, draw: Callable[..., None]) -> list[Markup]:
    """One panel per modality, which draws the contrast of an arm."""
    index = findings.plan.others.index(arm)
    return [
        _svg(
            f"{kind}-{index}-{m}",
            f"{kind} of {arm}, {m}",
            partial(draw, findings=findings, contrast=findings.contrast(arm, m)),
        )
        for m in findings.modalities
    ]
