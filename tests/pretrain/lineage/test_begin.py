"""What a person may ask for at a start, and what is said about what cannot be."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import checkpoint_path
from pretrain.config import RunConfig
from pretrain.lineage.begin import NOTHING_ELSE, Ask, beginning, is_done
from pretrain.lineage.changes import saved_steps
from pretrain.run_files import CHECKPOINTS
from tests.pretrain.lineage.made_run import STEP_TOKENS, make_run, run_config

LONGER = f"total_tokens={40 * STEP_TOKENS}"


def make_runs(runs_dir: Path) -> RunConfig:
    """Two runs; returns the config of one of 20 steps that is done and has checkpoints of steps 10 and 20."""
    config = run_config(runs_dir, schedule={"kind": "wsd"})
    make_run(config, [10, 20])
    make_run(run_config(runs_dir, name="other"), [10])
    return config


@pytest.fixture
def done(tmp_path: Path) -> RunConfig:
    return make_runs(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_runs(tmp_path_factory.mktemp("untouched"))


REFUSED: dict[str, tuple[Ask, list[str], str]] = {
    "a branch without its step": (Ask(branch="b"), [LONGER], "say with --from-step at which checkpoint"),
    "a branch at a step that is gone": (
        Ask(branch="b", from_step=15),
        [LONGER],
        "--from-step 15: {run} has no checkpoint of that step; there are 10, 20",
    ),
    "a branch without a step of its own": (
        Ask(branch="b", from_step=20),
        [],
        "total_tokens = 2560 is 20 steps, and the branch begins behind step 20",
    ),
    "a branch whose schedule begins later": (
        Ask(branch="b", from_step=10),
        ["optimizer.schedule.start_step=15"],
        "optimizer.schedule.start_step = 15, and the branch begins behind step 10",
    ),
    "a branch of a name that exists": (
        Ask(branch="other", from_step=10),
        [LONGER],
        "other exists and holds another run; give the branch another name, or continue what is there",
    ),
    "a branch with the name of its trunk": (Ask(branch="tiny", from_step=10), [LONGER], "exists and holds"),
    "a step to go back to that is gone": (
        Ask(from_step=15),
        [],
        "{run} has no checkpoint of that step; there",
    ),
    "an extension and a step": (
        Ask(extend=True, from_step=10),
        [LONGER],
        "--extend and --from-step do not go together",
    ),
    "an extension and a branch": (
        Ask(extend=True, branch="b"),
        [LONGER],
        "--extend and --branch do not go together",
    ),
    "an extension without a length": (Ask(extend=True), [], "--extend: say how far, such as --extend total"),
    "an extension by a typo": (
        Ask(extend=True),
        [LONGER, "optimizer.schedule.kin=linear"],
        'optimizer.schedule.kin: unknown key; did you mean "kind"',
    ),
    "an extension by another key": (
        Ask(extend=True),
        [LONGER, "optimizer.learning_rate=2e-3"],
        "optimizer.learning_rate: 0.001 there, 0.002 now",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(untouched: RunConfig, what: str) -> None:
    ask, overrides, expected = REFUSED[what]
    before = sorted(untouched.run_dir.parent.rglob("*"))
    with pytest.raises(ConfigError) as error:
        beginning(untouched.run_dir, overrides, ask)
    assert expected.format(run=untouched.run_dir) in str(error.value)
    assert sorted(untouched.run_dir.parent.rglob("*")) == before


def test_a_run_that_has_not_begun_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(run_config(tmp_path).model_dump_json())
    for ask in (Ask(extend=True), Ask(branch="b", from_step=5), Ask(from_step=5)):
        with pytest.raises(ConfigError, match="holds no run yet: --extend, --branch and --from-step are for"):
            beginning(tmp_path / "config.json", [LONGER], ask)
    with pytest.raises(ConfigError, match="is a folder without config"):
        beginning(tmp_path, [], NOTHING_ELSE)


def test_the_same_command_continues_what_it_made(done: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for ask, later in ((Ask(branch="b", from_step=10), "b"), (Ask(extend=True), "tiny")):
        first = beginning(done.run_dir, [LONGER], ask)
        told = first.prepare()
        assert told is not None and told.startswith(f"{done.run_dir.parent / later}: ")
        again = beginning(done.run_dir, [LONGER], ask)
        assert again.config == first.config and again.prepare() is None
        ranks = beginning(again.argv[0], again.argv[1:], NOTHING_ELSE)
        assert ranks.config == first.config and ranks.prepare() is None
        assert not is_done(first.config)
    with pytest.raises(ConfigError, match="total_tokens: 5120 there, 3840 now"):
        beginning(done.run_dir, [f"total_tokens={30 * STEP_TOKENS}"], Ask(branch="b", from_step=10))
    with pytest.raises(ConfigError, match=r"b exists and holds a branch of .* at step 10"):
        beginning(done.run_dir, [LONGER], Ask(branch="b", from_step=20))


def test_a_run_goes_back_once_and_says_how_it_goes_on(done: RunConfig) -> None:
    back = beginning(done.run_dir, ["every_steps.log=3"], Ask(from_step=10))
    told = back.prepare()
    assert (
        told is not None and "back to step 10; checkpoints of steps 20 and later rows of metrics are" in told
    )
    assert "without --from-step it goes on from its newest" in told
    assert saved_steps(done.run_dir) == [10] and back.config.every_steps.log == 3
    assert not is_done(done)
    with pytest.raises(ConfigError, match=r"no checkpoint of that step; there are 10\. A run"):
        beginning(done.run_dir, [], Ask(from_step=20))


def test_a_run_does_not_go_back_behind_its_new_stretch(tmp_path: Path) -> None:
    config = run_config(tmp_path, schedule={"kind": "cosine"})
    make_run(config, [10, 20])
    stretch = [LONGER, "optimizer.schedule.start_step=20"]
    beginning(config.run_dir, stretch, Ask(extend=True)).prepare()
    with pytest.raises(
        ConfigError, match=r"the schedule of .* begins at step 20 .*begin a branch at step 10"
    ):
        beginning(config.run_dir, [], Ask(from_step=10))


def test_a_run_whose_last_checkpoint_is_gone_is_not_done(
    done: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_done(done) and "is done: 20 of 20 steps" in capsys.readouterr().out
    shutil.rmtree(checkpoint_path(done.run_dir / CHECKPOINTS, 20))
    assert not is_done(done)
    assert "it was done at step 20, whose checkpoint is gone" in capsys.readouterr().out
    shutil.rmtree(done.run_dir / CHECKPOINTS)
    with pytest.raises(ConfigError, match="and none of its checkpoints is left; its metrics are"):
        is_done(done)
