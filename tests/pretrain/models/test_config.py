import pytest
from pydantic import ValidationError

from pretrain.models.config import PARTS, ModelConfig

VALUES = {"num_layers": 2, "d_model": 96, "num_heads": 4, "context_tokens": 64, "vocab_tokens": 100}
MOT = {"text": "text", "image": "image", "speech": "speech"}
YARN = {"kind": "yarn", "factor": 4.0, "original_context_tokens": 64}


def model(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**VALUES, "towers": MOT, **changes})


@pytest.mark.parametrize(
    "towers, names, of_modality",
    [
        (MOT, ("text", "image", "speech"), (0, 1, 2)),
        ({"text": "all", "image": "all", "speech": "all"}, ("all",), (0, 0, 0)),
        ({"text": "text", "image": "media", "speech": "media"}, ("text", "media"), (0, 1, 1)),
        ({"text": "words", "image": "image", "speech": "words"}, ("words", "image"), (0, 1, 0)),
    ],
    ids=["mot", "dense", "image+speech", "text+speech"],
)
def test_a_variant_is_a_table(towers: dict, names: tuple, of_modality: tuple) -> None:
    config = model(towers=towers)
    assert (config.tower_names, config.tower_of_modality) == (names, of_modality)


def test_tied_parts_have_one_shared_shard() -> None:
    config = model(untied=["feed_forward"])
    assert config.shards_of("feed_forward") == ("text", "image", "speech")
    assert {config.shards_of(part) for part in PARTS if part != "feed_forward"} == {("shared",)}


def test_a_shorthand_is_its_parts() -> None:
    """Today's three names, with which older files are written, are all parts but embedding and head."""
    coarse, fine = (
        model(),
        model(untied=[part for part in PARTS if part not in ("embedding", "head", "vectors")]),
    )
    assert [coarse.shards_of(part) for part in PARTS] == [fine.shards_of(part) for part in PARTS]
    assert coarse.tied_parts == fine.tied_parts == ("embedding", "head")
    assert model(untied=["qkv", "embedding"]).tied_parts == (
        "qk_norm", "attention_out", "feed_forward", "norm", "head",
    )  # fmt: skip


@pytest.mark.parametrize(
    "d_model, width", [(256, 768), (512, 1536), (1024, 2816), (2048, 5632), (4096, 11008)]
)
def test_feed_forward_width_is_the_published_one(d_model: int, width: int) -> None:
    """8 d / 3 rounded up to 256, as in MoT's code and Llama 7B."""
    assert model(d_model=d_model).ffn_width == width


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"num_heads": 5}, "not divisible by num_heads"),
        ({"num_heads": 32}, "odd"),
        ({"head_size": 5}, "odd"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3"),
        ({"towers": {"text": "shared"}}, '"shared"'),
        ({"towers": {"text": "a.b"}}, "dot"),
        ({"towers": {}}, "towers"),
        ({"qk_norm": False, "qk_norm_eps": 1e-6}, "qk_norm_eps = 1e-06, but qk_norm = false"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, 'rope_theta = 1.0 with rope_scaling.kind = "yarn"'),
        ({"dropout": 1.0}, "dropout"),
        ({"untied": ["norm", "norm"]}, "twice"),
        ({"untied": ["attention", "qkv"]}, r"names qkv twice: .*\"attention\" stands for qkv, qk_norm, att"),
        ({"untied": ["attention_norm"]}, "untied"),
        ({"untied": ["qk_norm"], "qk_norm": False}, "there are no such weights"),
        ({"untied": ["head"], "tied_embeddings": True}, "both are untied or none"),
        ({"untied": ["embedding", "norm"], "tied_embeddings": True}, "untied names one of them"),
        ({"untied": ["vectors"]}, r"no model.vectors.<modality> is set"),
        ({"vectors": {"video": {"features": 2}}}, 'vectors."video": .* legal: image, speech'),
        ({"vectors": {"text": {"features": 2}}}, 'vectors."text"'),
        (
            {
                "vectors": {"image": {"features": 2}},
                "depth": {"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}},
            },
            "take depth.image out",
        ),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        model(**changes)


def depth_table(**changes: object) -> dict[str, object]:
    return {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": {"video": depth_table()}}, r'depth\."video": no such modality; legal: text, image'),
        (
            {"depth": {"image": depth_table(mean_ratio=0.01)}},
            r"depth\.image: mean_ratio = 0\.01 cannot be had",
        ),
        (
            {"depth_block": {"keys": "selected"}},
            r"depth_block is set, but .* no model\.depth\.<modality>; add one \(modalities: text, image\)",
        ),
    ],
)
def test_depth_that_does_not_fit_the_model_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(towers={"text": "text", "image": "image"}, **changes)


def test_what_is_causal() -> None:
    def found(**changes: object) -> tuple[bool, bool]:
        config = model(towers={"text": "text", "image": "image"}, depth={"image": depth_table(**changes)})
        return config.is_causal, config.has_causal_form

    assert found() == (True, True)
    assert found(rule="top_k") == (False, True)
    assert found(gate="softmax") == (False, False)
    assert model().is_causal


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**6},
        {"context_tokens": 10**5000},
        {"ffn_hidden": 2**31},
        {"experts": {"text": {"num_experts": 10**10, "routing": "expert_choice"}}},
        {"towers": {f"m{number}": "all" for number in range(65)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_nobody_trains_is_refused_before_anything_is_computed(changes: dict) -> None:
    with pytest.raises(ValidationError):
        model(**changes)
