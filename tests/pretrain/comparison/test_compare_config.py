"""What the keys of a comparison file may say together. More mistakes are in test_config.py."""

from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan

SOLVE = 'match = "train_flops"\nsolve = "width"\n'
MISTAKES: dict[str, tuple[Callable[[str], str], str]] = {
    "solved for equal tokens": (
        lambda t: 'solve = "width"\n' + t,
        'solve = "width" makes training FLOPs equal, but match = "tokens"; set match',
    ),
    "solved, and may vary": (
        lambda t: SOLVE + t.replace('["model.towers"]', '["model.towers", "model.d_model"]'),
        'vary names "model.d_model", but solve = "width" decides it',
    ),
    "solved, and set by an arm": (
        lambda t: SOLVE.replace("width", "depth") + t + "model.num_layers = 3\n",
        r'arms."mot" names "model.num_layers", but solve = "depth" decides it',
    ),
    "two rates": (lambda t: "rates = [1e-3, 2e-3]\n" + t, "name three or more that differ in"),
    "rates of one name": (
        lambda t: "rates = [1e-3, 2e-3, 2.0000001e-3]\n" + t,
        "name three or more that differ in their first six digits",
    ),
    "a rate without end": (lambda t: "rates = [1e-3, 2e-3, inf]\n" + t, "finite"),
    "a budget without end": (
        lambda t: t + "\n[sizes.a]\n[sizes.b]\n[budgets]\ntokens_per_parameter = [2, inf]\n",
        "finite",
    ),
    "a size's budget without end": (
        lambda t: t + "\n[sizes.a]\nbudgets = [inf]\n[budgets]\ntokens_per_parameter = [2, 4]\n",
        r'sizes."a".budgets = \[inf\]: expected a list of tokens_per_parameter, numbers above 0',
    ),
    "arms that draw documents by other shares": (
        lambda t: t.replace('["model.towers"]', '["model.towers", "data.temperature"]'),
        'vary names "data.temperature", but match = "tokens" holds it equal in all arms',
    ),
    "tuned on a seed that is compared": (
        lambda t: "rates = [1e-3, 2e-3, 4e-3]\ntuning_seeds = [3]\n" + t,
        r"tuning_seeds = \[3\] names a seed twice, or one of the seeds that are compared",
    ),
    "tuned, and set by an arm": (
        lambda t: (
            "rates = [1e-3, 2e-3, 4e-3]\n"
            + t.replace('["model.towers"]', '["model.towers", "optimizer"]')
            + "optimizer.learning_rate = 2e-3\n"
        ),
        'vary names "optimizer", but `rates` decides optimizer.learning_rate',
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_contradiction_is_refused_with_what_to_do(
    mistake: str, comparison_files: Callable[..., Any]
) -> None:
    edit, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        make_plan(comparison_files(edit=edit).comparison)
