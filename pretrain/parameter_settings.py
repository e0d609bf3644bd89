"""This module tells the rate, decay and freezing of a parameter from its logical name, its shape and the
config. It imports no torch."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import filter as fnmatch_filter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import counted_layers, is_decayed, width_role

if TYPE_CHECKING:
    from pretrain.optimizer_config import OptimizerConfig


@dataclass(frozen=True)
class ParameterSettings:
    """The settings of a trained parameter. Parameters with equal `tower` and `kind` have equal settings."""

    tower: str
    kind: str
    """ "decay" or "no_decay"; "+muon" for Muon's matrices; "+mup" where the rate follows the width; "+" and
    the numbers of the optimizer.groups that match."""
    lr_scale: float
    """Factor on the learning rate of the step."""
    weight_decay: float
    pieces: tuple[int, ...] | None = None
    """Rows of a matrix that Muon orthogonalises together; None: AdamW updates the parameter."""


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
    pieces = _pieces(name, shape, optimizer, model) if optimizer.kind == "muon" else None
    values = {"lr_scale": 1.0, "weight_decay": optimizer.weight_decay, "frozen": False}
    if pieces is not None and optimizer.muon.weight_decay is not None:
        values["weight_decay"] = optimizer.muon.weight_decay
    if (own := optimizer.towers.get(tower)) is not None:
        values |= own.model_dump(exclude_none=True)
    matching = [number for number, group in enumerate(optimizer.groups) if fnmatchcase(name, group.match)]
    for number in matching:
        values |= optimizer.groups[number].model_dump(exclude_none=True, exclude={"match"})
    if values["frozen"]:
        return None
    decayed = is_decayed(name, shape)
    tags, scale = ["decay" if decayed else "no_decay"], values["lr_scale"]
    if pieces is not None:
        tags.append("muon")
        scale *= (optimizer.muon.learning_rate or optimizer.learning_rate) / optimizer.learning_rate
    ratio = _rate_divisor(name, shape, optimizer, model)
    if ratio != 1:
        tags.append("mup")
    if matching:
        tags.append(",".join(map(str, matching)))
    decay = values["weight_decay"] * ratio if decayed else 0.0
    return ParameterSettings(tower, "+".join(tags), scale / ratio, decay, pieces)


def _pieces(
    name: str, shape: tuple[int, ...], optimizer: "OptimizerConfig", model: ModelConfig
) -> tuple[int, ...] | None:
    """The rows of a matrix of a block that Muon orthogonalises together; None for other parameters."""
    if len(shape) < 2 or width_role(name) != "hidden":
        return None
    rows = shape[-2]
    if ".gate_up." in name:
        return (rows // 2, rows // 2)
    if ".qkv." in name and optimizer.muon.qkv != "fused":
        heads = (model.num_heads, model.kv_heads, model.kv_heads)
        if optimizer.muon.qkv == "heads":
            return (model.head_dim,) * sum(heads)
        return tuple(count * model.head_dim for count in heads)
    return (rows,)


def _rate_divisor(
    name: str, shape: tuple[int, ...], optimizer: "OptimizerConfig", model: ModelConfig
) -> float:
    """The number that a parameter's rate is divided by for the width of the model. Muon's "original" factor
    gives an update whose spectral norm suits every width (arXiv 2310.17813), match_rms_adamw one that is
    sqrt(width) larger."""
    role = width_role(name) if len(shape) > 1 else "outer"
    if role == "outer":
        return 1.0
    if role == "hidden" and optimizer.kind == "muon":
        return 1.0 if optimizer.muon.adjust_lr == "original" else math.sqrt(model.width_ratio)
    return model.width_ratio


def tells_blocks_apart(optimizer: "OptimizerConfig") -> bool:
    """Whether a pattern may match a parameter in one block and not in another. A pattern needs a digit, ? or
    [ for that, since * takes any number."""
    return any(re.search(r"[\d?[]", group.match) for group in optimizer.groups)


def problems(optimizer: "OptimizerConfig", model: ModelConfig) -> Iterator[str]:
    """Messages about tables of optimizer.groups that would do nothing."""
    if not optimizer.groups:
        return
    found = counted_layers(model, apart=tells_blocks_apart(optimizer))
    shapes = {name: layer.shape for layer, _ in found for name in layer.names(model).values()}
    for number, group in enumerate(optimizer.groups):
        field = f"optimizer.groups[{number}]"
        names = fnmatch_filter(shapes, group.match)
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
