"""The choices of a trained model's routers on held-out documents, for `motley inspect`.

Nothing is written, so a run may be inspected while it is trained.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.tar import ShardError
from pretrain.checkpoint.folder import checkpoints
from pretrain.config import RunConfig, load
from pretrain.evaluation.documents import heldout_texts, numbered, pack_texts
from pretrain.evaluation.losses import (
    HeldoutImages,
    images_of,
    inputs_of,
    micro_batches,
    routing_states,
    tokens_that_ran,
)
from pretrain.generation.trained_model import load_decoder
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport, no_counts
from pretrain.models.routing_state import RoutingState
from pretrain.run_files import CHECKPOINTS, CONFIG
from pretrain.train import depth_steps, expert_steps
from pretrain.weights.sources import open_source, run_of


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
    assert source.routing_state is not None, "a run's weights come with it"
    routing_state, by = _selection(config, source.routing_state, causal=causal)
    wanted = config.evaluate.heldout_sequences
    texts = numbered(heldout_texts(data, num_sequences=wanted, context_tokens=model.context_tokens))
    decoder = load_decoder(source, config.precision)
    device = next(decoder.parameters()).device

    def report_of(inputs: Iterable[ModelInputs]) -> RouterReport:
        total = no_counts(model)
        for micro_batch in inputs:
            _, report = decoder.hidden(micro_batch.to(device))
            total = total + report.on_host()
        return total

    report = report_of(
        replace(
            inputs_of(share, data.vocabulary, config, document_mask=config.data.document_mask),
            routing_state=routing_state,
        )
        for share in micro_batches(pack_texts(texts, model.context_tokens), config)
    )
    images = images_of(texts, data, config, documents)
    return Inspection(
        config=config,
        checkpoint=source.path,
        step=step,
        by=by,
        tokens=sum(len(text.weights) for text in texts),
        depth=_depth_rows(model, report, source.routing_state.progress),
        experts=_expert_rows(model, report),
        images=images,
        ran={} if images is None else tokens_that_ran(report_of, images, routing_state),
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
        return TokenSource.open(config.data.heldout, config.data.remote)
    except ShardError as error:
        raise ConfigError(f"{run}: data.heldout cannot be read: {error}") from None


def _run_of(path: Path) -> tuple[Path, Path]:
    """(path of the weights, its run directory)."""
    path = load(path).run_dir if path.is_file() else path
    run = run_of(path)
    if run is None:
        raise ConfigError(
            f"{path} is no run directory ({CONFIG} is not there; paths are relative to {Path.cwd()}), nor "
            "one's checkpoint; train the run first, or name its directory"
        )
    if not path.is_dir():
        there = ", ".join(checkpoint.name for _, checkpoint in checkpoints(run / CHECKPOINTS)) or "none"
        raise ConfigError(f"{path} is not there; checkpoints of {run}: {there}")
    return path, run


def _selection(config: RunConfig, trained: RoutingState, *, causal: bool) -> tuple[RoutingState, str]:
    """(routing state, the rule that it stands for in words)."""
    model = config.model
    forms = [state for _, state in routing_states(model, trained.thresholds, trained.progress)]
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


def _depth_rows(model: ModelConfig, report: RouterReport, progress: float) -> tuple[DepthRow, ...]:
    rows = []
    for layer, modality, ratio in depth_steps.routers(model).values():
        counts = report.layers[layer].depth[modality]
        tokens = float(counts.tokens) or np.nan
        mean, square = float(counts.gate) / tokens, float(counts.gate_squared) / tokens
        rows.append(
            DepthRow(
                layer,
                modality,
                scheduled=model.depth[modality].ratio_at(ratio, progress),
                realised=float(counts.run) / tokens,
                gate_mean=mean,
                gate_std=sqrt(max(0.0, square - mean * mean)) if counts.tokens else np.nan,
            )
        )
    return tuple(rows)


def _expert_rows(model: ModelConfig, report: RouterReport) -> tuple[ExpertRow, ...]:
    rows = []
    for layer, tower in expert_steps.routers(model).values():
        counts = report.layers[layer].experts[tower]
        tokens = float(counts.tokens) or np.nan
        shares = tuple(taken / tokens for taken in counts.taken.tolist())
        rows.append(ExpertRow(layer, tower, shares, dropped=float(counts.dropped) / tokens))
    return tuple(rows)
