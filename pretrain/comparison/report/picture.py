"""The picture of a report for a README, as PNG."""

import io
import textwrap

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pretrain.comparison.findings import Findings, metric_name
from pretrain.comparison.report.figures import INK, MUTED, PAPER, STYLE, draw_curves, draw_forest
from pretrain.comparison.verdict import MATCH_UNIT, overall, runs_text
from pretrain.quantities import format_tokens, signed


def summary_png(findings: Findings) -> bytes:
    """The picture for a README, as PNG.

    For two arms it shows held-out curves per modality over a forest of the final differences. More arms would
    hide each other's curves, so it then shows a forest per modality.
    """
    others, columns = findings.plan.others, len(findings.modalities)
    many = len(others) > 1
    with matplotlib.rc_context(STYLE):
        height = 1.7 + 0.36 * len(others) if many else 5.2
        figure = Figure(figsize=(3.75 * columns, height), layout="constrained", facecolor=PAPER)
        title = textwrap.wrap(findings.plan.config.question if many else overall(findings), 34 * columns)
        # The head is measured in inches, so that it is the same in pictures of any height.
        below = 1 - (0.55 + 0.21 * (len(title) - 1)) / height
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, rect=(0.005, 0.01, 0.99, below))  # type: ignore[union-attr]
        if many:
            _forests(figure, findings)
        else:
            _curves_and_forest(figure, findings)
        top = 1 - 0.13 / height
        figure.text(0.012, top, "\n".join(title), fontsize=11.5, fontweight="bold", va="top", color=INK)
        order = (
            "same data in the same order" if findings.fingerprints.proven else "DATA NOT PROVEN TO BE EQUAL"
        )
        facts = f"{runs_text(findings)}, {order}, {format_tokens(findings.tokens)} a run"
        if many:
            base = findings.plan.config.baseline
            unit = MATCH_UNIT[findings.plan.config.match]
            facts = f"Final held-out loss against {base}, equal {unit}. {facts} of {base}"
        figure.text(0.012, below + 0.18 / height, facts, fontsize=8.5, va="top", color=MUTED)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()


def _forests(figure: Figure, findings: Findings) -> None:
    for column, ax in enumerate(np.atleast_1d(figure.subplots(1, len(findings.modalities)))):
        modality = findings.modalities[column]
        draw_forest(ax, findings, [findings.contrast(arm, modality) for arm in findings.plan.others], "arm")
        if column:
            ax.set_yticklabels([])


def _curves_and_forest(figure: Figure, findings: Findings) -> None:
    arm = findings.plan.others[0]
    grid = figure.add_gridspec(2, len(findings.modalities), height_ratios=(3, 1.15))
    for column, modality in enumerate(findings.modalities):
        ax = figure.add_subplot(grid[0, column])
        draw_curves(ax, findings, metric_name(modality), "tokens", title=modality)
        relative = findings.contrast(arm, modality).final.relative
        ax.set_title(f"{arm} {signed(100 * relative, 1)} %", loc="right", color=MUTED, fontweight="normal")
        if column == 0:
            ax.set_ylabel("held-out loss, nats per token")
    contrasts = [findings.contrast(arm, m) for m in findings.modalities]
    draw_forest(figure.add_subplot(grid[1, :]), findings, contrasts, "modality")
