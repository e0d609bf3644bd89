"""The figures of a ladder draw what the findings hold."""

import math
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_shares import EqualLossShare
from pretrain.comparison.report.figures import PAPER
from pretrain.comparison.report.ladder_figures import draw_differences, draw_shares, size_colour
from pretrain.comparison.statistics import Interval


def test_a_line_per_size_and_a_filled_marker_per_verdict(turning_ladder: LadderFindings) -> None:
    ladder = turning_ladder
    ax = Figure().add_subplot()
    draw_differences(ax, ladder, "mot", "text")
    markers = [line for line in ax.lines if line.get_marker() == "o"]
    filled = [m.get_markerfacecolor() != PAPER for m in markers]
    winners = [bool(c and c.winner) for cell in ladder.cells if (c := ladder.contrast(cell, "mot", "text"))]
    assert filled == winners and len(markers) == 5 and any(filled) and not all(filled)
    lines = [line for line in ax.lines if line.get_linewidth() == 1.6 and line.get_marker() == "None"]
    assert [line.get_color() for line in lines] == [size_colour(ladder, size) for size in ("d32", "d64")]
    low, high = ax.get_ylim()
    assert low == -high and high > 100 * ladder.plan.config.margin
    cell, findings = next(iter(ladder.cells.items()))
    scope = replace(findings.scope, interim=True)
    unfinished = replace(ladder, cells=ladder.cells | {cell: replace(findings, scope=scope)})
    ax = Figure().add_subplot()
    draw_differences(ax, unfinished, "mot", "text")
    assert len([line for line in ax.lines if line.get_marker() == "o"]) == 4
    shares = Figure().add_subplot()
    draw_shares(shares, ladder, "mot", "text")
    ours = [line for line in shares.lines if line.get_marker() == "D"]
    expected = [list(ladder.shares[size, "mot", "text"].values())[-1].value for size in ("d32", "d64")]
    assert [float(line.get_ydata()[0]) for line in ours] == pytest.approx(expected)  # type: ignore[index]
    theirs = [line for line in shares.lines if line.get_marker() == "s"]
    assert len(theirs) == 1 and len(theirs[0].get_xdata()) == 6  # type: ignore[arg-type]
    beyond = EqualLossShare(math.inf, Interval(math.inf, math.inf), False)
    cells = ladder.shares["d32", "mot", "text"]
    worse = replace(ladder, shares=ladder.shares | {("d32", "mot", "text"): dict.fromkeys(cells, beyond)})
    shares = Figure().add_subplot()
    draw_shares(shares, worse, "mot", "text")
    assert math.isfinite(shares.get_ylim()[1])
