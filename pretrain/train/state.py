"""Where a run stands, as one value. All of it is equal on all ranks and travels in a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.stream.fingerprint import chain
from data_pipeline.stream.loader import StepBatch
from data_pipeline.stream.stream import StreamState
from pretrain.metrics import RouterSums, Sums, add, add_by_router
from pretrain.train.spikes import Measured, Spike, lost, taken_back


@dataclass(frozen=True)
class TrainState:
    step: int
    """Optimizer steps done."""
    stream: StreamState
    """Position in the data after them."""
    epochs: tuple[float, ...]
    """Passes over each source."""
    total: Sums
    """Sums of all steps (pretrain.metrics.step_sums)."""
    window: Sums
    """Sums since the last row of metrics."""
    num_rows: int
    """Rows of metrics written."""
    rows_sha256: str = ""
    """SHA-256 of these rows, in a state that was saved; "" in others and in those of earlier versions."""
    router_window: RouterSums = field(default_factory=dict)
    """Sums of the routers since the last row of metrics (pretrain.train.depth_steps.router_sums)."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Name of a router -> threshold of the next step (pretrain.train.thresholds): fp32 values, which JSON
    keeps exactly."""
    shares: dict[str, float] = field(default_factory=dict)
    """Name of a router -> share of the scores that its threshold is to let through."""
    fingerprint: int = 0
    """64 bits, chained over the bytes of all sequences consumed (data_pipeline/stream/fingerprint.py)."""
    unreadable: tuple[str, ...] = ()
    """Documents that could not be read, of all ranks and attempts, each once, in the order of their steps."""
    unreadable_in_rows: int = 0
    """How many of them rows of metrics have named."""
    recent: tuple[Measured, ...] = ()
    """Measures of the last applied steps, oldest first, by which spikes are judged; empty if none is."""
    spikes: tuple[Spike, ...] = ()
    """Spikes of the run, oldest first."""

    @classmethod
    def start(cls, stream: StreamState) -> "TrainState":
        return cls(step=0, stream=stream, epochs=(), total={}, window={}, num_rows=0)

    def advance(
        self,
        batch: StepBatch,
        sums: Sums,
        router_sums: RouterSums | None = None,
        thresholds: Mapping[str, float] | None = None,
        shares: Mapping[str, float] | None = None,
        recent: tuple[Measured, ...] = (),
    ) -> "TrainState":
        """The state after one more step, which consumed `batch` and measured `sums` and `router_sums`;
        `thresholds` and `shares` are those of the next step, `recent` what it is judged by. `batch` speaks
        for all ranks (consumed.py)."""
        return replace(
            self,
            step=self.step + 1,
            stream=batch.state_after,
            epochs=batch.epochs,
            total=add(self.total, sums),
            window=add(self.window, sums),
            router_window=add_by_router(self.router_window, router_sums or {}),
            thresholds=dict(thresholds or {}),
            shares=dict(shares or {}),
            fingerprint=chain(
                self.fingerprint, batch.digest, batch.state_after.sequences - self.stream.sequences
            ),
            unreadable=(*self.unreadable, *self.new_unreadable(batch)),
            recent=recent,
        )

    def skip(
        self,
        batch: StepBatch,
        sums: Sums,
        why: str,
        thresholds: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> "TrainState":
        """The state after a spike, which consumed `batch` and whose update was not applied. Losses and norms
        in `sums` are dropped; the other arguments are as in `advance`."""
        after = self.advance(batch, lost(sums), None, thresholds, shares, self.recent)
        return replace(after, spikes=(*self.spikes, Spike(after.step, why, None)))

    def go_back(self, saved: "TrainState") -> "TrainState":
        """The state of a run that goes back to the weights of `saved` after the last of its `spikes`. The
        data that it has consumed since then stays consumed, and what it has cost stays spent."""
        return replace(
            saved,
            stream=self.stream,
            epochs=self.epochs,
            total=taken_back(self.total, saved.total),
            fingerprint=self.fingerprint,
            unreadable=self.unreadable,
            spikes=(*self.spikes[:-1], replace(self.spikes[-1], back_to=saved.step)),
        )

    def new_unreadable(self, batch: StepBatch) -> tuple[str, ...]:
        """Documents that could not be read for `batch`, and of which that was not known."""
        if not batch.unreadable:
            return ()
        known = set(self.unreadable)
        return tuple(name for name in batch.unreadable if name not in known)

    def logged(self) -> "TrainState":
        """A row was written: its window is closed."""
        return replace(
            self,
            window={},
            router_window={},
            num_rows=self.num_rows + 1,
            unreadable_in_rows=len(self.unreadable),
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self) | {"stream": self.stream.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> "TrainState":
        """Raises ConfigError for anything but the output of to_json of this version."""
        try:
            if "fingerprint" not in value:  # a stream's state of format 1 holds it
                value = value | {"fingerprint": json.loads(value["stream"])["fingerprint"]}
            tuples = {name: tuple(value[name]) for name in ("epochs", "unreadable") if name in value}
            tuples["recent"] = tuple((loss, norm) for loss, norm in value.get("recent", ()))
            tuples["spikes"] = tuple(Spike(**spike) for spike in value.get("spikes", ()))
            return cls(**value | tuples | {"stream": StreamState.from_json(value["stream"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"not the state of a run of this version: {error!r}") from None
