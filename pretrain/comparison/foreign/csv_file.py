"""A CSV file of losses, read line by line; whatever it holds becomes measurements or one sentence.

This module imports no torch.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.files.nearest_word import did_you_mean
from data_pipeline.files.os_errors import naming
from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.compare_config import NAME_PATTERN

REQUIRED = ("arm", "seed", "step", "tokens", "modality", "loss")
OPTIONAL = ("size", "flops", "seconds")
COLUMNS = (*REQUIRED, *OPTIONAL)
ALL_TARGETS = "all"
"""The modality that stands for all targets together."""
_SHOWN = 60
"""Characters of a cell or a header that a message shows."""


class Measurement(NamedTuple):
    """One line of a log: a held-out loss of a run in a modality after some steps."""

    place: str
    """File and line, for messages."""
    arm: str
    seed: int
    step: int
    tokens: float
    """Training tokens up to the step."""
    modality: str
    loss: float
    """Nats per token; not finite where the run has diverged."""
    size: float | None
    """Parameters, or whatever number tells sizes apart."""
    flops: float | None
    """Training FLOPs up to the step."""
    seconds: float | None
    """Seconds of training up to the step."""


def read_measurements(path: Path) -> list[Measurement]:
    """The measurements of a CSV file, in its order. Raises ConfigError, naming the row, for anything else."""
    try:
        with naming(path), path.open(encoding="utf-8-sig", newline="") as file:
            return list(_measurements(path, csv.reader(file, strict=True)))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; a log is CSV ({_legal()})") from None
    except csv.Error as error:
        raise ConfigError(f"{path}: not valid CSV: {error}") from None


def _legal() -> str:
    return f"columns: {', '.join(REQUIRED)}; optional: {', '.join(OPTIONAL)}"


def _measurements(path: Path, lines: Iterator[list[str]]) -> Iterator[Measurement]:
    header = next((line for line in lines if line), None)
    if header is None:
        raise ConfigError(f"{path}: empty; the first line of a log names its columns ({_legal()})")
    names = [name.strip() for name in header]
    _check_header(path, names)
    number = 0
    for number, cells in enumerate(filter(None, lines), start=1):
        place = f"{path}: row {number}"
        if len(cells) != len(names):
            raise ConfigError(f"{place}: {len(cells)} cells under {len(names)} columns")
        yield _measurement(place, dict(zip(names, (cell.strip() for cell in cells), strict=True)))
    if not number:
        raise ConfigError(f"{path}: names columns and holds no row; a row is one loss of one run at one step")


def _check_header(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            hint = did_you_mean(name, COLUMNS)
            raise ConfigError(f'{path}: unknown column "{name[:_SHOWN]}"{hint} ({_legal()})')
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{path}: the column "{name}" is there twice')
    if missing := [name for name in REQUIRED if name not in names]:
        raise ConfigError(f"{path}: no column {', '.join(missing)} ({_legal()})")


def _measurement(place: str, cells: dict[str, str]) -> Measurement:
    for name in ("arm", "modality"):
        if not re.fullmatch(NAME_PATTERN, cells[name]):
            raise ConfigError(
                f'{place}: {name} = "{cells[name][:_SHOWN]}": use letters, digits, "_", "-" and "."'
            )
    if "_to_" in cells["modality"]:
        raise ConfigError(
            f'{place}: modality = "{cells["modality"][:_SHOWN]}": a name with "_to_" stands for a '
            "conditional loss in reports; write another"
        )
    known = {name: _positive(place, name, cells[name]) for name in OPTIONAL if cells.get(name)}
    return Measurement(
        place=place,
        arm=cells["arm"],
        modality=cells["modality"],
        seed=_whole(place, "seed", cells["seed"]),
        step=_whole(place, "step", cells["step"]),
        tokens=_positive(place, "tokens", cells["tokens"]),
        loss=_number(place, "loss", cells["loss"]),
        **{name: known.get(name) for name in OPTIONAL},  # type: ignore[arg-type]
    )


def _whole(place: str, name: str, text: str) -> int:
    """A whole number from 0 on, which may be written as 1e3 or 1000.0."""
    value = _number(place, name, text)
    if not (math.isfinite(value) and value >= 0 and value == int(value)):
        raise ConfigError(f'{place}: {name} = "{text[:_SHOWN]}": expected a whole number, 0 or more')
    return int(value)


def _positive(place: str, name: str, text: str) -> float:
    value = _number(place, name, text)
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f'{place}: {name} = "{text[:_SHOWN]}": expected a number above 0')
    return value


def _number(place: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        more = "; write nan for a loss that is not a number, or leave the row out" if name == "loss" else ""
        raise ConfigError(f'{place}: {name} = "{text[:_SHOWN]}": expected a number{more}') from None
