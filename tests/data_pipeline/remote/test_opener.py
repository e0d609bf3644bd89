"""Each way to fetch a range, whole, cut short and refused."""

import importlib
import sys
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.opener import FetchFailed, open_range
from tests.data_pipeline.remote.flaky_server import STALL_S, serving

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path


def fetched(
    url: str, start: int = 100, stop: int = 300, stall_s: float = 30.0
) -> tuple[bool, int | None, bytes]:
    with open_range(url, start, stop, stall_s) as body:
        return body.is_whole, body.total, b"".join(body.chunks)


def test_a_range_over_http(folder: Path) -> None:
    with serving(folder) as server:
        assert fetched(f"{server.url}/file") == (False, 2048, CONTENT[100:300])
        assert fetched(f"{server.url}/file", 2000, 3000) == (False, 2048, CONTENT[2000:])


@pytest.mark.parametrize(
    "fault, expected, is_lasting",
    [
        ("404", "HTTP 404 Not Found", True),
        ("500", "HTTP 500 Internal Server Error", False),
        ("drop", "closed connection without response", False),
        ("stall", "no answer, or no further byte, in time", False),
        ("302", "HTTP 302 .*redirect error that would lead to an infinite loop", False),
    ],
)
def test_faults_of_http_are_told(folder: Path, fault: str, expected: str, is_lasting: bool) -> None:
    with serving(folder, fault_frac=1.0, faults=(fault,)) as server:
        with pytest.raises(FetchFailed, match=expected) as error:
            fetched(f"{server.url}/file", stall_s=STALL_S if fault == "stall" else 30.0)
        assert error.value.is_lasting == is_lasting
        url = server.url
    with pytest.raises(FetchFailed, match="refused"):
        fetched(f"{url}/file")


def test_a_server_without_ranges_gives_the_whole(folder: Path) -> None:
    with serving(folder, fault_frac=1.0, faults=("whole",)) as server:
        assert fetched(f"{server.url}/file") == (True, 2048, CONTENT)
    with serving(folder, fault_frac=1.0, faults=("truncate",)) as server:
        assert len(fetched(f"{server.url}/file")[2]) == 100  # who asked for 200 sees that


def test_a_redirection_leads_to_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, fault_frac=1.0, faults=("302",)) as server:
        handler: type = server.RequestHandlerClass
        monkeypatch.setattr(
            handler,
            "send_header",
            lambda self, name, value: handler.__bases__[0].send_header(  # type: ignore
                self, name, f"file://{folder}/file" if name == "Location" else value
            ),
        )
        with pytest.raises(FetchFailed, match="HTTP 302"):
            fetched(f"{server.url}/file")


@pytest.mark.parametrize(
    "command, expected",
    [
        ("cat {file}; echo it broke >&2; exit 3", "exit code 3: it broke"),
        ("cat {file}; sleep 600", "printed nothing for 0.25 s"),
        ("cat {file}.missing", "exit code 1: .*missing: No such file"),
    ],
)
def test_a_command(folder: Path, command: str, expected: str) -> None:
    file = folder / "file"
    assert fetched(f"pipe:cat {file}") == (True, None, CONTENT)
    with pytest.raises(FetchFailed, match=expected):
        fetched(f"pipe:{command.format(file=file)}", stall_s=STALL_S if "sleep" in command else 30.0)


def test_a_store_of_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("s3:/")

    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "s3", Store)
    Store().pipe_file("/bucket/file", CONTENT)
    assert fetched("s3://bucket/file") == (False, 2048, CONTENT[100:300])
    assert fetched("s3://bucket/file", 2000, 3000) == (False, 2048, CONTENT[2000:])
    with pytest.raises(FetchFailed, match=r"FileNotFoundError: .*missing") as error:
        fetched("s3://bucket/missing")
    assert error.value.is_lasting


@pytest.mark.parametrize("missing, package", [("s3://b/f", "s3fs"), ("gs://b/f", "gcsfs")])
def test_a_store_without_its_package_is_one_message(
    missing: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'its reader {package} is not installed .*"motley\[remote\]", or'):
        fetched(missing)
