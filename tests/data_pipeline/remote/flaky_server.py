"""An HTTP server of a folder that answers ranges, and that fails at random, by a seed."""

import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_pipeline.remote.location import RemoteSettings
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import random_documents, write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})
FAULTS = ("drop", "truncate", "stall", "500", "404", "302", "whole")
STALL_S = 0.25
"""Seconds without a byte that readers bear where the server stalls, which it does for longer."""


def write_folder(folder: Path, count: int, seed: int, documents_per_shard: int = 40) -> Path:
    """A folder of token shards with its index."""
    documents = list(random_documents(VOCABULARY, count, seed, median_text_tokens=10, image_tokens=9))
    write_token_folder(folder, documents, VOCABULARY, documents_per_shard=documents_per_shard)
    TokenSource.open(folder)
    return folder


def settings(cache: Path, **changes: object) -> RemoteSettings:
    """Settings with short waits, and patience for a source that fails at random on a loaded machine."""
    values = {"cache_bytes": 10**9, "retry_s": 60.0, "first_wait_s": 0.01, "stall_s": 30.0}
    return RemoteSettings(cache, **{**values, "piece_bytes": 8192, **changes})  # pyright: ignore


class FlakyServer(ThreadingHTTPServer):
    """Serves files below `root`. A share `fault_frac` of requests meets one of `faults`."""

    daemon_threads = True

    def __init__(self, root: Path, *, seed: int, fault_frac: float, faults: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.fault_frac, self.faults, self.failing = root, fault_frac, faults, ""
        """`failing`: part of the names of files whose requests meet faults; "" is part of all."""
        self.requests: Counter[str] = Counter()
        """Path, or path and first byte of a range -> number of requests."""
        self.met: Counter[str] = Counter()
        """Fault -> number of requests that met it."""
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def draw(self, asked: str) -> str | None:
        """Count a request; the fault that it meets."""
        with self._lock:
            self.requests[asked] += 1
            if self.failing not in asked or self._random.random() >= self.fault_frac:
                return None
            fault = self._random.choice(self.faults)
            self.met[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        range_ = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        fault = self.server.draw(path if range_ is None else f"{path} {range_[1]}")
        if fault == "drop":
            return
        if fault in ("404", "500"):
            return self.send_error(int(fault))
        if fault == "302":
            self.send_response(302)
            self.send_header("Location", f"{self.path}?again")
            return self.end_headers()
        file = self.server.root / path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        if range_ is None or fault == "whole":
            self.send_response(200)
        else:
            first, last = int(range_[1]), min(int(range_[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("truncate", "stall"):
            self.wfile.write(data[: len(data) // 2])
            if fault == "stall":
                self.wfile.flush()
                threading.Event().wait(3 * STALL_S)
        else:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(
    root: Path, *, seed: int = 0, fault_frac: float = 0.0, faults: tuple[str, ...] = FAULTS
) -> Iterator[FlakyServer]:
    """A server in a thread of this process while the block runs."""
    with FlakyServer(root, seed=seed, fault_frac=fault_frac, faults=faults) as server:
        threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def bytes_of(cache: Path) -> int:
    """Bytes of all files of a cache, which may come and go meanwhile."""
    total = 0
    for path in (cache / "files").rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
