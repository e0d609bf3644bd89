"""Steps for equal FLOPs, from real shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.config import make_plan
from pretrain.comparison.matched_flops import expected_mix, match_flops, step_flops
from pretrain.config import RunConfig
from pretrain.models.accounting import visible_pairs
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


def run(data: Path, steps: int, **model: Any) -> RunConfig:
    values = tiny_run(data, data)
    values["total_tokens"] = steps * values["tokens_per_step"]
    values["optimizer"]["schedule"]["warmup_steps"] = steps // 10
    values["model"] |= model
    return validate(RunConfig, values, source="test")


def test_the_mix_is_that_of_the_documents_by_their_weights(tmp_path: Path) -> None:
    image = VOCABULARY.start("image")
    write_tokens(tmp_path / "a", [np.array([1, 9, 9, 9, 2])] * 4)
    write_tokens(tmp_path / "b", [np.concatenate([[1, 3], image + np.arange(16), [4, 2]])] * 2)
    values = tiny_run(tmp_path, tmp_path)
    values["data"]["train"] = [
        {"path": str(tmp_path / "a"), "weight": 3},
        {"path": str(tmp_path / "b"), "weight": 1},
    ]
    mix = expected_mix(validate(RunConfig, values, source="test"))
    per_document = {"text": 0.75 * 5 + 0.25 * 4, "image": 0.25 * 16, "speech": 0}  # ids
    total = sum(per_document.values())
    assert mix.tokens == {m: round(1e6 * n / total) for m, n in per_document.items()}
    pairs = 0.75 * visible_pairs([4]) + 0.25 * visible_pairs([19])
    assert mix.visible_pairs == round(1e6 * pairs / total)


@pytest.mark.parametrize(
    "keys, weight, of_first",
    [({"weights_of": "tokens"}, 3, 3 / 4 / (3 / 4 + 1 / 19)), ({"temperature": 1.0}, 1, 2 / 3)],
)
def test_the_mix_is_that_of_the_documents_that_are_drawn(
    tmp_path: Path, keys: dict[str, Any], weight: float, of_first: float
) -> None:
    """Sources: 4 documents of 4 slots, 2 of 19; `of_first`: share of the former in what is drawn."""
    image = VOCABULARY.start("image")
    write_tokens(tmp_path / "a", [np.array([1, 9, 9, 9, 2])] * 4)
    write_tokens(tmp_path / "b", [np.concatenate([[1, 3], image + np.arange(16), [4, 2]])] * 2)
    values = tiny_run(tmp_path, tmp_path)
    first = {"path": str(tmp_path / "a"), "weight": weight}
    values["data"] |= {"train": [first, {"path": str(tmp_path / "b")}], **keys}
    mix = expected_mix(validate(RunConfig, values, source="test"))
    text, images = of_first * 5 + (1 - of_first) * 4, (1 - of_first) * 16
    assert mix.tokens["image"] == pytest.approx(1e6 * images / (text + images), abs=1)


def test_budgets_agree_and_schedules_are_stretched(data: Path) -> None:
    dense, wide = run(data, 400), run(data, 400, experts={"text": {"num_experts": 4, "capacity_factor": 2}})
    table = {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"}
    some = run(data, 400, experts=wide.model_dump()["model"]["experts"], depth={"text": table})
    first, second, third = match_flops([("dense", dense), ("wide", wide), ("some", some)], "dense", "test")
    assert first == dense
    mix = expected_mix(dense)
    ratio = second.num_steps * step_flops(second, mix) / (400 * step_flops(dense, mix))
    assert second.num_steps < third.num_steps
    assert third.num_steps * step_flops(third, mix) / (400 * step_flops(dense, mix)) == pytest.approx(
        1, abs=0.005
    )
    assert second.num_steps < 400 and ratio == pytest.approx(1, abs=0.005)
    assert second.optimizer.schedule.warmup_steps == round(second.num_steps / 10)
    assert second.model == wide.model and second.tokens_per_step == dense.tokens_per_step


def test_what_cannot_be_met_is_refused_with_a_length_that_can(data: Path) -> None:
    def arms(steps: int) -> list[tuple[str, RunConfig]]:
        experts = {"text": {"num_experts": 4, "capacity_factor": 4}, "image": {"num_experts": 2}}
        return [("dense", run(data, steps)), ("wide", run(data, steps, experts=experts))]

    with pytest.raises(ConfigError, match=r'arms\."wide" costs .* % off, more than 0.5 %') as error:
        match_flops(arms(20), "dense", "test")
    told = int(str(error.value).rpartition("(")[2].split()[0])
    match_flops(arms(told), "dense", "test")


def test_a_plan_has_the_steps_and_may_differ_in_them(comparison_files: Any, data: Path) -> None:
    wider = "\n[arms.mot.model.experts.text]\nnum_experts = 2\ncapacity_factor = 2\n"
    files = comparison_files(
        edit=lambda t: 'match = "train_flops"\n' + t.replace('["model.towers"]', '["model"]') + wider,
        base_edit=lambda t: t.replace("2_816", str(VOCABULARY.size)),
    )
    paths = [f'data.train=[{{path="{data}/train"}}]', f'data.heldout="{data}/heldout"']
    with pytest.raises(ConfigError, match="vary"):  # a table that holds what all arms share
        make_plan(files.comparison, paths)
    vary = 'comparison.vary=["model.towers", "model.experts"]'
    plan = make_plan(files.comparison, [*paths, vary])
    dense, mot = (plan.run(arm, 2).config for arm in plan.arms)
    assert dense.num_steps == 600 > mot.num_steps and dense.optimizer.schedule.warmup_steps == 20
    assert mot.optimizer.schedule.warmup_steps == round(20 * mot.num_steps / 600)
