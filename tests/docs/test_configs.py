"""Every config example of README and docs is one that the real config models take."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pretrain.comparison.config import make_plan
from tests.docs.pages import CHECKS, PAGES, ConfigExample, config_examples, merged, whole_files
from tests.toml_text import toml_text

EXAMPLES = [example for page in PAGES for example in config_examples(page)]


def place(example: ConfigExample) -> str:
    return example.block.place


def whole(example: ConfigExample) -> dict[str, Any]:
    """The values of the example; of a part, laid over the file that it is a part of."""
    if not example.is_part:
        return example.values
    files = whole_files(example.block.page)
    assert example.file in files, f"{place(example)}: no page shows the whole of {example.file}"
    return merged(tomllib.loads(files[example.file]), example.values)


@pytest.mark.parametrize("example", EXAMPLES, ids=place)
def test_config_example_is_valid(example: ConfigExample) -> None:
    CHECKS[example.kind](whole(example), place(example))


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "compare"], ids=place)
def test_comparison_example_resolves_to_runs(example: ConfigExample, tmp_path: Path) -> None:
    """`match` and `solve` look at the data's lengths, which these examples name and do not have."""
    for name, text in whole_files(example.block.page).items():
        (tmp_path / name).write_text(text)
    path = tmp_path / example.file
    values = {key: value for key, value in whole(example).items() if key not in ("match", "solve")}
    path.write_text(toml_text(values))
    plan = make_plan(path)
    assert len(plan.runs) == len(plan.config.arms) * len(plan.config.seeds) * max(1, len(plan.cells))
