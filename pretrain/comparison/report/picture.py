"""The picture of a report for a README, as PNG, and the figures of a report, as PDF."""

import io
import textwrap

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pretrain.comparison.findings import Findings, metric_name
from pretrain.comparison.report.figures import (
    INK,
    MUTED,
    PAPER,
    STYLE,
    colour,
    draw_curves,
    draw_forest,
    forest_height,
    line_style,
)
from pretrain.comparison.units import unit_of
from pretrain.comparison.verdict import MATCH_UNIT, overall, runs_text
from pretrain.quantities import format_tokens, signed


def summary_png(findings: Findings) -> bytes:
    """The picture for a README, as PNG.

    For two arms it shows held-out curves per modality over a forest of the final differences. More arms would
    hide each other's curves, so it then shows a forest per modality.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        canvas = FigureCanvasAgg(_summary(findings))
        canvas.print_figure(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()


def summary_pdf(findings: Findings) -> bytes:
    """The picture as PDF, and a page of held-out curves for every axis of which positions are known."""
    buffer = io.BytesIO()
    metadata = {"CreationDate": None, "Creator": None, "Producer": None}
    with matplotlib.rc_context({**STYLE, "pdf.fonttype": 42}), PdfPages(buffer, metadata=metadata) as pages:
        pages.savefig(_summary(findings))
        for axis in findings.axes:
            pages.savefig(_curves(findings, axis))
    return buffer.getvalue()


def _name_unit(ax: Axes, findings: Findings, modality: str) -> None:
    """Name the unit of the first panel, and of every panel with another one."""
    if modality == findings.modalities[0] or modality in findings.plan.vector_modalities:
        ax.set_ylabel(f"held-out loss, {unit_of(findings.plan, modality)}")


def _curves(findings: Findings, axis: str) -> Figure:
    """The held-out curves of all arms along one axis, a panel per modality, over a key of the arms."""
    columns, arms = len(findings.modalities), findings.plan.arms
    rows = -(-len(arms) // (4 * columns))
    figure = Figure(figsize=(3.75 * columns, 3.4 + 0.2 * rows), layout="constrained", facecolor=PAPER)
    axes = np.atleast_1d(figure.subplots(1, columns))
    for modality, ax in zip(findings.modalities, axes, strict=True):
        draw_curves(ax, findings, metric_name(modality), axis, title=modality)
        _name_unit(ax, findings, modality)
    lines = [
        Line2D([], [], color=colour(findings, arm), linestyle=line_style(findings, arm), label=arm)
        for arm in arms
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(arms), 4 * columns), frameon=False)
    return figure


def _summary(findings: Findings) -> Figure:
    others, columns = findings.plan.others, len(findings.modalities)
    many = len(others) > 1
    contrasts = [findings.contrast(arm, findings.modalities[0]) for arm in others]
    height = 0.85 + forest_height(contrasts) if many else 5.2
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
    facts = f"{runs_text(findings)}, {_same_data(findings)}, {format_tokens(findings.tokens)} a run"
    if many:
        base = findings.plan.config.baseline
        unit = MATCH_UNIT[findings.plan.config.match]
        facts = f"Final held-out loss against {base}, equal {unit}. {facts} of {base}"
    figure.text(0.012, below + 0.18 / height, facts, fontsize=8.5, va="top", color=MUTED)
    return figure


def _same_data(findings: Findings) -> str:
    """Say what is known of the data of the arms."""
    prints = findings.fingerprints
    if prints.proven:
        return "same data in the same order"
    return "same data as stated" if prints.accepted else "DATA NOT PROVEN TO BE EQUAL"


def _forests(figure: Figure, findings: Findings) -> None:
    for column, ax in enumerate(np.atleast_1d(figure.subplots(1, len(findings.modalities)))):
        modality = findings.modalities[column]
        draw_forest(ax, findings, [findings.contrast(arm, modality) for arm in findings.plan.others], "arm")
        if column and ax.get_yticks().size:
            ax.set_yticklabels([])


def _curves_and_forest(figure: Figure, findings: Findings) -> None:
    arm = findings.plan.others[0]
    grid = figure.add_gridspec(2, len(findings.modalities), height_ratios=(3, 1.15))
    for column, modality in enumerate(findings.modalities):
        ax = figure.add_subplot(grid[0, column])
        draw_curves(ax, findings, metric_name(modality), "tokens", title=modality)
        relative = findings.contrast(arm, modality).final.relative
        ax.set_title(f"{arm} {signed(100 * relative, 1)} %", loc="right", color=MUTED, fontweight="normal")
        _name_unit(ax, findings, modality)
    contrasts = [findings.contrast(arm, m) for m in findings.modalities]
    draw_forest(figure.add_subplot(grid[1, :]), findings, contrasts, "modality")
