"""A run's record tells where the run comes from and how it was changed. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from pretrain.lineage.costs import Costs, inherited_and_own
from pretrain.quantities import count, flops
from pretrain.run_dir import read_record
from pretrain.run_files import CHECKPOINTS


def past(directory: Path) -> list[str]:
    """A line on the trunk of a run, if it is a branch, and on each of its changes, oldest first."""
    try:
        record = read_record(directory)
        trunk = [_trunk(directory, record["branch"])] if "branch" in record else []
        return trunk + [_change(change) for change in record.get("changes", ())]
    except (ConfigError, KeyError, TypeError) as error:
        return [f"cannot be told: {error}"]


def _trunk(directory: Path, branch: Mapping[str, Any]) -> str:
    inherited, own = inherited_and_own(directory)
    return (
        f"a branch of {branch['parent']} (run {branch['run']}) at step {count(inherited.steps)}; inherited "
        f"{_costs(inherited)}; own {_costs(own)}"
    )


def _change(change: Mapping[str, Any]) -> str:
    values = ", ".join(f"{key} = {value}" for key, value in change["after"].items())
    what = f"extended: {values}, from step" if values else "back to step"
    aside = ""
    if change["aside"]:
        aside = f"; set aside in {CHECKPOINTS}/{change['aside']}: {_costs(Costs(**change['set_aside']))}"
    return f"{what} {count(change['step'])} on{aside}" if values else f"{what} {count(change['step'])}{aside}"


def _costs(costs: Costs) -> str:
    return f"{count(costs.tokens)} tokens, {flops(costs.flops)}"
