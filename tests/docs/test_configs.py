"""Every config example of README and docs is one that the real config models take."""

import tomllib
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import validate
from pretrain.comparison.config import make_plan
from tests.docs.pages import MODELS, PAGES, ConfigExample, config_examples, merged, whole_files

EXAMPLES = [example for page in PAGES for example in config_examples(page)]


def place(example: ConfigExample) -> str:
    return example.block.place


@pytest.mark.parametrize("example", EXAMPLES, ids=place)
def test_config_example_is_valid(example: ConfigExample) -> None:
    values = example.values
    if example.is_part:
        files = whole_files(example.block.page)
        assert example.file in files, f"{place(example)}: no page shows the whole of {example.file}"
        values = merged(tomllib.loads(files[example.file]), values)
    validate(MODELS[example.kind], values, source=place(example))


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "compare" and not e.is_part], ids=place)
def test_comparison_example_resolves_to_runs(
    example: ConfigExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """match = "train_flops" looks at the data's lengths, which these examples name and do not have."""
    for name, text in whole_files(example.block.page).items():
        (tmp_path / name).write_text(text)
    plan = make_plan(tmp_path / example.file, ["comparison.match=tokens"])
    assert len(plan.runs) == len(plan.config.arms) * len(plan.config.seeds)
