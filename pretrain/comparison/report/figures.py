"""The figures of a report. A panel is an SVG that takes its colours from the page."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pretrain.comparison.findings import Contrast, Findings, conditional_gain_name
from pretrain.comparison.results import Curve
from pretrain.comparison.statistics import smooth
from pretrain.comparison.units import unit_of, units_of
from pretrain.quantities import MINUS, format_tokens, percent, signed, with_prefix

ARM_COLOURS = ("#0868AC", "#C8500A", "#007A5E", "#A0417F", "#7A6200", "#3F8FBF", "#555555", "#B02A4A")
"""Darker variants of the colours of Okabe and Ito, which colour-blind people can tell apart."""
INK, MUTED, RULE, PAPER = "#1B1F24", "#626C77", "#D5DADF", "#FFFFFF"
PANEL_INCHES = (3.7, 3.0)
_UNITS = {
    "tokens": "tokens",
    "flops": "training FLOP",
    "seconds": "seconds of training",
    "steps": "optimizer steps",
}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # it ships with matplotlib, so pictures are the same everywhere
    "font.size": 8.5,
    "svg.fonttype": "none",  # text stays text, so it is searchable and in the font of the page
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}

Draw = Callable[[Axes], None]


FEW_ARMS = 3
"""Number of arms up to which curves carry names and bands. The curves of more would hide each other."""
LONG_NAME = 12
"""Letters from which on a name of an arm has no room beside a panel."""


def colour(findings: Findings, arm: str) -> str:
    """The colour of an arm: blue for the baseline, orange for the first other arm."""
    return ARM_COLOURS[findings.plan.arms.index(arm) % len(ARM_COLOURS)]


def line_style(findings: Findings, arm: str) -> Any:
    """The style of an arm's lines: dashed once all colours have been used."""
    return (0, (4, 1.5)) if findings.plan.arms.index(arm) >= len(ARM_COLOURS) else "-"


def svg_panel(draw: Draw, *, key: str, label: str, inches: tuple[float, float] = PANEL_INCHES) -> str:
    """One panel as an inline SVG whose colours are CSS variables of the page.

    `key` must be unique on the page, because ids in an inline SVG are ids of the page. `label` is the text
    for screen readers.
    """
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": key}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches)
        ax = figure.add_subplot()
        draw(ax)
        _set_margins(figure, ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{key}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("'DejaVu Sans'", "var(--sans)").replace(
        ' xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    text = text.replace("xlink:href", "href").replace(' xmlns="http://www.w3.org/2000/svg"', "")
    variables = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"}
    variables |= {value: f"--arm{i}" for i, value in enumerate(ARM_COLOURS)}
    for value, name in variables.items():
        text = re.sub(re.escape(value), f"var({name})", text, flags=re.IGNORECASE)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _set_margins(figure: Figure, ax: Axes) -> None:
    """Set the margins of a panel from the lengths of the texts around its axes.

    Unlike a layout engine this gives all panels of a row axes of one size, in a fifth of the time.
    """
    width, height = figure.get_size_inches()
    notes = [text for text in ax.texts if isinstance(text, Annotation)]
    beside = [len(note.get_text()) for note in notes if note.get_annotation_clip() is False]
    right = 0.2 + 0.075 * max(beside, default=0)
    names = [len(label.get_text()) for label in ax.get_yticklabels()] if not ax.get_ylabel() else []
    least = 0.52 if len(ax.get_yticks()) else 0.2
    left = max(least, 0.2 + 0.075 * max(names, default=0))
    figure.subplots_adjust(left / width, 0.48 / height, 1 - right / width, 1 - 0.28 / height)


# ---------------------------------------------------------------------------------------------------- curves


def draw_curves(ax: Axes, findings: Findings, metric: str, axis: str, *, title: str, window: int = 1) -> None:
    """Draw a metric of all arms: the mean over the seeds, and a band from the lowest to the highest seed."""
    ends: list[tuple[float, float, str, str]] = []
    shown: list[np.ndarray] = []
    few, longest = len(findings.plan.arms) <= FEW_ARMS, 0.0
    for arm in findings.plan.arms:
        curves = [c for c in findings.curves(arm, metric) if len(c)]
        if not curves:
            continue
        x, values = _mean_x(curves, axis), np.array([smooth(c.values, window) for c in curves])
        mean = values.mean(axis=0)
        shade = colour(findings, arm)
        if len(curves) > 1 and few:
            ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.18, linewidth=0)
        ax.plot(x, mean, color=shade, linewidth=1.8 if few else 1.3, linestyle=line_style(findings, arm))
        shown.append(values[:, _settled(x)])
        name = arm
        if window == 1:  # a smoothed curve ends in one noisy row, so its end is not labelled
            ax.plot(x[-1:], mean[-1:], "o", color=shade, markersize=3.5, clip_on=False)
            name = f"{arm} {mean[-1]:.3f}" if len(arm) < LONG_NAME else f"{mean[-1]:.3f}"
        if few:
            ends.append((float(x[-1]), float(mean[-1]), name, shade))
        longest = max(longest, float(x[-1]))
    ax.set_title(title)
    if not shown:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=MUTED)
        ax.set_axis_off()
        return
    low, high = min(values.min() for values in shown), max(values.max() for values in shown)
    room = (high - low) or 1e-3
    ax.set_ylim(low - 0.08 * room, high + 0.04 * room)
    ax.set_xlim(0, longest)
    _x_axis(ax, axis)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    _label_ends(ax, ends)


def _mean_x(curves: Sequence[Curve], axis: str) -> np.ndarray:
    """The mean positions along an axis. Seeds share their steps, but their seconds differ a little."""
    return np.mean([c.x(axis) for c in curves], axis=0)


def _settled(x: np.ndarray) -> np.ndarray:
    """A mask of the points after the first tenth, where the loss falls so far that it would set the scale."""
    late = x >= 0.1 * x[-1]
    return late if late.sum() > 1 else np.ones_like(late)


def _x_axis(ax: Axes, axis: str) -> None:
    ax.set_xlabel(_UNITS[axis])
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, short=axis == "tokens")))


def _tick(value: float, short: bool) -> str:
    return f"{value:g}" if abs(value) < 1e3 else with_prefix(value, short=short)


def _label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label the ends of curves, given as (x, y, text, colour), and push labels apart that would touch.

    All labels stand right of the longest curve, since another curve may pass the end of a shorter one.
    """
    if not ends:
        return
    low, high = ax.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    heights = _spread([y for _, y, *_ in ends], 0.075 * (high - low))
    x = max(x for x, *_ in ends)
    for (_, _, text, shade), at in zip(ends, heights, strict=True):
        ax.annotate(
            text, (x, at), xytext=(6, 0), textcoords="offset points", va="center", color=shade,
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _spread(heights: Sequence[float], apart: float) -> list[float]:
    """Rising heights, moved until neighbours are `apart`; a group that would touch keeps its centre."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _low(groups[-1], apart) < _low(groups[-2], apart) + apart * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [_low(group, apart) + apart * i for group in groups for i in range(len(group))]


def _low(group: Sequence[float], apart: float) -> float:
    """The lowest height of a group that is spread around its centre."""
    return sum(group) / len(group) - apart * (len(group) - 1) / 2


def draw_gain(ax: Axes, findings: Findings, a: str, b: str) -> None:
    """Draw the gain of all arms: nats per token of b that its own a saves over a foreign a.

    All directions share one scale.
    """
    ends, few = [], len(findings.plan.arms) <= FEW_ARMS
    ax.axhline(0, color=MUTED, linewidth=0.9)
    for arm in findings.plan.arms:
        curves = findings.curves(arm, conditional_gain_name((a, b)))
        x, values = _mean_x(curves, "tokens"), np.array([c.values for c in curves])
        mean, shade = values.mean(axis=0), colour(findings, arm)
        if len(curves) > 1 and few:
            ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.18, linewidth=0)
        ax.plot(x, mean, color=shade, linewidth=1.8 if few else 1.3, linestyle=line_style(findings, arm))
        ax.plot(x[-1:], mean[-1:], "o", color=shade, markersize=3.5, clip_on=False)
        name = f"{arm} " if len(arm) < LONG_NAME else ""
        ends.append((float(x[-1]), float(mean[-1]), f"{name}{signed(float(mean[-1]))}", shade))
    names = map(conditional_gain_name, findings.directions)
    gains = [c.values for name in names for arm in findings.plan.arms for c in findings.curves(arm, name)]
    low, high = min(0.0, *map(np.min, gains)), max(0.0, *map(np.max, gains))
    ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.set_title(f"{a} \u2192 {b}")
    ax.set_xlim(0, max(x for x, *_ in ends))
    _x_axis(ax, "tokens")
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if few:
        _label_ends(ax, ends)


def draw_gap(ax: Axes, findings: Findings, contrast: Contrast) -> None:
    """Draw the loss of an arm minus the baseline's against tokens, with its interval over the seeds."""
    shade = colour(findings, contrast.arm)
    x, gap, noise = contrast.gap_tokens, contrast.gap, contrast.gap_noise
    ax.axhline(0, color=MUTED, linewidth=0.9)
    settled = _settled(x)
    low, high = min(float(gap[settled].min()), 0.0), max(float(gap[settled].max()), 0.0)
    room = (high - low) or 1e-3
    # The band may at most double the range, for with two seeds it would dwarf the curve.
    low = min(low, max(float((gap - noise)[settled].min()), low - room)) - 0.15 * room
    high = max(high, min(float((gap + noise)[settled].max()), high + room)) + 0.15 * room
    if noise.any():
        ax.fill_between(x, gap - noise, gap + noise, color=shade, alpha=0.18, linewidth=0)
    ax.plot(x, gap, color=shade, linewidth=1.8)
    for crossing in contrast.crossings:
        ring: dict[str, Any] = {"markerfacecolor": PAPER, "markeredgecolor": INK, "markeredgewidth": 1.2}
        ax.plot([crossing.x], [0], "o", markersize=5.5, **ring)
        ax.annotate(
            format_tokens(crossing.x).removesuffix(" tokens"), (crossing.x, 0), xytext=(0, 7),
            textcoords="offset points", ha="center", color=INK, fontsize=7.5,
        )  # fmt: skip
    ax.set_ylim(low, high)
    ax.set_xlim(0, x[-1])
    ax.set_title(contrast.modality)
    for y, va, text in (
        (0.98, "top", f"{contrast.baseline} lower"),
        (0.02, "bottom", f"{contrast.arm} lower"),
    ):
        ax.text(0.99, y, text, transform=ax.transAxes, ha="right", va=va, color=MUTED, fontsize=7.5)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value, 2 if room > 0.08 else 3)))
    _x_axis(ax, "tokens")


def draw_matching(ax: Axes, findings: Findings, contrast: Contrast) -> None:
    """Draw step matching (MoT, Fig. 5b-d): the steps that the arm needed for the baseline's loss at x."""
    axis = findings.progress_axis
    shade, matching = colour(findings, contrast.arm), contrast.matching[axis]
    end = max(float(m.base_x[-1]) for m in matching.matches)
    ax.plot([0, end], [0, end], color=MUTED, linewidth=0.9, dashes=(4, 3))
    above = matching.slope is None or matching.slope.value <= 1  # the free side of the diagonal
    ax.annotate(
        f"as {contrast.baseline}", (0.66 * end, 0.66 * end), xytext=(-3, 4) if above else (4, -9),
        textcoords="offset points", ha="right" if above else "left", color=MUTED, fontsize=7.5,
    )  # fmt: skip
    for match in matching.matches:
        ax.plot(match.base_x, match.other_x, "o", color=shade, markersize=2.6, alpha=0.55, markeredgewidth=0)
    if matching.slope is not None:
        ax.plot([0, end], [0, matching.slope.value * end], color=shade, linewidth=1.8)
        if matching.slope.interval is not None:
            low, high = matching.slope.interval.low, matching.slope.interval.high
            ax.fill_between([0, end], [0, low * end], [0, high * end], color=shade, alpha=0.15, linewidth=0)
        ax.annotate(
            f"s = {matching.slope.value:.2f}", (end, matching.slope.value * end), xytext=(6, 0), va="center",
            textcoords="offset points", color=shade, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    missing = [float(m.base_x[-m.never_reached]) for m in matching.matches if m.never_reached]
    if missing:
        ax.axvspan(min(missing), end, color=RULE, alpha=0.35, linewidth=0)
        ax.text(end, 0, "not reached by all ", ha="right", va="bottom", color=MUTED, fontsize=7)
    highest = [float(np.nanmax(m.other_x)) for m in matching.matches if np.isfinite(m.other_x).any()]
    ax.set_xlim(0, end)
    fitted = [matching.slope.value * end] if matching.slope else []
    ax.set_ylim(0, 1.03 * max([end, *highest, *fitted]))
    ax.set_title(contrast.modality)
    _x_axis(ax, axis)
    ax.set_xlabel(f"{contrast.baseline}: {_UNITS[axis]}")
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(ax.xaxis.get_major_formatter())


def forest_height(contrasts: Sequence[Contrast]) -> float:
    """Inches of a forest with a row per arm. Long names stand above their bars, which takes room."""
    row = 0.42 if _names_above(contrasts) else 0.3
    return 0.85 + row * len(contrasts)


def _names_above(contrasts: Sequence[Contrast]) -> bool:
    return any(len(contrast.arm) >= LONG_NAME for contrast in contrasts)


def draw_forest(
    ax: Axes, findings: Findings, contrasts: Sequence[Contrast], by: Literal["modality", "arm"]
) -> None:
    """Draw final differences, a row per contrast: the seeds, the estimate and its interval.

    The contrasts are of one arm or of one modality; `by` names the attribute that differs. The marker of a
    verdict (better, worse) is filled. The band is the margin below which arms are equivalent.
    """
    base = findings.plan.config.baseline
    ax.axvline(0, color=MUTED, linewidth=0.9)
    extent = [0.0]
    for row, contrast in enumerate(contrasts):
        _draw_difference(ax, contrast, len(contrasts) - 1 - row, colour(findings, contrast.arm))
        interval = contrast.final.interval
        extent += [*contrast.differences, contrast.final.estimate]
        extent += [interval.low, interval.high] if interval else []
    reach = 1.15 * float(np.abs(extent).max()) or 1e-3
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-0.6, len(contrasts) - 0.4)
    _name_rows(ax, contrasts, by)
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value, 2 if reach > 0.04 else 3)))
    known = any(contrast.final.interval for contrast in contrasts)
    level = f", {_interval_name(findings, contrasts)}" if known else ""
    arm, left, right = contrasts[0].arm, "lower", "higher"
    if by == "modality":
        unit = units_of(findings.plan, [contrast.modality for contrast in contrasts])
        ax.set_xlabel(f"{arm} {MINUS} {base}, {unit}{level}")
        left, right = f"{arm} lower", f"{base} lower"
    else:
        ax.set_xlabel(f"{MINUS} {base}, {unit_of(findings.plan, contrasts[0].modality)}{level}")
        ax.set_title(contrasts[0].modality, loc="center")
    for x, ha, text in ((0.0, "left", f"\u2190 {left}"), (1.0, "right", f"{right} \u2192")):
        ax.text(x, 1.02, text, transform=ax.transAxes, ha=ha, va="bottom", color=MUTED, fontsize=7.5)


def _name_rows(ax: Axes, contrasts: Sequence[Contrast], by: Literal["modality", "arm"]) -> None:
    """Name the rows of a forest beside the axes, or above the bars where names of arms are long."""
    if by == "arm" and _names_above(contrasts):
        ax.set_yticks([])
        for row, contrast in enumerate(reversed(contrasts)):
            place = (0.0, row + 0.36)
            ax.text(*place, contrast.arm, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5)
        return
    ax.set_yticks(range(len(contrasts)), [getattr(c, by) for c in reversed(contrasts)])
    ax.tick_params(axis="y", labelcolor=INK)


def _draw_difference(ax: Axes, contrast: Contrast, y: int, shade: str) -> None:
    """Draw one final difference at height `y`: the margin, the seeds, the interval and the estimate."""
    final = contrast.final
    ax.fill_between([-final.margin, final.margin], y - 0.3, y + 0.3, color=RULE, alpha=0.6, linewidth=0)
    if len(contrast.differences) > 1:
        height = np.full(len(contrast.differences), y - 0.2)
        ax.plot(contrast.differences, height, "o", color=shade, markersize=3, alpha=0.5)
    fill = shade if contrast.winner else PAPER
    ax.plot([final.estimate], [y], "D", color=shade, markerfacecolor=fill, markersize=5.5, zorder=3)
    if final.interval is not None:
        ends, style = [final.interval.low, final.interval.high], "-" if final.primary else ":"
        ax.plot(ends, [y, y], color=shade, linewidth=1.6, linestyle=style)


def _interval_name(findings: Findings, contrasts: Sequence[Contrast]) -> str:
    joint = "joint " if all(contrast.final.primary for contrast in contrasts) else ""
    return f"{percent(findings.plan.config.confidence)} {joint}interval{'s' * (len(contrasts) > 1)}"
