"""The report of a comparison: one page without network, a picture, JSON and CSV. Imports no torch."""

import json
import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pretrain import quantities
from pretrain.comparison.caveats import caveats
from pretrain.comparison.findings import Findings
from pretrain.comparison.report import figures, files, tables
from pretrain.comparison.results import HELD_OUT
from pretrain.comparison.verdict import headline, overall, verdicts

TRAIN_SMOOTHING_ROWS = 9
"""Rows in the centred mean of the training curves; held-out curves are never smoothed."""


def write_report(findings: Findings, folder: Path) -> Path:
    """Write index.html, summary.json, summary.png and the CSV files; returns the page's path.

    Each file is replaced whole, so a reader never sees half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {
        "summary.json": (json.dumps(files.summary(findings), indent=1, allow_nan=False) + "\n").encode(),
        "curves.csv": files.curves_csv(findings).encode(),
        "final.csv": files.final_csv(findings).encode(),
        "step_matching.csv": files.step_matching_csv(findings).encode(),
        "summary.png": figures.summary_png(findings),
        "index.html": page(findings).encode(),
    }
    for name, content in contents.items():
        partial_file = folder / f"{name}.partial"
        partial_file.write_bytes(content)
        os.replace(partial_file, folder / name)
    return folder / "index.html"


def page(findings: Findings) -> str:
    """The whole report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = lambda text: re.sub(r"(?<=\d) (?=%|[kMBT] )", "\u00a0", text)
    plan = findings.plan
    return environment.get_template("page.html.j2").render(
        findings=findings,
        plan=plan,
        config=plan.config,
        first=plan.runs[0].config,
        q=quantities,
        overall=overall(findings),
        matched=figures.MATCH_UNIT[plan.config.match],
        overview=tables.overview_table(findings),
        headlines={arm: headline(findings, arm) for arm in plan.others},
        verdicts={arm: verdicts(findings, arm) for arm in plan.others},
        caveats=caveats(findings),
        colours=figures.ARM_COLOURS,
        arm_index={arm: i for i, arm in enumerate(plan.arms)},
        design=tables.design_table(findings),
        losses=tables.loss_table(findings),
        matching={arm: tables.matching_table(findings, arm) for arm in plan.others},
        rules=tables.rule_table(findings),
        conditional=tables.conditional_table(findings),
        system=tables.system_table(findings),
        panels=_panels(findings),
        smoothing=TRAIN_SMOOTHING_ROWS,
        command=reproduce_command(findings),
        provenance=tables.provenance(findings),
    )


def reproduce_command(findings: Findings) -> str:
    plan = findings.plan
    return shlex.join(["motley", "compare", str(plan.path), *plan.overrides])


# --------------------------------------------------------------------------------------------------- figures


def _panels(findings: Findings) -> dict[str, Any]:
    """Name -> SVG panels; a name with a table below it has one entry per axis or arm."""
    modalities, plan = findings.modalities, findings.plan

    def svg(key: str, label: str, draw: figures.Draw, **size: Any) -> Markup:
        return Markup(figures.svg_panel(draw, key=key, label=str(Markup.escape(label)), **size))

    def curves(metric_prefix: str, axis: str, window: int = 1) -> list[Markup]:
        return [
            svg(
                f"{metric_prefix.replace('/', '-')}-{axis}-{m}",
                f"{metric_prefix} of {m} against {axis}",
                partial(
                    figures.draw_curves,
                    findings=findings,
                    metric=f"{metric_prefix}/{m}",
                    axis=axis,
                    title=m,
                    window=window,
                ),
            )
            for m in modalities
        ]

    gains = [
        svg(f"gain-{a}-{b}", f"gain of {b} from {a}", partial(figures.draw_gain, findings=findings, a=a, b=b))
        for a, b in findings.directions
    ]
    return {
        "heldout": {axis: curves(f"{HELD_OUT}loss", axis) for axis in ("tokens", "flops", "seconds")},
        "train": curves("train/loss", "tokens", TRAIN_SMOOTHING_ROWS),
        "forest": {
            arm: svg(
                f"forest-{i}",
                f"final differences of {arm}",
                partial(
                    figures.draw_forest,
                    findings=findings,
                    contrasts=[findings.contrast(arm, m) for m in modalities],
                    by="modality",
                ),
                inches=(9.0, 0.85 + 0.42 * len(modalities)),
            )
            for i, arm in enumerate(plan.others)
        },
        "overview": [
            svg(
                f"overview-{m}",
                f"final differences of all arms on {m}",
                partial(
                    figures.draw_forest,
                    findings=findings,
                    contrasts=[findings.contrast(arm, m) for arm in plan.others],
                    by="arm",
                ),
                inches=(figures.PANEL_INCHES[0], 0.85 + 0.3 * len(plan.others)),
            )
            for m in modalities
        ],
        "gap": {arm: _per_modality(findings, arm, "gap", figures.draw_gap, svg) for arm in plan.others},
        "matching": {
            arm: _per_modality(findings, arm, "matching", figures.draw_matching, svg) for arm in plan.others
        },
        "gains": gains,
    }


def _per_modality(
    findings: Findings, arm: str, kind: str, draw: Callable[..., None], svg: Callable[..., Markup]
) -> list[Markup]:
    index = findings.plan.others.index(arm)
    return [
        svg(
            f"{kind}-{index}-{m}",
            f"{kind} of {arm}, {m}",
            partial(draw, findings=findings, contrast=findings.contrast(arm, m)),
        )
        for m in findings.modalities
    ]
