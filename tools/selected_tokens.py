"""The choices of a trained model's routers on held-out documents, for `motley inspect`.

Nothing is written, so a run may be inspected while it is trained.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.tar import ShardError
from parallel.world import import_libraries
from pretrain.checkpoint.folder import STATE, checkpoints
from pretrain.config import RunConfig, load
from pretrain.evaluation.documents import heldout_texts, pack_texts
from pretrain.evaluation.losses import (
    HeldoutImages,
    images_of,
    micro_batches,
    routing_states,
    tokens_that_ran,
)
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.routing_state import BINS, RoutingState, counts_in
from pretrain.run_files import CHECKPOINTS, CONFIG
from pretrain.train import depth_steps, expert_steps
from pretrain.weights.folder import WeightSource
from pretrain.weights.sources import open_source

if TYPE_CHECKING:
    from pretrain.models.decoder import Decoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DepthRow:
    """A depth router: means over the held-out tokens of its modality, without padding and special tokens.

    Means are NaN if there are no such tokens.
    """

    layer: int
    modality: str
    scheduled: float
    """The ratio of the schedule at the step of the checkpoint."""
    realised: float
    gate_mean: float
    gate_std: float


@dataclass(frozen=True)
class ExpertRow:
    """The experts of a tower in a layer."""

    layer: int
    tower: str
    shares: tuple[float, ...]
    """By expert, the share of the tower's tokens that it takes; they add up to the experts per token."""
    dropped: float
    """Share of the tokens that no expert takes."""


@dataclass(frozen=True)
class Inspection:
    """What the routers of a checkpoint choose."""

    config: RunConfig
    checkpoint: Path
    step: int
    by: str
    """The rule by which tokens were chosen, in words."""
    tokens: int
    depth: tuple[DepthRow, ...]
    experts: tuple[ExpertRow, ...]
    images: HeldoutImages | None
    """The images that are drawn, if the model routes images by depth."""
    ran: Mapping[int, Bool[np.ndarray, "texts tokens"]]
    """By layer, the tokens of `images` that ran."""


@torch.no_grad()
def inspect(path: Path, *, documents: int = 0, causal: bool = False) -> Inspection:
    """Inspect a checkpoint, or the newest one of a run (its directory or TOML file), in one process.

    It runs on the held-out sequences of the run's evaluations, and on the images of the first `documents` of
    their documents. `causal`: tokens are chosen by thresholds instead of the rule of training. Raises
    ConfigError.
    """
    path, run = _run_of(path)
    config = load(run / CONFIG)
    model, data = config.model, _heldout(run, config)
    source = open_source(path)
    step = source.step or 0
    progress = step / config.num_steps
    routing_state, by = _selection(config, source, progress, causal=causal)
    texts = heldout_texts(
        data, num_sequences=config.evaluate.heldout_sequences, context_tokens=model.context_tokens
    )
    decoder = _decoder(config, source)
    device = next(decoder.parameters()).device

    def forward(inputs: Iterable[ModelInputs]) -> None:
        for batch in inputs:
            decoder.hidden(batch.to(device))

    forward(
        build_inputs(batch, model, document_mask=config.data.document_mask, routing_state=routing_state)
        for batch in micro_batches(pack_texts(texts, model.context_tokens), data.vocabulary, config)
    )
    sums = {counts.name: counts.take()[BINS:].tolist() for counts in counts_in(decoder)}
    images = images_of(texts, data, config, documents)
    return Inspection(
        config=config,
        checkpoint=source.path,
        step=step,
        by=by,
        tokens=sum(len(text.weights) for text in texts),
        depth=_depth_rows(model, sums, progress),
        experts=_expert_rows(model, sums),
        images=images,
        ran={} if images is None else tokens_that_ran(forward, images, routing_state),
    )


def _heldout(run: Path, config: RunConfig) -> TokenSource:
    """The held-out data of the run. Raises ConfigError, also if the model has no routers to inspect."""
    if not (config.model.depth or config.model.experts):
        raise ConfigError(
            f"{run}: its model chooses no tokens: it has neither model.depth nor model.experts; inspect a "
            "run that has one of them"
        )
    if config.data.heldout is None:
        raise ConfigError(f"{run}: data.heldout is not set; there are no documents to look at")
    try:
        return TokenSource.open(config.data.heldout)
    except ShardError as error:
        raise ConfigError(f"{run}: data.heldout cannot be read: {error}") from None


def _run_of(path: Path) -> tuple[Path, Path]:
    """(path of the weights, its run directory)."""
    path = load(path).run_dir if path.is_file() else path
    for folder in (path, *path.parents[1:2]):
        if (folder / CONFIG).is_file():
            if not path.is_dir():
                there = (
                    ", ".join(checkpoint.name for _, checkpoint in checkpoints(folder / CHECKPOINTS))
                    or "none"
                )
                raise ConfigError(f"{path} is not there; checkpoints of {folder}: {there}")
            return path, folder
    raise ConfigError(
        f"{path} is no run directory ({CONFIG} is not there; paths are relative to {Path.cwd()}), nor one's "
        "checkpoint; train the run first, or name its directory"
    )


def _selection(
    config: RunConfig, source: WeightSource, progress: float, *, causal: bool
) -> tuple[RoutingState, str]:
    """(routing state, the rule that it stands for in words)."""
    model = config.model
    thresholds = json.loads((source.path / STATE).read_text())["state"]["thresholds"]
    forms = [routing_state for _, routing_state in routing_states(model, thresholds, progress)]
    if not causal or model.is_causal:
        causality = "which are causal" if model.is_causal else "which look at later tokens"
        return forms[0], f"its rules of training, {causality}"
    if len(forms) < 2:
        gates = ", ".join(m for m, depth in model.depth.items() if not depth.has_causal_gate)
        raise ConfigError(
            f"--causal: the gates of {gates} depend on later tokens, whatever tokens are chosen by; leave it "
            "out, or train with another model.depth gate, such as tanh"
        )
    return forms[1], "thresholds, the causal form of its rules"


def _decoder(config: RunConfig, source: WeightSource) -> "Decoder":
    """The decoder with the weights of `source`, on a GPU if there is one."""
    import_libraries()  # it imports megatron-core without its warnings
    from pretrain.models.decoder import Decoder

    decoder = Decoder(config.model, seed=config.seed)
    for name, parameter in decoder.named_parameters():
        parameter.copy_(source.tensors[name].read())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The decoder is in training mode because routers count only there; it is not trained.
    return decoder.to(device, _DTYPES[config.precision]).train()


def _depth_rows(model: ModelConfig, sums: Mapping[str, list[float]], progress: float) -> tuple[DepthRow, ...]:
    rows = []
    for name, (layer, modality, ratio) in depth_steps.places(model).items():
        tokens, ran, gate, squared = sums[name][:4]
        share, mean, square = (value / tokens if tokens else np.nan for value in (ran, gate, squared))
        spread = sqrt(max(0.0, square - mean * mean)) if tokens else np.nan
        scheduled = model.depth[modality].ratio_at(ratio, progress)
        rows.append(DepthRow(layer, modality, scheduled, share, mean, spread))
    return tuple(rows)


def _expert_rows(model: ModelConfig, sums: Mapping[str, list[float]]) -> tuple[ExpertRow, ...]:
    rows: dict[tuple[int, str], list[list[float]]] = {}
    for name, router in expert_steps.places(model).items():
        rows.setdefault((router.layer, router.tower), []).append(sums[name])
    result = []
    for (layer, tower), experts in rows.items():
        _, tokens, dropped = experts[0][:3]
        shares = tuple(rows_taken / tokens if tokens else np.nan for rows_taken, *_ in experts)
        result.append(ExpertRow(layer, tower, shares, dropped / tokens if tokens else np.nan))
    return tuple(result)
