from dataclasses import dataclass, field, replace

import pytest
from pydantic import ValidationError

from parallel.layout import (
    Coordinates,
    ParallelConfig,
    check_layout,
    coordinates,
    data_parallel_size,
    legal_layouts,
    rank_of,
)


@dataclass(frozen=True)
class Shape:
    num_layers: int = 4
    num_heads: int = 8
    kv_heads: int = 4
    ffn_width: int = 96
    vocab_tokens: int = 100
    tied_embeddings: bool = False
    context_tokens: int = 6
    expert_widths: dict[str, int] = field(default_factory=dict)
    whole_blocks: tuple[int, ...] = ()


def check(
    world_size: int = 2,
    sequences: int = 8,
    precision: str = "fp32",
    shape: Shape | None = None,
    **values: object,
) -> None:
    check_layout(
        ParallelConfig.model_validate(values),
        shape or Shape(),
        world_size=world_size,
        sequences_per_step=sequences,
        precision=precision,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"zero_stage": 3},
        {"micro_batch_sequences": 4},
        {"zero_stage": 0},
        {"tp": 2},
        {"pp": 2},
        {"pp": 2, "zero_stage": 0},
        {"tp": 2, "pp": 4, "world_size": 16},
        {"tp": 4, "world_size": 4, "micro_batch_sequences": 2},
        {"tp": 4, "world_size": 4, "sequence_parallel": False},
    ],
)
def test_legal_layouts_pass(values: dict) -> None:
    check(**values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"world_size": 3}, "8 sequences per step .* dp = 3 .* multiple of 3"),
        ({"micro_batch_sequences": 8}, "multiple of 16"),
        ({"world_size": 6, "tp": 2, "pp": 2}, "6 processes .* tp = 2 x pp = 2 x dp; start a multiple of 4"),
        (
            {"tp": 8, "world_size": 8, "sequence_parallel": False, "shape": Shape(vocab_tokens=96)},
            "tp = 8 does not divide model.num_kv_heads = 4, .* parallel.tp = 1, 2, 4$",
        ),
        (
            {"tp": 3, "world_size": 3, "shape": Shape(vocab_tokens=99, kv_heads=8)},
            "tp = 3 does not divide model.num_heads = 8, .* parallel.tp = 1, 2, 4, 8$",
        ),
        (
            {"tp": 2, "shape": Shape(ffn_width=33)},
            "tp = 2 does not divide model.ffn_hidden = 33, .* parallel.tp = 1$",
        ),
        (
            {"tp": 2, "shape": Shape(expert_widths={"text": 96, "image": 33})},
            "tp = 2 does not divide model.experts.image.ffn_hidden = 33, .* parallel.tp = 1$",
        ),
        ({"tp": 2, "shape": Shape(vocab_tokens=99)}, "model.vocab_tokens = 99, .* model.vocab_tokens = 100 "),
        (
            {"tp": 4, "world_size": 4},
            r"tp = 4 .* the 6 tokens .*micro_batch_sequences = 1 x .*context_tokens = 6",
        ),
        (
            {"pp": 8, "world_size": 8, "sequences": 9, "shape": Shape(whole_blocks=(1, 3))},
            "has 4 of each; 2 blocks with depth routing stay whole; set parallel.pp = 6 or less",
        ),
        ({"pp": 9, "world_size": 9, "sequences": 9}, "has 4 of each; set parallel.pp = 8 or less"),
        (
            {"pp": 2, "zero_stage": 2},
            "zero_stage = 2 with parallel.pp = 2: .*zero_stage = 1, or parallel.pp",
        ),
        ({"pp": 2, "zero_stage": 3}, "zero_stage = 3 with parallel.pp = 2"),
        (
            {"pp": 2, "shape": Shape(tied_embeddings=True)},
            "pp = 2 with model.tied_embeddings = true: .*; set parallel.pp = 1, or",
        ),
        ({"zero_stage": 0, "precision": "bf16"}, "use zero_stage = 1, 2 or 3"),
        ({"zero_stage": 0, "precision": "bf16", "pp": 2}, "use zero_stage = 1$"),
    ],
)
def test_illegal_layouts_name_the_values_and_the_fix(values: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        check(**values)
    assert "\n" not in str(error.value), "one cause, one message"


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ValueError) as error:
        check(world_size=7, tp=16, pp=16, zero_stage=2)
    lines = str(error.value).splitlines()
    parts = (
        "kv_heads",
        "num_heads",
        "vocab_tokens",
        "6 tokens",
        "without attention or",
        "zero_stage",
        "7 proc",
    )
    assert len(lines) == len(parts)
    for part, line in zip(parts, lines, strict=True):
        assert part in line, (part, line)


@pytest.mark.parametrize("values", [{"zero_stage": 4}, {"tp": 0}, {"micro_batch_sequences": 0}, {"dp": 2}])
def test_impossible_numbers_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        ParallelConfig.model_validate(values)


def test_ranks_go_tp_first_then_dp_then_pp() -> None:
    config = ParallelConfig(tp=2, pp=2)
    places = [coordinates(config, 12, rank) for rank in range(12)]
    assert places[:4] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert places[6] == Coordinates(pp_rank=1, dp_rank=0, tp_rank=0)
    assert [rank_of(config, 12, place) for place in places] == list(range(12))
    assert len(set(places)) == 12 and data_parallel_size(config, 12) == 3


def legal(shape: Shape, gpus: int = 8, precision: str = "bf16") -> list[ParallelConfig]:
    return legal_layouts(
        shape,
        gpus,
        sequences_per_step=16,
        precision=precision,  # type: ignore[arg-type]
        like=ParallelConfig(collective_timeout_s=7),
    )


def test_the_list_of_legal_layouts_is_what_the_check_lets_pass() -> None:
    shape = Shape(context_tokens=8)
    listed = legal(shape)
    assert len(set(listed)) == len(listed) > 90
    assert {layout.collective_timeout_s for layout in listed} == {7}
    for tp in range(1, 9):
        for pp in range(1, 9):
            for zero_stage in range(4):
                for sequences in range(1, 17):
                    values = {
                        "tp": tp,
                        "pp": pp,
                        "zero_stage": zero_stage,
                        "micro_batch_sequences": sequences,
                    }
                    config = ParallelConfig.model_validate(values | {"collective_timeout_s": 7})
                    try:
                        check_layout(config, shape, world_size=8, sequences_per_step=16, precision="bf16")
                    except ValueError:
                        assert config not in listed, config
                    else:
                        assert config in listed, config


def test_a_narrow_model_has_fewer_layouts() -> None:
    assert {layout.tp for layout in legal(Shape(context_tokens=8))} == {1, 2, 4}
    assert {layout.tp for layout in legal(replace(Shape(context_tokens=8), kv_heads=1))} == {1}
    assert {layout.zero_stage for layout in legal(Shape(), precision="fp32")} == {0, 1, 2, 3}
