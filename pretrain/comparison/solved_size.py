"""The size at which a step of an arm costs the training FLOPs of a step of the baseline: its width or depth.

FLOPs are those of the ledger, as for match = "train_flops" without `solve`. With equal steps and equal FLOPs
a step, arms have equal tokens and equal training FLOPs. This module imports no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.matched_flops import TOLERANCE, Mix, step_flops
from pretrain.config import RunConfig
from pretrain.models.config import MAX_LAYERS, ModelConfig
from pretrain.quantities import signed

Solve = Literal["width", "depth"]
SOLVED_KEYS: dict[Solve, str] = {"width": "model.d_model", "depth": "model.num_layers"}
"""The key of a run that `solve` decides, which no arm may set."""
_ROUND = tuple(2**power for power in range(8, -1, -1))
"""Numbers whose multiples a feed-forward may be wide, the roundest first."""
_PROPORTION = 2.0
"""How many times wider or narrower, against d_model, a feed-forward may become than the arm's own."""
_LAYERS_AROUND = 3


@dataclass(frozen=True)
class SolvedSize:
    """The size that an arm was given."""

    keys: Mapping[str, tuple[int, int]]
    """Key below `model` -> (its value by the files, its value as solved). Empty: the arm's own size fits."""
    off: float
    """FLOPs of a step over those of the baseline, less 1."""

    @property
    def text(self) -> str:
        """Say what was solved, such as "d_model 64 -> 48, num_heads 4 -> 3 (-0.12 % of the FLOPs)"."""
        changes = ", ".join(f"{key} {own} \u2192 {now}" for key, (own, now) in self.keys.items())
        return f"{changes or 'its own size'} ({signed(100 * self.off, 2)} % of the FLOPs a step)"


def solve_size(
    arm: str, config: RunConfig, base: RunConfig, mix: Mix, solve: Solve, *, source: str
) -> tuple[RunConfig, SolvedSize]:
    """The config of an arm whose steps cost those of the baseline's run `base`, and what was changed for it.

    An arm whose own size costs as much keeps it. Raises ConfigError, with the two nearest sizes, if no legal
    one comes within TOLERANCE.
    """
    target = step_flops(base, mix)

    def off(model: ModelConfig) -> float:
        return float(step_flops(config.model_copy(update={"model": model}), mix) / target) - 1

    tried = [(config.model, off(config.model))]
    if abs(tried[0][1]) <= TOLERANCE:
        return config, SolvedSize({}, tried[0][1])
    if config.initial_weights is not None:
        raise ConfigError(
            f'{source}: solve = "{solve}" gives arms."{arm}" another size than that of its initial_weights = '
            f'"{config.initial_weights}"; take initial_weights out, or solve'
        )
    for model in _widths(config, mix, target) if solve == "width" else _depths(config, mix, target):
        tried.append((model, off(model)))
        if abs(tried[-1][1]) <= TOLERANCE:
            changed = config.model_dump() | {"model": model.model_dump()}
            where = f'{source}: arms."{arm}", solved'
            return validate(RunConfig, changed, source=where), SolvedSize(
                _changes(config.model, model), tried[-1][1]
            )
    raise ConfigError(_not_reached(arm, solve, target, tried, source))


def _widths(config: RunConfig, mix: Mix, target: Fraction) -> Iterator[ModelConfig]:
    """Models of other widths near `target` FLOPs a step, the likest to the arm's own first.

    Heads keep their size, so d_model is a whole number of heads, and keys and values keep their share of
    them. The feed-forward takes up what is left, in the roundest width first.
    """
    model, tp = config.model, config.parallel.tp
    unit = model.num_heads // math.gcd(model.num_heads, model.kv_heads, model.d_model)
    candidates: list[tuple[float, int, float]] = []
    heads = 0
    while True:
        heads += unit
        if heads % tp or (model.kv_heads * heads // model.num_heads) % tp:
            continue
        own = model.ffn_width * heads / model.num_heads
        first = max(1, round(own / _PROPORTION))
        last = max(first + 1, round(own * _PROPORTION))
        narrow, wide = (step_flops(_resized(config, heads, ffn, tp), mix) for ffn in (first, last))
        if narrow > target:
            break
        if wide < target:
            continue
        # FLOPs are linear in the width of the feed-forward, but for what experts' widths are rounded to.
        width = first + float((target - narrow) / (wide - narrow)) * (last - first)
        candidates.append((abs(math.log(max(width, 1) / own)), heads, width))
    for _, heads, width in sorted(candidates):
        for multiple in dict.fromkeys(number * tp for number in _ROUND):
            below = math.floor(width / multiple) * multiple
            for ffn in sorted((below, below + multiple), key=lambda n: abs(n - width)):
                if ffn:
                    yield _resized(config, heads, ffn, multiple).model


def _resized(config: RunConfig, heads: int, ffn: int, multiple: int) -> RunConfig:
    """The run with `heads` heads of the size that they have and a feed-forward of width `ffn`; experts that
    have a width of their own keep its share of that, in multiples of `multiple`."""
    model = config.model
    experts = {
        tower: of.model_copy(
            update={
                "ffn_hidden": of.ffn_hidden
                and max(1, round(of.ffn_hidden * ffn / model.ffn_width / multiple)) * multiple
            }
        )
        for tower, of in model.experts.items()
    }
    sizes = {
        "d_model": model.d_model * heads // model.num_heads,
        "num_heads": heads,
        "num_kv_heads": model.num_kv_heads and model.num_kv_heads * heads // model.num_heads,
        "ffn_hidden": ffn,
        "experts": experts,
    }
    return config.model_copy(update={"model": model.model_copy(update=sizes)})


def _depths(config: RunConfig, mix: Mix, target: Fraction) -> Iterator[ModelConfig]:
    """Models of other depths near `target` FLOPs a step, the nearest by a straight line first."""

    def deep(layers: int) -> RunConfig | None:
        """The run with so many layers; None where the depth routers of the arm cannot be laid over them."""
        model = config.model.model_copy(update={"num_layers": layers})
        try:
            model.ratios_of_layers()
        except ValueError:
            return None
        return config.model_copy(update={"model": model})

    model = config.model
    head = step_flops(config.model_copy(update={"model": _headless(model)}), mix)
    of_layer = (step_flops(config, mix) - head) / model.num_layers
    guess = round((target - head) / of_layer)
    around = range(guess - _LAYERS_AROUND, guess + _LAYERS_AROUND + 1)
    for layers in sorted(around, key=lambda n: abs(n - guess)):
        if 1 <= layers <= MAX_LAYERS and (run := deep(layers)) is not None:
            yield run.model


def _headless(model: ModelConfig) -> ModelConfig:
    """The model without layers, whose only products are those of the head. It cannot be trained."""
    return model.model_copy(update={"num_layers": 0, "depth": {}})


def _changes(own: ModelConfig, solved: ModelConfig) -> dict[str, tuple[int, int]]:
    """The sizes in which two models differ."""
    found = {
        key: (getattr(own, attribute), getattr(solved, attribute))
        for key, attribute in (
            ("num_layers", "num_layers"),
            ("d_model", "d_model"),
            ("num_heads", "num_heads"),
            ("num_kv_heads", "kv_heads"),
            ("ffn_hidden", "ffn_width"),
        )
    }
    found |= {
        f"experts.{tower}.ffn_hidden": (of.ffn_hidden, solved.width_of(tower))
        for tower, of in own.experts.items()
        if of.ffn_hidden is not None
    }
    if own.num_kv_heads is None:
        del found["num_kv_heads"]
    return {key: (before, after) for key, (before, after) in found.items() if before != after}


def _not_reached(
    arm: str, solve: Solve, target: Fraction, tried: Sequence[tuple[ModelConfig, float]], source: str
) -> str:
    """The sentence about an arm of which no legal size costs what the baseline does."""
    below = max((pair for pair in tried if pair[1] < 0), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in tried if pair[1] > 0), key=lambda pair: pair[1], default=None)
    nearest = " and ".join(
        f"{_size_text(model, solve)} ({signed(100 * off, 2)} %)"
        for model, off in filter(None, (below, above))
    )
    finer = {
        "width": "smaller heads, a smaller parallel.tp or a wider base model make the steps finer",
        "depth": 'a deeper base model makes the steps finer, and solve = "width" has finer ones',
    }[solve]
    return (
        f'{source}: solve = "{solve}": no legal {solve} of arms."{arm}" comes within {100 * TOLERANCE:g} % '
        f"of the {float(target):.4g} FLOPs of a step of the baseline; nearest: {nearest}; {finer}"
    )


def _size_text(model: ModelConfig, solve: Solve) -> str:
    """The sizes of a model that `solve` changes."""
    if solve == "depth":
        return f"num_layers = {model.num_layers}"
    return f"d_model = {model.d_model}, num_heads = {model.num_heads}, ffn_hidden = {model.ffn_width}"
