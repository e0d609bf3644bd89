"""Where a run stands, as one value. All of it is equal on all ranks and travels in a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.stream.loader import StepBatch
from data_pipeline.stream.stream import StreamState
from pretrain.metrics import RouterSums, Sums, add, add_by_router


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
    router_window: RouterSums = field(default_factory=dict)
    """Sums of the routers since the last row of metrics (pretrain.train.depth_steps.router_sums)."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Name of a router -> threshold of the next step (pretrain.train.thresholds): fp32 values, which JSON
    keeps exactly."""
    shares: dict[str, float] = field(default_factory=dict)
    """Name of a router -> share of the scores that its threshold is to let through."""

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
    ) -> "TrainState":
        """The state after one more step, which consumed `batch` and measured `sums` and `router_sums`;
        `thresholds` and `shares` are those of the next step."""
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
        )

    def logged(self) -> "TrainState":
        """A row was written: its window is closed."""
        return replace(self, window={}, router_window={}, num_rows=self.num_rows + 1)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self) | {"stream": self.stream.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> "TrainState":
        """Raises ConfigError for anything but the output of to_json of this version."""
        try:
            stream, epochs = StreamState.from_json(value["stream"]), tuple(value["epochs"])
            return cls(**value | {"stream": stream, "epochs": epochs})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"not the state of a run of this version: {error!r}") from None
