"""The figures of a ladder: where the sign of a difference turns, and s against size."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_words import tokens_per_parameter_text
from pretrain.comparison.published_shares import PUBLISHED, is_published_mot
from pretrain.comparison.report.figures import ARM_COLOURS, INK, MUTED, PAPER, RULE
from pretrain.quantities import signed, with_prefix

_SHIFT = 1.04
"""Factor between neighbouring sizes along a logarithmic axis, so that their bars do not hide each other."""
_HIGHEST_SHARE = 3.0
"""Shares above this are drawn at the edge: the table has the number."""


def size_colour(ladder: LadderFindings, size: str) -> str:
    """The colour of a size."""
    return ARM_COLOURS[list(ladder.plan.config.sizes).index(size) % len(ARM_COLOURS)]


def draw_differences(ax: Axes, ladder: LadderFindings, arm: str, modality: str) -> None:
    """Draw arm minus baseline, per cent, over tokens per active parameter: a line per size, joint intervals.

    A filled marker is a verdict. The band is the margin within which arms are equivalent. Cells that are not
    finished are left out.
    """
    config = ladder.plan.config
    margin = 100 * config.margin
    ax.axhspan(-margin, margin, color=RULE, alpha=0.6, linewidth=0)
    ax.axhline(0, color=MUTED, linewidth=0.9)
    extent = [-margin, margin]
    for index, (size, cells) in enumerate(ladder.sizes.items()):
        shade = size_colour(ladder, size)
        shift = _SHIFT ** (index - (len(ladder.sizes) - 1) / 2)
        # A cell that is not finished has losses of fewer tokens than its place on the axis says.
        done = [cell for cell, findings in cells.items() if not findings.scope.interim]
        shown = [(cell, c) for cell in done if (c := ladder.contrast(cell, arm, modality)) and c.same_data]
        x = [shift * cell.tokens_per_parameter for cell, _ in shown]
        y = [100 * contrast.final.relative for _, contrast in shown]
        ax.plot(x, y, color=shade, linewidth=1.6)
        extent += y
        for at, (_, contrast), value in zip(x, shown, y, strict=True):
            final = contrast.final
            if final.interval is not None:
                ends = [100 * end / contrast.base_loss for end in (final.interval.low, final.interval.high)]
                ax.plot([at, at], ends, color=shade, linewidth=1.2)
                extent += ends
            fill = shade if contrast.winner else PAPER
            ax.plot([at], [value], "o", color=shade, markerfacecolor=fill, markersize=5, zorder=3)
    reach = 1.1 * max(map(abs, extent))
    ax.set_ylim(-reach, reach)
    _log_axis(ax, [cell.tokens_per_parameter for cell in ladder.cells])
    ax.set_xlabel(f"tokens per active parameter of {config.baseline}")
    ax.set_title(modality)
    ax.yaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    digits = 1 if reach < 8 else 0
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{signed(value, digits)} %"))
    for y, va, text in ((0.98, "top", f"{config.baseline} lower"), (0.02, "bottom", f"{arm} lower")):
        ax.text(0.99, y, text, transform=ax.transAxes, ha="right", va=va, color=MUTED, fontsize=7.5)


def draw_shares(ax: Axes, ladder: LadderFindings, arm: str, modality: str) -> None:
    """Draw s at the largest budget of every size over active parameters, beside the published s."""
    ax.axhline(1, color=MUTED, linewidth=0.9, dashes=(4, 3))
    places, highest = [], [1.0]
    for size in ladder.sizes:
        shares = ladder.shares.get((size, arm, modality), {})
        if not shares:
            continue
        cell, share = list(shares.items())[-1]
        shade, x = size_colour(ladder, size), cell.parameters
        places.append(x)
        value = min(share.value, _HIGHEST_SHARE)
        ends = [value, value]
        if share.interval is not None:
            # Both ends are infinite where the baseline was as low at its smallest budget in all draws.
            ends = [min(end, _HIGHEST_SHARE) for end in (share.interval.low, share.interval.high)]
            ax.plot([x, x], ends, color=shade, linewidth=1.4)
        ax.plot([x], [value], "D", color=shade, markersize=5, zorder=3)
        highest += ends
        ax.annotate(
            tokens_per_parameter_text(cell.tokens_per_parameter), (x, value), xytext=(5, 3),
            textcoords="offset points", color=shade, fontsize=7,
        )  # fmt: skip
    theirs = [p for p in PUBLISHED if p.modality == modality] if is_published_mot(ladder.plan, arm) else []
    if theirs:
        x, y = [p.parameters for p in theirs], [p.s for p in theirs]
        ax.plot(x, y, "s", color=MUTED, markerfacecolor=PAPER, markersize=4.5)
        ax.annotate("MoT paper", (x[-1], max(y)), xytext=(0, 7), textcoords="offset points",
                    ha="right", color=MUTED, fontsize=7.5)  # fmt: skip
    ax.set_ylim(0, 1.08 * max(highest))
    _log_axis(ax, [*places, *(p.parameters for p in theirs)])
    ax.set_xlabel("active parameters")
    ax.set_title(modality)
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _log_axis(ax: Axes, places: Sequence[float]) -> None:
    """A logarithmic x axis with room around `places`, and few ticks."""
    ax.set_xscale("log")
    if not places:
        return
    low, high = min(places) / 1.5, max(places) * 1.5
    ax.set_xlim(low, high)
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    factors = (1,) if high / low > 300 else (1, 2, 5)
    ticks = [tick for power in powers for factor in factors if low <= (tick := factor * power) <= high]
    ax.set_xticks(ticks[:: 2 if len(ticks) > 5 else 1])
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if v < 1e3 else with_prefix(v, digits=1))
    )
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", color=RULE, size=2)
    ax.tick_params(axis="y", labelcolor=INK)
