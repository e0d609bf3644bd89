"""Which extensions there are, from which checkpoint they go on, and what is said about them."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.lineage.extend import is_key, plan_extension
from tests.pretrain.lineage.made_run import STEP_TOKENS, make_run, run_config

WSD, COSINE = ({"kind": kind, "warmup_steps": 2} for kind in ("wsd", "cosine"))
RAMP = {"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}}


def tokens(steps: int) -> str:
    return f"total_tokens={steps * STEP_TOKENS}"


PLANNED: dict[str, tuple[dict[str, Any], list[str], int, str]] = {
    "constant": ({}, [tokens(40)], 20, "goes on after step 20 as a run of 40 steps would"),
    "wsd": (
        {"schedule": WSD},
        [tokens(40)],
        15,
        "its decay began behind step 16, so the stable phase goes on after step 15, as in a run of 40 steps",
    ),
    "a new stretch": (
        {"schedule": COSINE},
        [tokens(40), "optimizer.schedule.start_step=20"],
        20,
        "steps 21 to 40 are a new stretch, in which the learning rate rises over 2 steps to 0.001 and falls "
        "by half a cosine to 0.0001: the curve is that of no single schedule",
    ),
    "a ramp that stays where it was": (
        {"depth": RAMP},
        [tokens(40), "model.depth.image.dense_frac=0.01", "model.depth.image.ramp_frac=0.04"],
        20,
        "goes on after step 20",
    ),
}


@pytest.mark.parametrize("what", PLANNED)
def test_an_extension_goes_on_where_the_longer_run_made_the_same_steps(tmp_path: Path, what: str) -> None:
    changes, overrides, step, told = PLANNED[what]
    old = run_config(tmp_path, **changes)
    make_run(old, [5, 10, 15, 20])
    planned = plan_extension(old, overrides)
    assert planned is not None and planned.step == step and planned.config.num_steps == 40
    assert planned.told.startswith("extended from 20 to 40 steps; ") and told in planned.told
    assert plan_extension(planned.config, overrides) is None


REFUSED: dict[str, tuple[dict[str, Any], list[int], list[str], str]] = {
    "shorter than what has run": (
        {},
        [20],
        [tokens(15)],
        "is 15 steps, and {run} has made 20; give more than",
    ),
    "no longer than planned": ({"steps": 50}, [20], [tokens(40)], "is 40 steps, and {run} is 50 steps long"),
    "without a checkpoint": ({}, [], [tokens(40)], "{run} has no checkpoint that an extension could go on"),
    "cosine": (
        {"schedule": COSINE},
        [20],
        [tokens(40)],
        "no cosine schedule of 40 steps has made the first 20 steps as they were made. A new stretch has a "
        "schedule of its own, warm-up included: say where it begins, optimizer.schedule.start_step=20",
    ),
    "wsd with another warm-up": (
        {"schedule": WSD},
        [15, 20],
        [tokens(40), "optimizer.schedule.warmup_steps=5"],
        "no wsd schedule of 40 steps has made the first 20 steps as they were made",
    ),
    "wsd without a checkpoint before its decay": (
        {"schedule": WSD},
        [18, 20],
        [tokens(40)],
        "began behind step 16, and no checkpoint before it is left (there are 18, 20)",
    ),
    "a stretch without a checkpoint": (
        {"schedule": COSINE},
        [10, 20],
        [tokens(40), "optimizer.schedule.start_step=15"],
        "optimizer.schedule.start_step = 15: a new stretch begins at a checkpoint; {run} has those of steps "
        "10, 20",
    ),
    "a ramp that would be longer": (
        {"depth": RAMP},
        [20],
        [tokens(40)],
        "keep the ramp where it was: model.depth.image.dense_frac=0.01 model.depth.image.ramp_frac=0.04",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_extended_is_refused_with_what_to_do(tmp_path: Path, what: str) -> None:
    changes, steps, overrides, expected = REFUSED[what]
    old = run_config(tmp_path, **changes)
    make_run(old, steps)
    with pytest.raises(ConfigError) as error:
        plan_extension(old, overrides)
    assert expected.format(run=old.run_dir) in str(error.value)


def test_keys_of_an_extension() -> None:
    assert (
        is_key(tokens(3))
        and is_key("optimizer.schedule.kind=wsd")
        and is_key("model.depth.image.ramp_frac=0")
    )
    assert not is_key("optimizer.learning_rate=1") and not is_key("model.depth.image.gate=tanh")
