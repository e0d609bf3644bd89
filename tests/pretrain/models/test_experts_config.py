import pytest
from pydantic import ValidationError

from pretrain.models.experts_config import ExpertsConfig
from tests.pretrain.models.random_batch import DENSE, MOT, tiny_config

TOKEN = {"num_experts": 4, "routing": "token_choice"}


def test_capacities_are_whole_and_a_token_is_taken_once() -> None:
    experts = ExpertsConfig(num_experts=4)
    assert [experts.capacity(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert ExpertsConfig(num_experts=3, capacity_factor=1.1).capacity(30) == 11
    assert ExpertsConfig(num_experts=1).capacity(7) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({**TOKEN, "top_k": 5}, "top_k = 5 of num_experts = 4; at most all"),
        ({"num_experts": 4, "top_k": 2}, "under expert_choice capacity_factor = 2 gives"),
        ({**TOKEN, "capacity_factor": 1.5}, "token_choice drops no token: use top_k"),
        ({"num_experts": 2, "capacity_factor": 3}, "cannot take a token twice; at most 2"),
        ({"num_experts": 2, "load_balance": 0.1}, 'loads are equal; .* set routing = "token_choice"'),
        ({"num_experts": 2, "routing": "hash"}, "token_choice"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExpertsConfig.model_validate(values)


@pytest.mark.parametrize(
    ("towers", "changes", "message"),
    [
        (MOT, {"experts": {"all": {"num_experts": 2}}}, 'experts."all": no such tower; legal: text, image'),
        (
            MOT,
            {"experts": {"text": {"num_experts": 2}}, "untied": ["attention"]},
            'share one feed-forward; add "feed_forward" to untied',
        ),
        (DENSE, {"experts": {"all": TOKEN}}, 'the router would not learn .* or norm_placement = "pre"'),
    ],
)
def test_a_model_refuses_experts_that_it_cannot_have(towers: dict, changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(towers, **changes)


def test_experts_belong_to_a_tower_or_to_the_shard_of_the_only_one() -> None:
    hybrid = tiny_config(MOT, experts={"text": {"num_experts": 2, "ffn_hidden": 8}})
    assert hybrid.expert_widths == {"text": 8} and hybrid.experts_of("image") is None
    assert (hybrid.width_of("text"), hybrid.width_of("image")) == (8, 24)
    tied = tiny_config(DENSE, untied=[], experts={"all": {"num_experts": 2, "router_z": 0.1}})
    assert tied.experts_of("shared") == tied.experts["all"]
