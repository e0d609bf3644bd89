import copy
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.config import RunConfig, check_run_layout, differences, load

VALUES: dict[str, Any] = {
    "name": "tiny",
    "total_tokens": 1000,
    "tokens_per_step": 128,
    "model": {
        "num_layers": 2,
        "d_model": 32,
        "num_heads": 4,
        "context_tokens": 64,
        "vocab_tokens": 130,
        "towers": {"text": "text", "image": "image"},
    },
    "data": {"train": [{"path": "data/train"}]},
    "optimizer": {"learning_rate": 1e-3},
}

WITH_VECTORS = VALUES["model"] | {"vectors": {"image": {"features": 4}}}
WITH_CONTEXT = VALUES["model"] | {"vectors": {"image": {"features": 4, "objective": "none"}}}
TEMPERED = {"train": [{"path": "a"}, {"path": "b", "weight": 3.0}], "temperature": 2}


def run(**changes: object) -> RunConfig:
    return validate(RunConfig, {**copy.deepcopy(VALUES), **changes}, source="run.toml")


def test_steps_are_derived_and_never_exceed_the_budget() -> None:
    assert run().num_steps == 7  # 7 * 128 = 896 <= 1000
    assert run().sequences_per_step == 2
    assert run().run_dir == Path("runs/tiny")


def _groups(*tables: dict[str, object]) -> dict[str, object]:
    return {"optimizer": {"learning_rate": 1e-3, "groups": list(tables)}}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"tokens_per_step": 100}, "not a multiple of model.context_tokens = 64"),
        ({"total_tokens": 100}, "less than one step"),
        ({"name": "a/b"}, "name"),
        ({"optimizer": {"learning_rate": 1e-3, "towers": {"imge": {}}}}, "legal: text, image, shared"),
        ({"optimizer": {"learning_rate": 1e-3, "schedule": {"warmup_steps": 7}}}, "leaves no step after"),
        ({"optimizer": {}}, "optimizer.learning_rate: required"),
        (_groups({"match": "embeding.*", "frozen": True}), "closest names are embedding.weight.shared"),
        (_groups({"match": "blocks.*.qkv.text", "lr_scale": 2}), r"blocks\.\*\.attention\.qkv\.weight\.text"),
        (_groups({"match": "blocks.9.*", "lr_scale": 2}), r"groups\[0\].match = .* matches no parameter"),
        (_groups({"match": "*norm*", "weight_decay": 0.1}), "routers alone, which are never decayed"),
        ({"data": {"train": []}}, "data.train"),
        ({"precision": "fp16"}, "'fp32' or 'bf16'"),
        ({"seeed": 3}, 'did you mean "seed"'),
        ({"data": TEMPERED}, "temperature = 2 computes the weights of sources from their sizes, but b has"),
        (
            {"data": {"train": [{"path": "ftp://host/a"}]}},
            "no reader for ftp://; legal: http://, https://, s3://",
        ),
        ({"data": {"train": [{"path": "a"}], "heldout": "pipe:cat a"}}, r"must say \{\} where the name"),
        ({"data": {"train": [{"path": "a"}], "cache_gb": 0}}, "data.cache_gb = 0"),
        (
            {"data": {"train": [{"path": "a"}], "cache_gb": float("inf")}},
            "data.cache_gb = Infinity: Input should be a",
        ),
        ({"data": {"train": [{"path": "a"}], "temperature": 0.01}}, "greater than or equal to 0.1"),
        ({"loss_weights": {"speech": 0.5}}, "legal: text, image"),
        ({"loss_weights": {"image": -1}}, "loss_weights.image = -1.0; legal: 0 or more"),
        ({"loss_weights": {"image": 0, "text": 0}}, "nothing is left to learn"),
        (
            {"model": WITH_VECTORS, "data": {"train": [{"path": "a"}], "document_mask": False}},
            r"document_mask = false with model.vectors.image.bidirectional = true was never tried",
        ),
        (
            {"model": WITH_CONTEXT, "loss_weights": {"image": 5.0}},
            r'loss_weights.image = 5.0, but model.vectors.image.objective is "none"',
        ),
        (
            {"model": WITH_VECTORS, "loss_weights": {"image": 0.0}},
            r'loss_weights.image = 0, but model.vectors.image.objective is "diffusion": .*objective = "none"',
        ),
    ],
)
def test_mistakes_are_named_with_what_is_legal(changes: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(**changes)


def test_muon_refuses_stage_3_and_takes_the_others() -> None:
    optimizer = {"learning_rate": 1e-3, "kind": "muon"}
    with pytest.raises(ConfigError, match=r"each step would gather every update; set parallel\.zero_stage"):
        check_run_layout(run(optimizer=optimizer, parallel={"zero_stage": 3}), 2)
    for stage in (0, 1, 2):
        check_run_layout(run(optimizer=optimizer, parallel={"zero_stage": stage}), 2)


HELD_OUT = {"train": [{"path": "data/train"}], "heldout": "data/heldout"}
SOFTMAX = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k", "gate": "softmax"}


@pytest.mark.parametrize("key", ["every_steps.samples", "evaluate.generate"])
def test_samples_are_refused_where_rank_0_cannot_let_the_model_speak(key: str) -> None:
    table, _, name = key.partition(".")
    sampled: dict[str, object] = {table: {name: 5}, "data": HELD_OUT}
    for stage in (0, 1, 2):
        run(**sampled, parallel={"zero_stage": stage})
    for layout in ({"zero_stage": 3}, {"tp": 2}, {"pp": 2}):
        with pytest.raises(
            ConfigError, match=rf"{key} = 5 with parallel\.tp = .*call `motley generate` on a"
        ):
            run(**sampled, parallel=layout)
    with pytest.raises(ConfigError, match=rf"{key} = 5: prompts are held-out documents; set data\.heldout"):
        run(**sampled | {"data": VALUES["data"]})
    with pytest.raises(ConfigError, match=rf"{key} = 5: a gate of model\.depth sees later tokens"):
        run(**sampled, model={**VALUES["model"], "depth": {"image": SOFTMAX}})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"evaluate\.generate = 1; legal: 0 \(none\), or 2 and more"):
        run(evaluate={"generate": 1}, data=HELD_OUT)


def test_weights_of_modalities_are_in_order_and_none_if_all_are_one() -> None:
    assert run(loss_weights={"image": 0.5}).modality_weights == (1.0, 0.5)
    assert run().modality_weights is None
    assert run(loss_weights={"image": 1.0}).modality_weights is None


def test_differences_list_dotted_keys() -> None:
    other = run(seed=2, optimizer={"learning_rate": 2e-3})
    assert differences(run(), other) == [("optimizer.learning_rate", 1e-3, 2e-3), ("seed", 1, 2)]
    assert differences(run(), run()) == []


@pytest.mark.parametrize("path", sorted(Path("pretrain/configs/runs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_runs_load(path: Path) -> None:
    assert load(path).name


def test_the_folder_of_runs_can_be_shown() -> None:
    with pytest.raises(ConfigError, match=r'runs_dir = "a\\ntouch ran": .* control characters'):
        run(runs_dir="a\ntouch ran")
