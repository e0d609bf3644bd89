"""Opening weights of any origin: a run, a checkpoint, a folder of weights, a Llama or Qwen3 folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import ShardError
from parallel.weight_average import EMA
from pretrain.checkpoint.folder import STATE, CheckpointError, checkpoints, find_corruption, read_manifest
from pretrain.config import RunConfig, load
from pretrain.data_manifest import data_manifest
from pretrain.models.logical_weights import logical_shapes
from pretrain.models.routing_state import RoutingState
from pretrain.run_dir import read_record
from pretrain.run_files import CHECKPOINTS
from pretrain.run_files import CONFIG as RUN
from pretrain.run_identity import check_origin, check_resolved_config, identity_of
from pretrain.weights.folder import (
    MODEL,
    LazyTensor,
    WeightSource,
    check_tensors,
    open_weights,
    threshold_names,
)
from pretrain.weights.folder import find_corruption as find_changed_weights
from pretrain.weights.hugging_face import CONFIG as HUGGING_FACE
from pretrain.weights.hugging_face import open_hugging_face

if TYPE_CHECKING:
    from torch import Tensor


def open_source(path: Path, *, ema: bool = False) -> WeightSource:
    """The weights at a path, to be read one by one in this process. `ema`: their moving averages, which only
    runs have (optimizer.ema_decay). Raises ConfigError if there are none."""
    if ema and any((path / name).is_file() for name in (MODEL, HUGGING_FACE)):
        raise ConfigError(f"{path} holds no averages of weights; runs and their checkpoints alone do")
    if (path / MODEL).is_file():
        source = open_weights(path)
        if problems := find_changed_weights(path):
            raise ConfigError("; ".join(problems))
        return source
    if (path / RUN).is_file():
        return _open_run(path, None, ema)
    if path.is_dir() and path.parent.name == CHECKPOINTS and (path.parents[1] / RUN).is_file():
        return _open_run(path.parents[1], path, ema)
    if (path / HUGGING_FACE).is_file():
        return open_hugging_face(path)
    raise ConfigError(
        f"{path} {'holds' if path.is_dir() else 'is no folder, so it holds'} no weights (paths are relative "
        f"to {Path.cwd()}); legal: a run directory ({RUN}), its {CHECKPOINTS}/step_..., a folder of weights "
        f"({MODEL}), one of Hugging Face ({HUGGING_FACE})"
    )


def run_of(path: Path) -> Path | None:
    """The run directory that `path`, a run directory or one of its checkpoints, belongs to; None without."""
    return next((folder for folder in (path, *path.parents[1:2]) if (folder / RUN).is_file()), None)


def manifest_of(config: RunConfig) -> Mapping[str, Any] | None:
    """The manifest of a run's data, whose ids are those of all its sources; None if the data is missing."""
    try:
        return data_manifest(config)
    except ShardError:
        return None


def with_ids_of(source: WeightSource, manifest: Mapping[str, Any] | None) -> WeightSource:
    """Weights with the vocabulary and the tokenizers of data; without changes where there is no manifest."""
    if manifest is None:
        return source
    return replace(
        source,
        vocabulary=manifest["vocabulary"],
        special_tokens=manifest.get("special_tokens"),
        tokenizers={name: entry["fingerprint"] for name, entry in manifest["tokenizers"].items()},
    )


def _sound_manifest(path: Path, config: RunConfig, others: Sequence[str]) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all sound. Raises ConfigError, which names `others`."""
    try:
        problems, (manifest, _) = find_corruption(path), read_manifest(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not path.exists():
        raise _gone(path, config)
    if problems:
        there = ", ".join(others) or "none"
        raise ConfigError(f"{path} is damaged: {'; '.join(problems)}. Other checkpoints there: {there}")
    return manifest


def _open_run(run: Path, checkpoint: Path | None, ema: bool) -> WeightSource:
    """The weights of a checkpoint (None: the newest), or with `ema` the averages of those that are trained,
    after all of its files are checked."""
    from pretrain.checkpoint.shards import ShardReader

    config = load(run / RUN)
    saved = [path for _, path in checkpoints(run / CHECKPOINTS)]
    if not saved:
        raise ConfigError(
            f"{run} has no checkpoint yet; a run makes one every every_steps.checkpoint = "
            f"{config.every_steps.checkpoint} steps, after its last step, and when SIGTERM stops it"
        )
    path = checkpoint or saved[-1]
    manifest = _sound_manifest(path, config, [other.name for other in saved if other != path])
    if (identity := identity_of(read_record(run))) is not None:
        check_resolved_config(run, identity)
        check_origin(path, manifest["run"], identity)
    reader, entries = ShardReader(path, manifest["tensors"]), manifest["tensors"].items()
    if ema and not any(EMA in entry["digest"] for _, entry in entries):
        raise ConfigError(f"{path} holds no averages of weights: they need optimizer.ema_decay, and one step")

    def read(name: str) -> "Tensor":
        averaged = ema and EMA in manifest["tensors"][name]["digest"]
        try:
            return reader.whole(name, EMA) if averaged else reader.whole(name)
        except CheckpointError as error:  # the check above found its files good
            raise (ConfigError(str(error)) if path.exists() else _gone(path, config)) from None

    tensors = {name: LazyTensor(tuple(entry["shape"]), partial(read, name)) for name, entry in entries}
    check_tensors(path, tensors, logical_shapes(config.model), f"the model of {run / RUN}")
    step = manifest["step"]
    state = _routing_state(path, config, step)
    found = WeightSource(path, config.model, tensors, config.name, step, routing_state=state)
    return with_ids_of(found, manifest_of(config))


def _routing_state(checkpoint: Path, config: RunConfig, step: int) -> RoutingState:
    """By what routers choose behind a checkpoint of `step` steps."""
    progress = step / config.num_steps
    if not threshold_names(config.model):
        return RoutingState(progress=progress)
    state = json.loads((checkpoint / STATE).read_text())["state"]
    return RoutingState(thresholds=state["thresholds"], progress=progress)


def _gone(path: Path, config: RunConfig) -> ConfigError:
    """The error for a checkpoint that its run removed while it was read."""
    return ConfigError(
        f"{path} was removed while it was read: a run that goes on keeps its newest keep_checkpoints = "
        f"{config.keep_checkpoints} only; export a newer one, or let the run keep more"
    )
