"""Figures are looked at by people; tests hold what a person would not see: ids, colours, labels, sizes."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.comparison.findings import Findings
from pretrain.comparison.report import figures


@pytest.fixture
def findings(make_findings: Callable[..., Findings]) -> Callable[..., Findings]:
    return partial(make_findings, seeds=(1, 2))


def crossing(arm: str, _: str, frac: float) -> float:
    return 0.4 * (0.5 - frac) if arm == "mot" else 0.0


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_a_panel_is_valid_svg_in_the_colours_of_the_page(findings: Callable[..., Findings]) -> None:
    f = findings(shift=crossing, noise=0.01)
    draw = partial(figures.draw_curves, findings=f, metric="eval/loss/image", axis="flops", title="image")
    svg = figures.svg_panel(draw, key="panel", label="loss of image")
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "loss of image" and root.get("role") == "img"
    assert "width" not in root.attrib and "viewBox" in root.attrib
    for value in (*figures.ARM_COLOURS, figures.INK, figures.MUTED, figures.RULE):
        assert value.lower() not in svg.lower()
    assert "var(--arm0)" in svg and "var(--arm1)" in svg and "var(--muted)" in svg
    assert "http" not in svg and "<image" not in svg
    assert any(element.text and element.text.startswith("mot ") for element in root.iter())  # text stays text


def test_ids_are_the_panels_own_and_references_follow(findings: Callable[..., Findings]) -> None:
    draw = partial(
        figures.draw_gap, findings=(f := findings(shift=crossing)), contrast=f.contrast("mot", "text")
    )
    one, two = (figures.svg_panel(draw, key=key, label="gap") for key in ("a", "b"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip((one, two), ids, strict=True):
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used and used <= own


def test_the_same_findings_give_the_same_bytes(findings: Callable[..., Findings]) -> None:
    f = findings()
    draw = partial(
        figures.draw_forest, findings=f, contrasts=[f.contrast("mot", m) for m in f.modalities], by="modality"
    )
    assert figures.svg_panel(draw, key="k", label="l") == figures.svg_panel(draw, key="k", label="l")


def test_labels_at_the_ends_do_not_touch(findings: Callable[..., Findings]) -> None:
    f = findings()  # equal arms: their ends lie on each other
    ax = Figure().add_subplot()
    figures.draw_curves(ax, f, "eval/loss/text", "tokens", title="text")
    heights = sorted(text.xy[1] for text in ax.texts)  # type: ignore[attr-defined]
    low, high = ax.get_ylim()
    assert heights[1] - heights[0] == pytest.approx(0.075 * (high - low))
    assert sorted(t.split()[0] for t in texts(ax)) == ["dense", "mot"]


def test_the_fall_from_guessing_sets_no_scale(findings: Callable[..., Findings]) -> None:
    f = findings()
    ax = Figure().add_subplot()
    figures.draw_curves(ax, f, "eval/loss/text", "tokens", title="text")
    first = f.curves("dense", "eval/loss/text")[0].values
    assert ax.get_ylim()[1] < first[0] and ax.get_ylim()[0] < first[-1]


def test_a_crossing_is_marked_with_its_tokens(findings: Callable[..., Findings]) -> None:
    f = findings(shift=crossing)
    ax = Figure().add_subplot()
    figures.draw_gap(ax, f, f.contrast("mot", "text"))
    assert "307 k" in texts(ax)
    assert ax.get_ylim()[0] < 0 < ax.get_ylim()[1]


def test_a_wide_interval_leaves_the_curve_readable(findings: Callable[..., Findings]) -> None:
    f = findings(seeds=(1, 2, 3), shift=crossing, seed_noise=0.6)  # the band is about 10 times the gap
    ax = Figure().add_subplot()
    contrast = f.contrast("mot", "text")
    figures.draw_gap(ax, f, contrast)
    low, high = ax.get_ylim()
    spread = contrast.gap.max() - contrast.gap.min()
    assert contrast.gap_noise.max() > 3 * spread and high - low < 4 * spread


def test_step_matching_shows_s_and_what_was_not_reached(findings: Callable[..., Findings]) -> None:
    f = findings(
        multiplier=lambda arm, m: {"text": 0.5, "image": 2.0, "speech": 1e-3}[m] if arm == "mot" else 1.0
    )
    shown = {}
    for modality in f.modalities:
        ax = Figure().add_subplot()
        figures.draw_matching(ax, f, f.contrast("mot", modality))
        shown[modality] = texts(ax)
    assert "s = 2.00" in shown["text"] and "not reached by all " in shown["text"]
    assert "s = 0.50" in shown["image"] and "not reached by all " not in shown["image"]
    assert not any(text.startswith("s =") for text in shown["speech"])  # no common loss: no line


def test_forest_has_a_row_for_every_modality_and_all_seeds(findings: Callable[..., Findings]) -> None:
    f = findings(seeds=(1, 2, 3), seed_noise=0.01)
    ax = Figure().add_subplot()
    figures.draw_forest(ax, f, [f.contrast("mot", m) for m in f.modalities], "modality")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["speech", "image", "text"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [3, 3, 3]  # type: ignore[arg-type]
    assert ax.get_xlim()[0] == -ax.get_xlim()[1]


def test_forest_of_a_modality_has_a_row_for_every_arm(findings: Callable[..., Findings]) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    f = findings(seeds=(1, 2), seed_noise=0.01, edit=lambda text: text + third)
    ax = Figure().add_subplot()
    figures.draw_forest(ax, f, [f.contrast(arm, "text") for arm in f.plan.others], "arm")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["pair", "mot"]
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    assert [line.get_color() for line in diamonds] == [figures.colour(f, arm) for arm in ("mot", "pair")]


def test_no_label_stands_where_a_longer_curve_may_pass(findings: Callable[..., Findings]) -> None:
    f = findings(step_s=lambda arm: 0.2 if arm == "mot" else 0.1)
    ax = Figure().add_subplot()
    figures.draw_curves(ax, f, "eval/loss/text", "seconds", title="text")
    assert [text.xy[0] for text in ax.texts] == pytest.approx([600 * 0.201] * 2)  # type: ignore[attr-defined]


def test_no_curve_lies_below_the_axis(findings: Callable[..., Findings]) -> None:
    f = findings(seed_noise=0.1)
    ax = Figure().add_subplot()
    figures.draw_curves(ax, f, "eval/loss/text", "tokens", title="text")
    lowest = min(c.values.min() for arm in f.plan.arms for c in f.curves(arm, "eval/loss/text"))
    assert ax.get_ylim()[0] < lowest


def test_a_metric_that_no_run_has_is_an_empty_panel(findings: Callable[..., Findings]) -> None:
    ax = Figure().add_subplot()
    figures.draw_curves(ax, findings(), "train/loss/video", "tokens", title="video")
    assert texts(ax) == ["not measured"] and ax.get_title() == "video"


def test_the_forest_shows_the_margin_and_fills_verdicts_only(findings: Callable[..., Findings]) -> None:
    f = findings(
        seeds=(1, 2, 3), noise=0.004, multiplier=lambda arm, m: 2.0 if (arm, m) == ("mot", "image") else 1.0
    )
    ax = Figure().add_subplot()
    figures.draw_forest(ax, f, [f.contrast("mot", m) for m in f.modalities], "modality")
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    assert [d.get_markerfacecolor() != figures.PAPER for d in diamonds] == [False, True, False]
    assert len(ax.collections) == 3 and ax.get_xlabel().endswith("95 % joint intervals")
