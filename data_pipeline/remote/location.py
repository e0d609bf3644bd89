"""The URL of a folder of token shards: which ones a person may type, and the URL of a file in the folder.

This module imports no numpy: configs are checked with it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit, urlunsplit

if TYPE_CHECKING:
    from data_pipeline.shards.tar import Url

GB = 10**9
HTTP = ("http", "https")
FSSPEC = {"s3": "s3fs", "gs": "gcsfs"}
"""Scheme -> the Python package by which fsspec reads it."""
PIPE = "pipe"
_LEGAL = ", ".join([*(f"{scheme}://" for scheme in (*HTTP, *FSSPEC)), "pipe:COMMAND"])
_PLACE = "{}"
"""Stands for the name of a file in a command."""
_PLAIN_NAME = re.compile(r"\w[\w@%+=:,.-]*", re.ASCII)
"""A name that means the same to a shell with and without quotes around it."""

_QUERY = re.compile(rf"\b((?:{'|'.join((*HTTP, *FSSPEC))})://[^\s\"?]*)\?[^\s\"]*", re.IGNORECASE)
"""A URL with a query, in a text; its first group is the URL without it."""


@dataclass(frozen=True)
class RemoteSettings:
    """How token shards behind URLs are fetched, and where they are kept."""

    cache_dir: Path | None = None
    """None: default_folder() of node_cache.py."""
    cache_bytes: int = 20 * GB
    retry_s: float = 120.0
    """Seconds for which a fetch that fails is tried again."""
    first_wait_s: float = 0.25
    """Seconds before the second attempt; the wait doubles with each, up to 15 s."""
    stall_s: float = 20.0
    """Seconds without a byte after which an attempt has failed."""
    piece_bytes: int = 1 << 18
    """Bytes of a shard that are fetched and kept together."""
    runs_commands: bool = False
    """Whether the command of a `pipe:` is run. A person typed it for a run; that of a run directory, which a
    verb reads later, may be somebody else's."""


def scheme_of(url: "Url") -> str:
    """Return "https", "s3", "pipe" and so on."""
    return url.text.partition(":")[0].lower()


def command_of(text: str) -> str | None:
    """Return the command of a folder that a person typed as `pipe:COMMAND`; None for another."""
    return text.removeprefix(f"{PIPE}:") if text.startswith(f"{PIPE}:") else None


def check_folder(text: str) -> None:
    """Raise ValueError, with what is legal, for a URL of which no folder of token shards can be read.

    A path of this machine passes.
    """
    if ":" not in text:
        return
    from data_pipeline.shards.tar import Url, typed_location  # they import numpy

    url = typed_location(text)
    if not isinstance(url, Url):
        return
    scheme = scheme_of(url)
    if scheme == PIPE:
        if _PLACE not in text:
            raise ValueError(
                f'"{text}": the command must say {_PLACE} where the name of a file belongs, such as '
                f'"pipe:aws s3 cp s3://bucket/tokens/{_PLACE} -"'
            )
    elif scheme not in (*HTTP, *FSSPEC):
        raise ValueError(f'"{text}": no reader for {scheme}://; legal: {_LEGAL}, or a folder of this machine')
    elif not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{shown(url)!r}: a URL has no spaces; write them, and what is not ASCII, as %20")
    elif "@" in urlsplit(text).netloc:
        raise ValueError(
            f"{shown(url)}: a name or a password in a URL would stand in logs and records; type a command in "
            f'the place of the URL, such as "pipe:curl -sf --netrc https://host/tokens/{_PLACE}"'
        )


def without_queries(text: str) -> str:
    """Return a text without the queries of the URLs in it, which may be signatures."""
    return _QUERY.sub(r"\1", text)


def shown(folder: "Url") -> str:
    """Return the URL of a folder for people: without its query, which may be a signature, and without a
    password."""
    if scheme_of(folder) == PIPE:
        return folder.text
    parts = urlsplit(folder.text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def shown_file(folder: "Url", name: str) -> str:
    """Return the URL of a file for people, or the command that gives it."""
    return shown(folder).replace(_PLACE, name) if scheme_of(folder) == PIPE else f"{shown(folder)}/{name}"


def file_url(folder: "Url", name: str) -> str:
    """Return the URL of a file of a folder; a query of the folder's URL is that of the file too.

    Raises ValueError for a name that a shell could take for more than a name, where the folder is a command.
    """
    if scheme_of(folder) == PIPE:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f'{folder}: the file "{name}" has a name that no command is given; legal: ASCII letters, '
                "digits and @%+=:,.-_, with a letter or a digit first. Rename it, or tokenize again"
            )
        return folder.text.replace(_PLACE, name)
    parts = urlsplit(folder.text)
    name = quote(name) if scheme_of(folder) in HTTP else name
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()
