"""What a comparison file may say. Most tests are mistakes that people make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import is_comparison, make_plan
from pretrain.models.accounting import train_flops
from tests.pretrain.tiny_data import write_tiny_data

Files = Any


def test_arms_times_seeds_with_one_directory_each(comparison_files: Callable[..., Files]) -> None:
    plan = make_plan(comparison_files().comparison)
    assert plan.arms == ("dense", "mot")
    # arms of a seed are neighbours: they run side by side, and the first seed can be compared soonest
    assert [run.name for run in plan.runs] == [
        f"{arm}_seed{s}" for s in (1, 2, 3) for arm in ("dense", "mot")
    ]
    assert plan.run("dense", 2).config.model.tower_names == ("all",)
    assert plan.run("mot", 2).config.model.tower_names == ("text", "image", "speech")
    assert plan.run("mot", 3).config.seed == 3
    assert plan.directory.name == "dense_vs_mot"
    assert plan.run("mot", 3).config.run_dir == plan.directory / "mot_seed3"


def test_the_baseline_may_have_more_seeds(comparison_files: Callable[..., Files]) -> None:
    plan = make_plan(comparison_files(edit=lambda t: "extra_baseline_seeds = [8, 9]\n" + t).comparison)
    assert [run.name for run in plan.runs[6:]] == ["dense_seed8", "dense_seed9"]


def test_five_seeds_are_the_default(comparison_files: Callable[..., Files]) -> None:
    plan = make_plan(comparison_files(edit=lambda t: t.replace("seeds =", "# seeds =")).comparison)
    assert plan.config.seeds == (1, 2, 3, 4, 5) and plan.config.margin == 0.005


def test_contrasts_are_named_and_the_primary_ones_are_the_verdicts(
    comparison_files: Callable[..., Files],
) -> None:
    def edit(text: str) -> str:
        third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
        return (
            'primary = ["pair", "mot_or_pair"]\n'
            + text
            + third
            + '[contrasts]\nmot_or_pair = ["mot", "pair"]\n'
        )

    config = make_plan(comparison_files(edit=edit).comparison).config
    assert list(config.differences) == ["mot", "pair", "mot_or_pair"]
    assert config.verdicts == ("pair", "mot_or_pair")


def test_a_comparison_is_told_from_a_run(comparison_files: Callable[..., Files]) -> None:
    files = comparison_files()
    assert is_comparison(files.comparison) and not is_comparison(files.base)


def test_dotted_keys_and_tables_mean_the_same(comparison_files: Callable[..., Files]) -> None:
    def dotted(text: str) -> str:
        table = '[arms.dense.model]\ntowers = {text = "all", image = "all", speech = "all"}'
        keys = (
            '[arms.dense]\n"model.towers.text" = "all"\n'
            'model.towers.image = "all"\n"model.towers" = {speech = "all"}'
        )
        assert table in text
        return text.replace(table, keys)

    table = make_plan(comparison_files().comparison)
    assert make_plan(comparison_files(edit=dotted).comparison).runs == table.runs


def test_overrides_reach_the_base_of_every_arm_or_the_comparison(
    comparison_files: Callable[..., Files],
) -> None:
    overrides = ["model.num_layers=3", "comparison.seeds=[7]", "comparison.name=other"]
    plan = make_plan(comparison_files().comparison, overrides)
    assert {run.config.model.num_layers for run in plan.runs} == {3}
    assert [run.seed for run in plan.runs] == [7, 7] and plan.directory.name == "other"


def test_common_changes_reach_all_arms(comparison_files: Callable[..., Files]) -> None:
    plan = make_plan(comparison_files(edit=lambda t: t + "[common]\nmodel.num_layers = 5\n").comparison)
    assert {run.config.model.num_layers for run in plan.runs} == {5}
    with pytest.raises(ConfigError, match='num_layer: unknown key; did you mean "num_layers"'):
        make_plan(comparison_files(edit=lambda t: t + "[common]\nmodel.num_layer = 5\n").comparison)


MISTAKES = {
    "unknown key": (
        lambda t: t.replace("baseline", "base_line"),
        r'base_line: unknown key; did you mean "baseline"',
    ),
    "baseline is no arm": (
        lambda t: t.replace('baseline = "dense"', 'baseline = "densee"'),
        "is no arm; arms: dense",
    ),
    "no seed": (lambda t: t.replace("[1, 2, 3]", "[]"), "seeds"),
    "a seed twice": (lambda t: t.replace("[1, 2, 3]", "[1, 1]"), "a seed is named twice"),
    "one arm": (lambda t: t.replace("[arms.mot]", ""), "arms"),
    "a table of its own": (lambda t: t.replace("[arms.dense.model]", "[dense]"), "dense: unknown key"),
    "no such base": (lambda t: t.replace("base.toml", "basis.toml"), "basis.toml: no such file"),
    "matched on flops": (lambda t: 'match = "flops"\n' + t, "match.*'tokens'"),
    "decided by training loss": (
        lambda t: 'deciding_metric = "train/loss"\n' + t,
        "'eval/causal/loss' or 'eval/loss'",
    ),
    "decided causally, and an arm cannot be": (
        lambda t: (
            t.replace('["model.towers"]', '["model.towers", "model.depth"]')
            + "model.depth.image = "
            + '{schedule = "linear", mean_ratio = 0.5, rule = "top_k", gate = "softmax"}\n'
        ),
        r'eval/causal/loss decides, but arms."mot" has no causal form: .* set deciding_metric = "eval/loss"',
    ),
    "arm sets what may not vary": (
        lambda t: t + "optimizer.learning_rate = 2e-3\n",
        r'arms."mot" sets "optimizer.learning_rate", but `vary` = .*add it to `vary`',
    ),
    "vary names no key": (
        lambda t: t.replace('["model.towers"]', '["model.towers", "model.tower"]'),
        'vary: "model.tower" is no key of a run; did you mean "model.towers',
    ),
    "vary what is matched": (
        lambda t: t.replace('["model.towers"]', '["model.towers", "total_tokens"]'),
        'vary names "total_tokens", but match = "tokens" holds it equal',
    ),
    "vary a table that holds what is matched": (
        lambda t: t.replace('["model.towers"]', '["model"]'),
        'vary names "model", but match = "tokens" holds it equal',
    ),
    "vary the seed": (lambda t: t.replace('["model.towers"]', '["seed"]'), "the comparison sets it"),
    "an arm with a slash": (lambda t: t.replace("[arms.mot]", '[arms."m/t"]'), "names folders"),
    "a seed of the baseline twice": (
        lambda t: "extra_baseline_seeds = [3]\n" + t,
        r"extra_baseline_seeds = \[3\]: a seed is named twice",
    ),
    "a margin in per cent": (lambda t: "margin = 1\n" + t, "margin"),
    "a contrast of no arm": (
        lambda t: t + '[contrasts]\nx = ["mot", "mott"]\n',
        r'contrasts.x: "mott" is no arm; arms: dense, mot',
    ),
    "a contrast of an arm with itself": (
        lambda t: t + '[contrasts]\nx = ["mot", "mot"]\n',
        "contrasts.x: mot \u2212 mot is always 0",
    ),
    "a contrast that is there anyway": (
        lambda t: t + '[contrasts]\nx = ["dense", "mot"]\n',
        'contrasts.x is the contrast "mot" again',
    ),
    "a contrast with the name of an arm": (
        lambda t: t + '[contrasts]\nmot = ["dense", "mot"]\n',
        r'contrasts\."mot": use letters, .* no name of an arm',
    ),
    "a contrast of three arms": (lambda t: t + '[contrasts]\nx = ["a", "b", "c"]\n', "contrasts.x"),
    "a verdict on no contrast": (
        lambda t: 'primary = ["dense"]\n' + t,
        'primary: "dense" is no contrast; contrasts: mot',
    ),
    "an arm that is no run": (lambda t: t + "model.towers.text = 3\n", r'arms."mot": model.towers.text'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_with_what_to_do(mistake: str, comparison_files: Callable[..., Files]) -> None:
    edit, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        make_plan(comparison_files(edit=edit).comparison)


def test_an_arm_that_equals_the_baseline_is_refused(comparison_files: Callable[..., Files]) -> None:
    def edit(text: str) -> str:
        return text.replace("[arms.dense.model]\ntowers = {", "[arms.dense]\n#")

    with pytest.raises(ConfigError, match=r'arms."mot" is the baseline again'):
        make_plan(comparison_files(edit=edit).comparison)


def test_a_base_without_held_out_data_is_refused(comparison_files: Callable[..., Files]) -> None:
    files = comparison_files(base_edit=lambda text: text.replace("heldout =", "#"))
    with pytest.raises(ConfigError, match=r"eval/causal/loss decides, but data\.heldout is missing"):
        make_plan(files.comparison)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4", r"comparison.seeds=\[1, 2\]"),
        ("name=x", "comparison.name="),
        ("model.towers.text=all", 'arm "dense" sets "model.towers.text" itself'),
        ("model.num_layer=3", 'did you mean "num_layers"'),
        ("comparison.sedes=[1]", 'did you mean "seeds"'),
    ],
)
def test_an_override_that_would_be_lost_is_refused(
    override: str, message: str, comparison_files: Callable[..., Files]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(comparison_files().comparison, [override])


SHIPPED = sorted(Path("pretrain/configs/compare").glob("*.toml"))


@pytest.fixture(scope="module")
def some_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override: a comparison at equal FLOPs is planned with what its data are."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return f'data.train=[{{path = "{folder / "train"}"}}]'


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_comparisons_are_planned(path: Path, some_data: str) -> None:
    plan = make_plan(path, [some_data])
    assert len(plan.runs) == len(plan.arms) * len(plan.config.seeds) * max(1, len(plan.cells))
    assert plan.config.name == path.stem


def test_the_moe_arms_cost_what_dense_costs(some_data: str) -> None:
    """But for their routers: 0.1 %, far below what matching by FLOPs allows."""
    plan = make_plan("pretrain/configs/compare/sparse_family.toml", [some_data])
    cost = {
        arm: train_flops(plan.run(arm, 1).config.model, {"text": 400, "image": 500, "speech": 100}, 10_000)
        for arm in plan.arms
    }
    assert cost["mot"] == cost["dense"]
    for arm in ("moe_4x", "mot_text_experts"):
        assert 1 < cost[arm] / cost["dense"] < 1.003
