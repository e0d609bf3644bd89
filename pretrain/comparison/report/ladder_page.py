"""The report of a ladder: one HTML page that needs no network, JSON and CSV. This module imports no torch."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipeline.files.atomic import atomic_file
from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_words import headline, level_text, runs_text, turn_sentence
from pretrain.comparison.published_shares import TOKENS_PER_PARAMETER
from pretrain.comparison.report import figures, ladder_figures, ladder_files, ladder_tables
from pretrain.comparison.report.digest import digest_line
from pretrain.comparison.report.page import reproduce_command
from pretrain.comparison.report.rate_table import rate_table
from pretrain.comparison.step_timing import timed_lines
from pretrain.comparison.verdict import MATCH_UNIT, matched_text
from pretrain.html_page import environment

PANEL_INCHES = (4.2, 3.2)


def write_ladder_report(ladder: LadderFindings, folder: Path) -> Path:
    """Write index.html, summary.json and the CSV files, each as a whole; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = (json.dumps(ladder_files.summary(ladder), indent=1, allow_nan=False) + "\n").encode()
    contents = {
        "summary.json": summary,
        "runs.csv": ladder_files.runs_csv(ladder).encode(),
        "cells.csv": ladder_files.cells_csv(ladder).encode(),
        "shares.csv": ladder_files.shares_csv(ladder).encode(),
        "index.html": page(ladder).encode() + digest_line(summary).encode(),
    }
    for name, content in contents.items():
        with atomic_file(folder / name) as file:
            file.write(content)
    return folder / "index.html"


def page(ladder: LadderFindings) -> str:
    """The whole report as one HTML document."""
    plan = ladder.plan
    by_arm = {
        arm: {
            "headline": headline(ladder, arm),
            "differences": _panels(ladder, arm, "differences", ladder_figures.draw_differences),
            "turns": [turn_sentence(ladder, *key) for key in ladder.turns if key[1] == arm],
            "share_panels": _panels(ladder, arm, "shares", ladder_figures.draw_shares),
            "shares": ladder_tables.shares_table(ladder, arm),
            "published": ladder_tables.published_table(ladder, arm),
            "law_shares": ladder_tables.law_shares_table(ladder, arm),
            "cells": ladder_tables.cells_table(ladder, arm),
        }
        for arm in ladder.arms
    }
    return (
        environment(Path(__file__).parent)
        .get_template("ladder.html.j2")
        .render(
            ladder=ladder,
            config=plan.config,
            by_arm=by_arm,
            level=level_text(ladder),
            runs=runs_text(ladder),
            matched=matched_text(plan.config),
            unit=MATCH_UNIT[plan.config.match],
            published_tokens=TOKENS_PER_PARAMETER,
            minima=ladder_tables.minima_table(ladder),
            laws=ladder_tables.laws_table(ladder),
            no_law=ladder_tables.no_law_text(ladder),
            rates=rate_table(plan),
            timed=timed_lines(plan),
            sizes=ladder_tables.sizes_table(ladder),
            caveats=ladder_tables.ladder_caveats(ladder),
            colours=figures.ARM_COLOURS,
            command=reproduce_command(plan),
        )
    )


def _panels(ladder: LadderFindings, arm: str, kind: str, draw: Any) -> list[Markup]:
    """A panel per modality."""
    at = ladder.arms.index(arm)
    return [
        Markup(
            figures.svg_panel(
                partial(draw, ladder=ladder, arm=arm, modality=modality),
                key=f"{kind}-{at}-{modality}",
                label=str(Markup.escape(f"{kind} of {arm} on {modality}")),
                inches=PANEL_INCHES,
            )
        )
        for modality in ladder.modalities
    ]
