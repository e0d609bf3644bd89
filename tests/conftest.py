"""Settings of all tests."""

import os
from collections import defaultdict

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.pairwise import pairwise

# Shapes and dtypes in annotations are checked on every call. Not in attention_mask: flex attention counts the
# arguments of its mask function, which a checked function hides.
install_import_hook(
    [
        "parallel.routing",
        "parallel.towers",
        "pretrain.models.cross_entropy",
        *(
            f"pretrain.models.{name}"
            for name in (
                "attention",
                "block",
                "decoder",
                "feed_forward",
                "inputs",
                "pretraining",
                "query_key",
            )
        ),
        "tools.bench.published_mot",
    ],
    "beartype.beartype",
)

# transformers, a reference for imported models, is given local folders only; nothing may be fetched
os.environ["HF_HUB_OFFLINE"] = "1"

# no deadline: cores are shared. Derandomized: the same examples in every run, so a red test stays red
settings.register_profile("motley", deadline=None, derandomize=True)
settings.load_profile("motley")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="whole products of parameters, where pairs are usual"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that are marked `pairwise`, so many cases as hold every pair of their parameters' values."""
    if config.getoption("full"):
        return
    cases: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairwise"):
            cases[item.nodeid.partition("[")[0]].append(item)
    dropped: set[pytest.Item] = set()
    for of_test in cases.values():
        rows = [{name: repr(value) for name, value in item.callspec.params.items()} for item in of_test]
        kept = set(pairwise(rows))
        dropped |= {item for index, item in enumerate(of_test) if index not in kept}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
