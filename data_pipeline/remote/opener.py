"""Bytes of one file behind a URL, as they come: over HTTP, through fsspec, or from a command.

One attempt each. All that may fail of it is a FetchFailed; who asks decides whether to ask again.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError, URLError

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.location import FSSPEC, PIPE

_CHUNK_BYTES = 1 << 16
_PART_BYTES = 1 << 24
"""Bytes that fsspec is asked for at once."""
_NUMBER = "[0-9]{1,18}"
"""Pattern of a number of bytes in an answer, which anybody may have written."""
_PASSING = {408, 425, 429}
"""Statuses of HTTP from 400 to 499 that are about now, and not about the file."""


class FetchFailed(Exception):
    """An attempt that failed, in a few words; `is_lasting`: another is not likely to do better."""

    def __init__(self, why: str, *, is_lasting: bool = False) -> None:
        super().__init__(why)
        self.is_lasting = is_lasting


@dataclass(frozen=True)
class Body:
    """Bytes of a file as they come. The reader counts them: an end may have come too early."""

    is_whole: bool
    """Whether the whole file comes, though a range was asked for."""
    total: int | None
    """Bytes of the file; None: the source does not say, which it may where the whole file comes."""
    chunks: Iterator[bytes]


def open_range(url: str, start: int, stop: int, stall_s: float) -> AbstractContextManager[Body]:
    """Bytes start ... stop - 1 of a file, of which there are fewer at its end, or all of it.

    Raises FetchFailed, also after `stall_s` seconds without a byte (fsspec has its own limits), and
    ConfigError where a Python package is missing.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == PIPE:
        return _from_command(url.removeprefix("pipe:"), stall_s)
    if scheme in FSSPEC:
        return _from_fsspec(url, start, stop)
    return _from_http(url, start, stop, stall_s)


@cache
def _opener() -> request.OpenerDirector:
    """Return an opener of HTTP alone: a redirection leads to no file and to no other protocol."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


@contextmanager
def _from_http(url: str, start: int, stop: int, stall_s: float) -> Iterator[Body]:
    asked = request.Request(url, headers={"User-Agent": "motley", "Range": f"bytes={start}-{stop - 1}"})
    try:
        response = _opener().open(asked, timeout=stall_s)
    except HTTPError as error:
        error.close()
        lasting = 400 <= error.code < 500 and error.code not in _PASSING
        raise FetchFailed(f"HTTP {error.code} {error.reason}", is_lasting=lasting) from None
    except (OSError, HTTPException, ValueError) as error:
        raise _failed(error) from None
    with response:
        is_whole = response.status == 200
        if is_whole:
            length = response.headers.get("Content-Length", "")
            total = int(length) if re.fullmatch(_NUMBER, length) else None
        else:
            total = _total(response.headers.get("Content-Range", ""), start)
        yield Body(is_whole, total, _chunks(lambda: response.read(_CHUNK_BYTES)))


def _total(content_range: str, start: int) -> int:
    """Return the bytes of the file that an answer names. Raises FetchFailed for a range that begins elsewhere
    than at `start`."""
    match = re.fullmatch(rf"bytes ({_NUMBER})-{_NUMBER}/({_NUMBER})", content_range.strip())
    if match is None or int(match[1]) != start:
        raise FetchFailed(f'not the bytes that were asked for (Content-Range: "{content_range}")')
    return int(match[2])


def _chunks(read: Callable[[], bytes]) -> Iterator[bytes]:
    """What `read` gives, to its end. Raises FetchFailed."""
    try:
        while data := read():
            yield data
    except (OSError, HTTPException, ValueError) as error:
        raise _failed(error) from None


def _failed(error: Exception) -> FetchFailed:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return FetchFailed("no answer, or no further byte, in time")
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return FetchFailed(text)


@contextmanager
def _from_fsspec(url: str, start: int, stop: int) -> Iterator[Body]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise _no_reader(url, error) from None
    try:
        system, path = url_to_fs(url)
        total = int(_asked(lambda: system.size(path)))
    except ImportError as error:  # fsspec is there, its reader of this scheme is not
        raise _no_reader(url, error) from None
    borders = range(start, min(stop, total), _PART_BYTES)
    parts = (_asked(lambda a=a: system.cat_file(path, a, min(a + _PART_BYTES, stop))) for a in borders)
    yield Body(False, total, parts)


def _asked(ask: Callable[[], Any]) -> Any:
    """The answer of a store. Its errors are of as many kinds as there are stores."""
    try:
        return ask()
    except ImportError:
        raise
    except Exception as error:
        lasting = isinstance(error, FileNotFoundError | PermissionError)
        raise FetchFailed(f"{type(error).__name__}: {error}", is_lasting=lasting) from None


def _no_reader(url: str, error: ImportError) -> ConfigError:
    scheme = url.partition(":")[0].lower()
    return ConfigError(
        f'{scheme}://: its reader {FSSPEC[scheme]} is not installed ({error}); pip install "motley[remote]", '
        f'or type a command in the place of the URL, such as "pipe:aws s3 cp s3://bucket/tokens/{{}} -"'
    )


@contextmanager
def _from_command(command: str, stall_s: float) -> Iterator[Body]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            yield Body(True, None, _output(process, process.stdout.fileno(), said, stall_s))
        finally:
            if process.poll() is None:  # not yet waited for, so its number is its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def _output(
    process: subprocess.Popen[bytes], output: int, said: IO[bytes], stall_s: float
) -> Iterator[bytes]:
    """What a command prints, to its good end. Raises FetchFailed."""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    while True:
        if not poll.poll(1000 * stall_s):
            raise FetchFailed(f"its command printed nothing for {stall_s:g} s")
        if not (data := os.read(output, _CHUNK_BYTES)):
            break
        yield data
    try:
        code = process.wait(stall_s)
    except subprocess.TimeoutExpired:
        raise FetchFailed("its command closed its output and did not end") from None
    if code:
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise FetchFailed(f"exit code {code}: {last}")
