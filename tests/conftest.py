"""Settings of all tests."""

import gc
import os
import tomllib
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.pairwise import diagonal, pairwise

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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here lives as long as the process, and need not be searched for garbage: a fifth of
    the time of imports."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        leave_out_cases(config, items)
    if hasattr(config, "workerinput"):
        put_long_files_first(items)


def put_long_files_first(items: list[pytest.Item]) -> None:
    """Order the tests of a worker of xdist so that a long file never begins last and runs alone."""
    seconds: dict[str, float] = tomllib.loads((Path(__file__).parent / "seconds.toml").read_text())
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0))


def leave_out_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full`; of tests that are marked `pairwise` or `diagonal`, keep the cases that
    tests/pairwise.py chooses."""
    cases: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and any(map(item.get_closest_marker, ("pairwise", "diagonal"))):
            cases[item.nodeid.partition("[")[0]].append(item)
    dropped = {item for item in items if item.get_closest_marker("full")}
    for of_test in cases.values():
        if of_test[0].get_closest_marker("diagonal"):
            kept = set(diagonal(rows_of(of_test)))
        else:
            values = [item.callspec.params.items() for item in of_test]
            kept = set(pairwise([{name: repr(value) for name, value in row} for row in values]))
        dropped |= {item for index, item in enumerate(of_test) if index not in kept}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


def rows_of(of_test: list[pytest.Function]) -> list[dict[str, int]]:
    """For each case of a test: its parameters, those that one `parametrize` names as one, and the number of
    their value."""
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    rows = []
    for item in of_test:
        row = {}
        for mark in item.iter_markers("parametrize"):
            names = mark.args[0].split(", ") if isinstance(mark.args[0], str) else mark.args[0]
            value, seen = repr([item.callspec.params[name] for name in names]), numbers[str(names)]
            row[str(names)] = seen.setdefault(value, len(seen))
        rows.append(row)
    return rows
