"""`motley inspect`: what the routers of a trained model choose on held-out documents.

Read only: a run that is still being trained may be looked at.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import nn

from data_pipeline.batch import Batch
from data_pipeline.index import TokenSource
from data_pipeline.toml_config import ConfigError
from data_pipeline.vocabulary import Vocabulary
from parallel.world import import_libraries
from pretrain import depth_steps, expert_steps
from pretrain.checkpoint_folder import STATE
from pretrain.config import RunConfig, load
from pretrain.evaluate import micro_batches, selections
from pretrain.heldout import heldout_texts, pack_texts
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.run_dir import CONFIG
from pretrain.thresholds import BINS, Selection, counts_in
from pretrain.weight_sources import open_source
from pretrain.weights import Source

IMAGE = "image"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DepthRow:
    """A router of depth: means over its modality's tokens in the held-out sequences, padding and special
    tokens left out. NaN where there are none."""

    layer: int
    modality: str
    scheduled: float
    """Ratio that the schedule has at the checkpoint's step."""
    realised: float
    gate_mean: float
    gate_std: float


@dataclass(frozen=True)
class ExpertRow:
    """The experts of a tower in a layer."""

    layer: int
    tower: str
    shares: tuple[float, ...]
    """Tokens that each takes, as a share of the tower's; their sum is how many experts a token has."""
    dropped: float
    """Share of the tokens that no expert takes."""


@dataclass(frozen=True)
class SeenImage:
    """An image of a held-out document, or the piece of it that a sequence holds."""

    name: str
    """ "shard/key" of the document."""
    codes: Int[np.ndarray, " n"]
    """In raster order, as its tokenizer made them."""
    runs: Mapping[int, Bool[np.ndarray, " n"]]
    """Layer with a router for images -> which of these tokens ran."""


@dataclass(frozen=True)
class Inspection:
    config: RunConfig
    checkpoint: Path
    step: int
    by: str
    """What tokens were chosen by, for a person."""
    tokens: int
    depth: tuple[DepthRow, ...]
    experts: tuple[ExpertRow, ...]
    images: tuple[SeenImage, ...]
    """All there are, in order, if the model has depth routing of images."""


def inspect(path: Path, *, causal: bool = False) -> Inspection:
    """The newest checkpoint of a run (its directory or its TOML file), or the checkpoint `path`, on the
    sequences that its evaluations read. `causal`: by thresholds, whatever rule it was trained with.

    One process, whatever layout the run has. Raises ConfigError.
    """
    path, run = _run_of(path)
    config = load(run / CONFIG)
    model = config.model
    if not (model.depth or model.experts):
        raise ConfigError(
            f"{run}: its model chooses no tokens: it has neither model.depth nor model.experts; inspect a "
            "run that has one of them"
        )
    if config.data.heldout is None:
        raise ConfigError(f"{run}: data.heldout is not set; there are no documents to look at")
    source = open_source(path)
    step = source.step or 0
    progress = step / config.num_steps
    selection, by = _selection(config, source, progress, causal=causal)
    data = TokenSource.open(config.data.heldout)
    texts = heldout_texts(
        data, num_sequences=config.evaluate.heldout_sequences, context_tokens=model.context_tokens
    )
    batches = micro_batches(
        pack_texts(texts, model.context_tokens),
        data.vocabulary,
        context_tokens=model.context_tokens,
        micro_batch_sequences=config.parallel.micro_batch_sequences,
        dp_rank=0,
        dp_size=1,
    )
    decoder = _decoder(config, source)
    images: list[SeenImage] = []
    for batch in batches:
        inputs = build_inputs(batch, model, document_mask=config.data.document_mask, selection=selection)
        ran = _forward(decoder, inputs)
        if IMAGE in model.depth:
            layers = [layer for layer in ran if IMAGE in model.depth_ratios(layer)]
            images += images_in(batch, data.vocabulary, {layer: ran[layer] for layer in layers})
    sums = {counts.name: counts.take()[BINS:].tolist() for counts in counts_in(decoder)}
    return Inspection(
        config=config,
        checkpoint=source.path,
        step=step,
        by=by,
        tokens=sum(len(text.weights) for text in texts),
        depth=_depth_rows(model, sums, progress),
        experts=_expert_rows(model, sums),
        images=tuple(images),
    )


def images_in(
    batch: Batch, vocabulary: Vocabulary, ran: Mapping[int, Bool[np.ndarray, " tokens"]]
) -> list[SeenImage]:
    """`ran`: layer -> which tokens of the batch ran, in sequence order, flat over sequences."""
    found = []
    for row in range(batch.num_sequences):
        # Images never touch: each has delimiters, which are text.
        is_image = batch.input_modality[row] == vocabulary.modalities.index(IMAGE)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], is_image, [False])).astype(np.int8)))
        offset = row * batch.sequence_tokens
        for start, end in edges.reshape(-1, 2).tolist():
            found.append(
                SeenImage(
                    name=batch.samples[row][batch.document_ids[row, start]],
                    codes=batch.input_ids[row, start:end] - vocabulary.start(IMAGE),
                    runs={layer: each[offset + start : offset + end] for layer, each in ran.items()},
                )
            )
    return found


def _run_of(path: Path) -> tuple[Path, Path]:
    """(what holds the weights, the run directory that it belongs to)."""
    path = load(path).run_dir if path.is_file() else path
    for folder in (path, *path.parents[1:2]):
        if (folder / CONFIG).is_file():
            return path, folder
    raise ConfigError(
        f"{path} is no run directory ({CONFIG} is not there; paths are relative to {Path.cwd()}), nor one's "
        "checkpoint; train the run first, or name its directory"
    )


def _selection(config: RunConfig, source: Source, progress: float, *, causal: bool) -> tuple[Selection, str]:
    model = config.model
    thresholds = json.loads((source.path / STATE).read_text())["state"]["thresholds"]
    forms = [selection for _, selection in selections(model, thresholds, progress)]
    if not causal or model.is_causal:
        look = "which are causal" if model.is_causal else "which look at later tokens"
        return forms[0], f"its rules of training, {look}"
    if len(forms) < 2:
        gates = ", ".join(m for m, depth in model.depth.items() if not depth.has_causal_gate)
        raise ConfigError(
            f"--causal: the gates of {gates} depend on later tokens, whatever tokens are chosen by; leave it "
            "out, or train with another model.depth gate, such as tanh"
        )
    return forms[1], "thresholds, the causal form of its rules"


def _decoder(config: RunConfig, source: Source) -> "nn.Module":
    import_libraries()  # before megatron-core is imported otherwise: that warns
    from pretrain.models.decoder import Decoder

    decoder = Decoder(config.model, seed=config.seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.tensors[name].read())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In training mode, because routers count in it alone; nothing here is trained.
    return decoder.to(device, _DTYPES[config.precision]).train()


@torch.no_grad()
def _forward(decoder: nn.Module, inputs: ModelInputs) -> dict[int, Bool[np.ndarray, " tokens"]]:
    """Layer with a router -> which tokens ran there, in sequence order, flat over sequences."""
    from pretrain.models.decoder import Decoder
    from pretrain.models.depth import Chosen, DepthRouting

    assert isinstance(decoder, Decoder)
    ran: dict[int, np.ndarray] = {}

    def watch(layer: int, routing: DepthRouting) -> torch.utils.hooks.RemovableHandle:
        def note(_module: nn.Module, _arguments: object, chosen: Chosen) -> None:
            assert inputs.table is not None
            ran[layer] = np.zeros(inputs.num_tokens, bool)
            ran[layer][inputs.table.places[chosen.tokens.rows.cpu().numpy()]] = True

        return routing.register_forward_hook(note)

    found = ((layer, getattr(block, "depth", None)) for layer, block in enumerate(decoder.blocks))
    handles = [watch(layer, routing) for layer, routing in found if isinstance(routing, DepthRouting)]
    decoder.hidden(inputs.to(next(decoder.parameters()).device))
    for handle in handles:
        handle.remove()
    return ran


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
    for name, place in expert_steps.places(model).items():
        rows.setdefault((place.layer, place.tower), []).append(sums[name])
    found = []
    for (layer, tower), experts in rows.items():
        _, tokens, dropped = experts[0][:3]
        shares = tuple(taken / tokens if tokens else np.nan for taken, *_ in experts)
        found.append(ExpertRow(layer, tower, shares, dropped / tokens if tokens else np.nan))
    return tuple(found)
