"""This module tells the rate, decay and freezing of a parameter from its logical name, its shape and the
config. It imports no torch."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import is_decayed, logical_shapes, width_role

if TYPE_CHECKING:
    from pretrain.config import OptimizerConfig


@dataclass(frozen=True)
class ParameterSettings:
    """The settings of a trained parameter. Parameters with equal `tower` and `kind` have equal settings."""

    tower: str
    kind: str
    """ "decay" or "no_decay"; "+mup" where the rate follows the width; "+" and the numbers of the
    optimizer.groups that match."""
    lr_scale: float
    """Factor on the learning rate of the step."""
    weight_decay: float


def tower_of(parameter_name: str) -> str:
    """A parameter's name ends with its tower, or "shared": blocks.0.attention.qkv.weight.image."""
    return parameter_name.rpartition(".")[2]


def settings_of(
    name: str, shape: tuple[int, ...], optimizer: "OptimizerConfig", model: ModelConfig
) -> ParameterSettings | None:
    """The settings of the parameter with logical name `name`; None where it is frozen.

    optimizer.towers comes first. Each table of optimizer.groups whose pattern matches then replaces what it
    sets, in the order of the file, so the last match wins. model.width_ratio divides the rate that results;
    weight decay is multiplied by it, because AdamW multiplies decay by the rate.
    """
    tower = tower_of(name)
    values = {"lr_scale": 1.0, "weight_decay": optimizer.weight_decay, "frozen": False}
    if (own := optimizer.towers.get(tower)) is not None:
        values |= own.model_dump(exclude_none=True)
    matching = [number for number, group in enumerate(optimizer.groups) if fnmatchcase(name, group.match)]
    for number in matching:
        values |= optimizer.groups[number].model_dump(exclude_none=True, exclude={"match"})
    if values["frozen"]:
        return None
    decayed, ratio = is_decayed(name, shape), 1.0
    kind = "decay" if decayed else "no_decay"
    if len(shape) > 1 and width_role(name) != "outer" and model.width_ratio != 1:
        kind, ratio = f"{kind}+mup", model.width_ratio
    if matching:
        kind += "+" + ",".join(map(str, matching))
    decay = values["weight_decay"] * ratio if decayed else 0.0
    return ParameterSettings(tower, kind, lr_scale=values["lr_scale"] / ratio, weight_decay=decay)


def tells_blocks_apart(optimizer: "OptimizerConfig") -> bool:
    """Whether a pattern may match a parameter in one block and not in another. A pattern needs a digit, ? or
    [ for that, since * takes any number."""
    return any(re.search(r"[\d?[]", group.match) for group in optimizer.groups)


def problems(optimizer: "OptimizerConfig", model: ModelConfig) -> Iterator[str]:
    """Messages about tables of optimizer.groups that would do nothing."""
    if not optimizer.groups:
        return
    shapes = logical_shapes(model)
    for number, group in enumerate(optimizer.groups):
        field = f"optimizer.groups[{number}]"
        names = [name for name in shapes if fnmatchcase(name, group.match)]
        if not names:
            yield (
                f'{field}.match = "{group.match}" matches no parameter of this model; the closest names are '
                f"{', '.join(_closest(group.match, shapes))} (* stands for any text)"
            )
        elif group.weight_decay and not any(is_decayed(name, shapes[name]) for name in names):
            yield (
                f'{field}.weight_decay = {group.weight_decay}, but "{group.match}" matches norms, biases and '
                "routers alone, which are never decayed; take weight_decay out"
            )


def _closest(pattern: str, names: Iterable[str]) -> list[str]:
    """The names most like a pattern, with * for the number of the block."""
    stems = list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
    return difflib.get_close_matches(pattern, stems, n=3, cutoff=0.0)
