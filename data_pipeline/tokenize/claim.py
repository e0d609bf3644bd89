"""A claim locks an output folder for one writer, or one per part of the work, and pins its settings."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.json_text import parse_json
from data_pipeline.files.lock import lock_directory
from data_pipeline.files.printable import hidden_characters, printable
from data_pipeline.files.toml_config import ConfigError

CLAIM_LOCK = ".lock"
_SHOWN = 6
"""A message lists at most so many differences."""


PartOfWork = tuple[int, int]
"""(k, n): part k, counted from 1, of work that is cut into n parts, which may be done at the same time."""


@contextmanager
def claimed(
    out: Path, record: str, facts: Mapping[str, Any], what: str, *, part: PartOfWork | None = None
) -> Iterator[None]:
    """Lock OUT for writing. A new OUT records `facts` (JSON values) in OUT/`record`; an old one must have the
    same facts there.

    With a `part`, other parts of the same n may hold OUT at the same time, on this machine or on others; OUT
    must have its record already. `what` names the content of OUT in messages. Raises ConfigError, touching
    nothing, if OUT holds something else, has other facts (the message names the differences), is being
    written by another process, or cannot be written.
    """
    path = out / record
    _check_shown(out)
    try:
        if part is not None and not path.exists():
            raise ConfigError(f"{out} was not begun (no {record}): a part continues an OUT that has one")
        if not path.exists():
            if out.exists() and any(child.name != CLAIM_LOCK for child in out.iterdir()):
                raise ConfigError(
                    f"{out} is not empty and holds no {what} (no {record}); choose another folder"
                )
            out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            if part is None:
                held.enter_context(_lock(out, CLAIM_LOCK))
                for left in out.glob(
                    f"{CLAIM_LOCK}-*"
                ):  # of parts, which hold the other lock too: none is alive
                    left.unlink()
            else:
                _lock_part(held, out, part)
            if path.exists():
                _compare(out, _read(path), facts)
            else:
                write_json(path, facts)
            yield
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from None


def _check_shown(out: Path) -> None:
    """Raise ConfigError for a path that no terminal shows as it is."""
    if hidden_characters(str(out)):
        raise ConfigError(
            f"{printable(str(out))}: a folder's name takes no control characters; choose another"
        )


def _lock_part(held: ExitStack, out: Path, part: PartOfWork) -> None:
    """Hold OUT beside its other parts. The same part twice, or parts of another n, raise ConfigError."""
    k, n = part
    held.enter_context(_lock(out, CLAIM_LOCK, shared=True))
    held.enter_context(_lock(out, f"{CLAIM_LOCK}-{k}-of-{n}"))
    for other in out.glob(f"{CLAIM_LOCK}-*"):
        if not other.name.endswith(f"-of-{n}"):
            with _lock(out, other.name, shared=True):
                pass


def _lock(out: Path, name: str, *, shared: bool = False) -> AbstractContextManager[None]:
    part = name.removeprefix(CLAIM_LOCK).replace("-", " ").strip()
    return lock_directory(
        out,
        lambda holder: (
            f"{out}: {holder} is writing {f'part {part}' if part else 'it'}; wait for it, or stop it"
        ),
        name=name,
        shared=shared,
    )


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); was it edited?") from None


def _compare(out: Path, recorded: Any, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError, listing the differences, unless OUT's record holds these facts."""
    differences = list(_differences(recorded, json.loads(json.dumps(facts)), ""))
    if differences:
        lines = "".join(f"\n  {line}" for line in differences[:_SHOWN])
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ConfigError(
            f"{out} was begun otherwise:{lines}{more}\nChoose another folder, or delete this one"
        )


def _differences(recorded: Any, current: Any, prefix: str) -> Iterator[str]:
    """A line for each value at which two JSON values differ; `prefix` is the dotted key of both."""
    if isinstance(recorded, dict) and isinstance(current, dict):
        for key in [*recorded, *(key for key in current if key not in recorded)]:
            dotted = f"{prefix}.{key}" if prefix else key
            yield from _differences(recorded.get(key), current.get(key), dotted)
    elif recorded != current:
        yield f"{prefix}: there {_short(recorded)}, now {_short(current)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
