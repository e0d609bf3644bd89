"""Sizes that cost what the baseline costs, by the ledger and by PyTorch's own counter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.config import make_plan
from pretrain.comparison.matched_flops import Mix, match_flops, step_flops
from pretrain.comparison.planned_cost import cost_text
from pretrain.comparison.report.files import solved_values
from pretrain.comparison.solved_size import solve_size
from pretrain.config import RunConfig
from pretrain.html_page import environment
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.pretrain.models.random_batch import DENSE, MOT, random_batch
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data

LAYERS = {"width": 2, "depth": 120}
"""One layer of 120 is 0.8 % of the model, so that a whole number of layers always comes within 0.5 %."""
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"towers": DENSE, "ffn_hidden": 96},
    "mot": {"towers": MOT, "num_kv_heads": 2, "ffn_hidden": 96},
    "experts": {
        "towers": MOT,
        "experts": {"text": {"num_experts": 4, "routing": "token_choice", "top_k": 2}},
    },
    "own_experts": {
        "towers": MOT,
        "experts": {"text": {"num_experts": 4, "capacity_factor": 2, "ffn_hidden": 40}},
    },
    "depth": {
        "towers": MOT,
        "depth": {"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"}},
    },
}
MIX = Mix({"text": 500_000, "image": 300_000, "speech": 200_000}, 9_000_000)


def run(tp: int = 1, **model: Any) -> RunConfig:
    values = tiny_run(Path("data"), Path("runs"))
    values["total_tokens"] = 2_000 * values["tokens_per_step"]
    values["model"] |= {"towers": DENSE, "num_heads": 4, "d_model": 64, "ffn_hidden": 160} | model
    values["parallel"]["tp"] = tp
    return validate(RunConfig, values, source="test")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("solve", [None, "width", "depth"])
def test_every_family_spends_the_baselines_flops(solve: Any, family: str) -> None:
    layers = LAYERS.get(solve, 2)
    base, arm = run(num_layers=layers), run(num_layers=layers, **FAMILIES[family])
    if solve is None:
        _, matched = match_flops_over(MIX, base, arm)
    else:
        matched, size = solve_size("arm", arm, base, MIX, solve, source="test")
        assert set(size.keys) <= (
            {"num_layers"}
            if solve == "depth"
            else {"d_model", "num_heads", "num_kv_heads", "ffn_hidden", "experts.text.ffn_hidden"}
        )
        assert matched.total_tokens == base.total_tokens
        assert size.off == pytest.approx(float(step_flops(matched, MIX) / step_flops(base, MIX)) - 1)
    spent = float(matched.num_steps * step_flops(matched, MIX) / (base.num_steps * step_flops(base, MIX)))
    assert abs(spent - 1) <= 0.005
    assert matched.model.head_dim == arm.model.head_dim
    assert matched.model.num_heads / matched.model.kv_heads == arm.model.num_heads / arm.model.kv_heads


def match_flops_over(mix: Mix, base: RunConfig, arm: RunConfig) -> list[RunConfig]:
    """The runs of `match_flops` over a given mix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.comparison.matched_flops.expected_mix", lambda _: mix)
        return match_flops([("dense", base), ("arm", arm)], "dense", "test")


@pytest.mark.parametrize("family", ["mot", "experts"])
def test_pytorchs_counter_agrees(family: str) -> None:
    """It takes a minute for 120 layers, so depths are left to the ledger, which equals it."""
    base, arm = run(), run(**FAMILIES[family])
    batch = random_batch(base.model, padding_tokens=0)
    inputs = build_inputs(batch, base.model)
    # Attention as plain products, which alone the counter knows on CPU, has every pair of a document.
    pairs = sum(n * n for n in inputs.mask.segments)
    mix = Mix(dict(zip(base.model.modalities, inputs.input_tokens, strict=True)), pairs)
    solved, size = solve_size("arm", arm, base, mix, "width", source="test")
    assert size.keys

    def counted(config: RunConfig) -> int:
        model = config.model
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            objective, _, _ = Pretraining(Decoder(model))(build_inputs(batch, model))
            objective.backward()
        return counter.get_total_flops()

    assert abs(counted(solved) / counted(base) - 1) <= 0.005


def test_an_arm_that_costs_as_much_keeps_its_size() -> None:
    arm = run(towers=MOT)
    solved, size = solve_size("mot", arm, run(), MIX, "width", source="test")
    assert solved == arm and size.keys == {} and size.off == 0
    assert size.text == "its own size (0.00 % of the FLOPs a step)"


def test_a_width_can_be_shared_by_tensor_parallel_ranks() -> None:
    base, arm = run(tp=2, num_heads=8), run(tp=2, num_heads=8, num_layers=3)
    solved, _ = solve_size("deep", arm, base, MIX, "width", source="test")
    assert solved.model.num_heads % 2 == 0 and solved.model.ffn_width % 2 == 0
    assert solved.model.num_layers == 3 and solved.model.d_model < 64


def test_what_cannot_be_reached_names_the_two_nearest_sizes() -> None:
    arm = run(num_layers=4, ffn_hidden=96)
    with pytest.raises(ConfigError) as error:
        solve_size("deep", arm, run(num_layers=4), MIX, "depth", source="compare.toml")
    text = str(error.value)
    assert text.startswith(
        'compare.toml: solve = "depth": no legal depth of arms."deep" comes within 0.5 % of'
    )
    below, above = (
        float(step_flops(run(num_layers=n, ffn_hidden=96), MIX) / step_flops(run(num_layers=4), MIX)) - 1
        for n in (5, 6)
    )
    assert (
        f"nearest: num_layers = 5 (\u2212{-100 * below:.2f} %) and num_layers = 6 (+{100 * above:.2f} %)"
        in text
    )
    frozen = arm.model_copy(update={"initial_weights": "weights"})
    with pytest.raises(ConfigError, match='another size than that of its initial_weights = "weights"'):
        solve_size("deep", frozen, run(num_layers=4), MIX, "width", source="compare.toml")


def test_a_plan_has_the_sizes_and_says_so(comparison_files: Callable[..., Any], tmp_path: Path) -> None:
    write_tiny_data(tmp_path / "tiny")
    paths = [f'data.train=[{{path="{tmp_path}/tiny/train"}}]', "model.vocab_tokens=64"]
    deep = "\n[arms.mot.model]\nnum_layers = 3\n"
    files = comparison_files(
        edit=lambda t: (
            'match = "train_flops"\nsolve = "width"\n'
            + t.replace('["model.towers"]', '["model.towers", "model.num_layers"]')
            + deep
        ),
        base_edit=lambda t: t.replace("num_heads = 2", "num_heads = 4") + f"# {VOCABULARY.size}\n",
    )
    plan = make_plan(files.comparison, paths)
    models = {run.config.model.d_model for run in plan.runs if run.arm == "mot"}
    (width,) = models
    assert width < 64 and {run.num_steps for run in plan.runs} == {600}
    (size,) = plan.solved.values()
    assert size.keys["d_model"] == (64, width) and abs(size.off) <= 0.005
    assert f"solved width: mot: d_model 64 \u2192 {width}" in cost_text(plan, None, 1)
    assert solved_values(plan)["solved"]["mot"]["keys"] == size.keys
    page = environment(Path("pretrain/comparison/report")).from_string(
        '{% from "parts.html.j2" import solved_sizes %}{{ solved_sizes(plan) }}'
    )
    assert f"<li>mot: {size.text}</li>" in page.render(plan=plan)
