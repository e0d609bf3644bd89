"""Progress of long work: one live line on a terminal, a plain line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from data_pipeline.files.printable import printable


class Progress:
    """`with Progress("tokenize", total=100, unit="shard") as p: p.advance(1, bad=0)`.

    It prints a tqdm bar on a terminal; elsewhere a line at most every `log_every_s` seconds, and one at the
    end.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        log_every_s: float = 10.0,
        out: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.done = printable(label), total, unit, done
        self.log_every_s = log_every_s
        self.out = out or sys.stderr
        self.figures: dict[str, object] = {}
        self._start = self._last = time.monotonic()
        self._first_done = done
        self._bar = (
            tqdm(
                total=total, initial=done, desc=self.label, unit=f" {unit}", file=self.out, dynamic_ncols=True
            )
            if self.out.isatty()
            else None
        )

    def advance(self, count: int = 1, **figures: object) -> None:
        """Count finished work; `figures` (name -> value, a number or formatted) are shown beside it."""
        self.done += count
        self.figures.update(figures)
        if self._bar is not None:
            self._bar.set_postfix(
                {name: _short(value) for name, value in self.figures.items()}, refresh=False
            )
            self._bar.update(count)
        elif time.monotonic() - self._last >= self.log_every_s:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        rate = (self.done - self._first_done) / elapsed if elapsed > 0 else 0.0
        left = (
            f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        )
        figures = "".join(f", {name} {_short(value)}" for name, value in self.figures.items())
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}{figures}, {elapsed:.0f} s{left}",
            file=self.out,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
