"""A trained model with all that it needs to speak: its decoder, its tokenizers, its vocabulary, its rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import load_tokenizers, vocabulary_of
from parallel.collectives import ONE_RANK
from parallel.logical import logical_of
from parallel.world import World
from pretrain.config import load
from pretrain.evaluation.losses import routing_states
from pretrain.generation.grammar import Grammar
from pretrain.generation.processes import check_processes
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.run_files import CONFIG
from pretrain.run_tokenizers import tokenizers_of_run
from pretrain.weights.folder import WeightSource, threshold_names
from pretrain.weights.sources import open_source, run_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainedModel:
    """Made by `open_model`."""

    source: WeightSource
    decoder: Decoder
    """On a GPU if there is one."""
    tokenizers: Mapping[str, Tokenizer]
    vocabulary: Vocabulary
    routing_state: RoutingState
    """The causal form of the rules by which the model chooses tokens, as evaluations use it."""
    heldout: str | None
    """The folder of the run's held-out token shards, or its URL; None for weights without a run."""
    writes: bool = True
    """Whether this process writes and prints; one of several ranks does."""

    @property
    def span_codes(self) -> dict[str, int]:
        """Modality -> codes of each of its spans, of those whose spans are all equally long."""
        found = {name: tokenizer.config.content_codes for name, tokenizer in self.tokenizers.items()}
        return {name: codes for name, codes in found.items() if codes is not None}

    @property
    def context_only(self) -> frozenset[str]:
        """Modalities that the model reads and did not learn to write."""
        config = self.decoder.config
        return frozenset(config.vectors) - frozenset(config.learned_vectors)

    def grammar(self, goal: str) -> Grammar:
        """The grammar of samples of a goal, a modality or "free". Raises ConfigError for a goal that the
        model did not learn."""
        if goal in self.context_only:
            raise ConfigError(
                f'{self.source.path}: does not write {goal}, because model.vectors.{goal}.objective = "none" '
                "makes it context alone; ask for another modality"
            )
        for modality in self.decoder.config.learned_vectors:
            if modality not in self.span_codes:
                raise ConfigError(
                    f"the {modality} tokenizer gives any number of vectors, but an image is denoised as a "
                    "whole; only tokenizers with content_codes can be written"
                )
        return Grammar(self.vocabulary, self.span_codes, goal, self.context_only)


def open_model(path: Path, tokenizers: Path | None = None, world: World | None = None) -> TrainedModel:
    """Open a run (its directory or TOML file: the newest checkpoint), a checkpoint, or a folder of weights.

    `tokenizers`: their folder; None: beside the data of the run. `world`: the tensor-parallel ranks that
    share the model; None: this process holds it whole. Raises ConfigError.
    """
    path = load(path).run_dir if path.is_file() else path
    run = run_of(path)
    config = None if run is None else load(run / CONFIG)
    # Of a run they come first, since hashing a checkpoint takes long.
    opened = None if config is None else tokenizers_of_run(path, config, tokenizers)
    source = open_source(path)
    if opened is None:
        opened = _tokenizers_of_weights(path, tokenizers)
    if world is not None:
        check_processes(source.model, world.tp_size)
    vocabulary = vocabulary_of(opened)
    _check_vocabulary(source, vocabulary, opened, tokenizers)
    return TrainedModel(
        source=source,
        decoder=load_decoder(source, "fp32" if config is None else config.precision, world),
        tokenizers=opened,
        vocabulary=vocabulary,
        routing_state=routing_state_of(source),
        heldout=None if config is None else config.data.heldout,
        writes=world is None or world.rank == 0,
    )


@torch.no_grad()
def load_decoder(source: WeightSource, precision: str, world: World | None = None) -> Decoder:
    """The decoder with the weights of `source`, on a GPU if there is one. `precision`: of RunConfig. `world`:
    the ranks that share it, of which this one gets its part; None: the whole decoder."""
    tp = ONE_RANK if world is None else world.tensor_parallel
    decoder = Decoder(source.model, tp=tp)
    for name, parameter in decoder.named_parameters():
        parameter.copy_(logical_of(parameter).cut(source.tensors[name].read(), tp.rank, tp.size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if world is None else world.device
    return decoder.to(device, _DTYPES[precision]).eval()


def _tokenizers_of_weights(path: Path, folder: Path | None) -> dict[str, Tokenizer]:
    if folder is None:
        raise ConfigError(
            f"{path}: weights alone do not say which tokenizers made their ids; name the folder with "
            "--tokenizers DIR"
        )
    return load_tokenizers(folder)


def _check_vocabulary(
    source: WeightSource, vocabulary: Vocabulary, opened: Mapping[str, Tokenizer], folder: Path | None
) -> None:
    """Raise ConfigError unless the tokenizers make the ids that the model was trained on."""
    model, where = source.model, folder or "the tokenizers"
    expected = None if source.vocabulary is None else dict(source.vocabulary)
    if vocabulary.modalities != model.modalities or expected not in (None, dict(vocabulary.sizes)):
        raise ConfigError(
            f"{source.path}: trained on ids {expected or list(model.modalities)}, but {where} make "
            f"{dict(vocabulary.sizes)}; name the tokenizers of its data with --tokenizers DIR"
        )
    if vocabulary.size > model.vocab_tokens:
        raise ConfigError(
            f"{source.path}: {model.vocab_tokens} ids, but {where} make {vocabulary.size}; name the "
            "tokenizers of its data with --tokenizers DIR"
        )
    found = {modality: form.features for modality, form in vocabulary.vectors.items()}
    own = {modality: of.features for modality, of in model.vectors.items()}
    if found != own:
        raise ConfigError(
            f"{source.path}: trained on vectors (and their features) {own or None}, but {where} make "
            f"{found or 'none'}; name the tokenizers of its data with --tokenizers DIR"
        )
    for modality, fingerprint in (source.tokenizers or {}).items():
        if fingerprint != opened[modality].fingerprint:
            raise ConfigError(
                f"{source.path}: trained on ids of the {modality} tokenizer {fingerprint}, but that of "
                f"{where} is {opened[modality].fingerprint}: the same ids mean other things; name the "
                "tokenizers of its data with --tokenizers DIR"
            )


def routing_state_of(source: WeightSource) -> RoutingState:
    """What routers choose by behind the last step. Raises ConfigError where no causal choice is known."""
    model = source.model
    if not threshold_names(model):
        return RoutingState()
    if not model.has_causal_form:
        gates = ", ".join(m for m, depth in model.depth.items() if not depth.has_causal_gate)
        raise ConfigError(
            f"{source.path}: the gates of {gates} depend on later tokens, which do not exist when a token is "
            "written; train with another model.depth gate, such as tanh"
        )
    if source.routing_state is None:
        raise ConfigError(
            f"{source.path}: the model chooses tokens by thresholds, and these weights hold none: they were "
            "exported by an earlier version, or come from no run of this model; name the run directory or "
            "its checkpoint, or export that again"
        )
    return routing_states(model, source.routing_state.thresholds, source.routing_state.progress)[-1][1]
