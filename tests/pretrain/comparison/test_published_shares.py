"""The published s, and the arms that it may stand beside."""

from collections.abc import Callable
from typing import Any

from pretrain.comparison.config import make_plan
from pretrain.comparison.published_shares import PARAMETERS, PUBLISHED, is_published_mot
from tests.pretrain.comparison.ladder_files import ladder_edit


def test_parameters_are_those_of_the_papers_shapes() -> None:
    """layers, width of the paper's Table 1; the feed-forward width is that of its code."""
    shapes = {"37M": (4, 256), "94M": (8, 512), "443M": (24, 1024), "1.5B": (24, 2048), "7B": (32, 4096)}
    for size, (layers, d) in shapes.items():
        hidden = -(-8 * d // (3 * 256)) * 256
        assert abs(layers * (4 * d * d + 3 * d * hidden) / PARAMETERS[size] - 1) < 0.02
    assert {p.modality for p in PUBLISHED} == {"text", "image", "speech"}
    assert all(0.1 < p.s < 0.7 and p.size in PARAMETERS for p in PUBLISHED)


def test_only_mot_against_dense_stands_beside_the_paper(comparison_files: Callable[..., Any]) -> None:
    def edit(text: str) -> str:
        pair = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
        experts = '[arms.experts.model]\nexperts.text = {num_experts = 4, routing = "expert_choice"}\n'
        text = text.replace('["model.towers"]', '["model.towers", "model.experts"]')
        return ladder_edit()(text + pair + experts)

    plan = make_plan(comparison_files(edit=edit).comparison)
    assert [arm for arm in plan.others if is_published_mot(plan, arm)] == ["mot"]
