"""An output folder belongs to one job: what it was begun with, and one writer at a time, or one a part."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.lock import lock_directory
from data_pipeline.files.toml_config import ConfigError

CLAIM_LOCK = ".lock"
_SHOWN = 6
"""Differences that a message lists."""


PartOfWork = tuple[int, int]
"""(k, n): the k-th, from 1, of n parts of a job that may be worked on at the same time."""


@contextmanager
def claimed(
    out: Path, record: str, facts: Mapping[str, Any], what: str, *, part: PartOfWork | None = None
) -> Iterator[None]:
    """Hold OUT for writing: begin it with `facts` (JSON values) in OUT/`record`, or continue one begun so.

    A `part` holds OUT beside the other parts of the same n, on this machine or on others, and only
    continues. Raises ConfigError, touching nothing, if OUT holds something else, was begun with other facts
    (each difference is named), is being written by another process, or cannot be written.
    """
    path = out / record
    try:
        if part is not None and not path.exists():
            raise ConfigError(f"{out} was not begun (no {record}): a part goes on with what is begun")
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
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); was it edited?") from None


def _compare(out: Path, theirs: Any, ours: Mapping[str, Any]) -> None:
    found = list(_differences(theirs, json.loads(json.dumps(ours)), ""))
    if found:
        lines = "".join(f"\n  {line}" for line in found[:_SHOWN])
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError(
            f"{out} was begun otherwise:{lines}{more}\nChoose another folder, or delete this one"
        )


def _differences(theirs: Any, ours: Any, prefix: str) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            yield from _differences(theirs.get(key), ours.get(key), f"{prefix}.{key}" if prefix else key)
    elif theirs != ours:
        yield f"{prefix}: there {_short(theirs)}, now {_short(ours)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
