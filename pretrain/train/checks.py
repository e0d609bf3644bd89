"""Config, layout, data and initial weights are checked against each other before a run starts. This module
imports no torch."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.location import RemoteSettings, command_of, shown
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.tar import typed_location
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.stream import Stream
from pretrain.config import RunConfig, check_run_layout
from pretrain.generation.facts import check_utterances, fact_prompts
from pretrain.models.logical_weights import logical_shapes
from pretrain.parameter_settings import settings_of, tower_of
from pretrain.run_tokenizers import tokenizers_of_run
from pretrain.weights.warm_start import check_initial_weights


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError, one message that says what to change, for a run that could not start.

    Opens every source once, which makes the index of one that has none: ranks then find it made.
    """
    check_run_layout(config, world_size)
    shapes = logical_shapes(config.model)
    if not any(settings_of(n, shape, config.optimizer, config.model) for n, shape in shapes.items()):
        raise ConfigError(
            "optimizer.towers and optimizer.groups freeze every weight: nothing is left to train; "
            "set frozen = false for one of " + ", ".join(sorted(set(map(tower_of, shapes))))
        )
    remote = config.data.remote_in_training
    for command in filter(None, map(command_of, config.data.paths)):
        print(f"runs a command for each file of the data: {command}", flush=True)
    sources = [
        (open_tokens(config, f"data.train[{i}].path", s.path, remote), s.weight)
        for i, s in enumerate(config.data.train)
    ]
    _check_named_once([source for source, _ in sources])
    if config.data.heldout is not None:
        heldout = open_tokens(config, "data.heldout", config.data.heldout, remote)
        _check_held_out([source for source, _ in sources], heldout)
        _check_last_documents(config, heldout)
        sources.append((heldout, 1.0))
    # Beside each other: held-out ids must mean what training ids mean.
    Stream(
        sources,
        seed=config.seed,
        context_tokens=config.model.context_tokens,
        sequences_per_step=config.sequences_per_step,
        max_too_long_frac=config.data.max_too_long_frac,
    )
    check_initial_weights(config, sources[0][0].vocabulary.sizes, sources[0][0].fingerprints)
    if config.every_steps.samples or config.evaluate.generate:
        _check_samples(config, sources[0][0], sources[-1][0])


def _check_samples(config: RunConfig, train: TokenSource, heldout: TokenSource) -> None:
    """Raise ConfigError if what the model writes could not be decoded, or its facts not be judged."""
    tokenizers = tokenizers_of_run(config.run_dir, config, None)
    if documents := config.evaluate.generate:
        try:
            context = config.model.context_tokens
            fact_prompts(heldout, tokenizers, documents=documents, context_tokens=context)
            check_utterances(train, tokenizers)
        except ConfigError as error:
            raise ConfigError(f"evaluate.generate = {documents}: {error}") from None


def _check_last_documents(config: RunConfig, heldout: TokenSource) -> None:
    """Raise ConfigError if the last evaluation is to read more documents than there are."""
    wanted = config.evaluate.last_documents
    if wanted is not None and wanted > heldout.num_documents:
        raise ConfigError(
            f"evaluate.last_documents = {wanted}, but data.heldout = {heldout.folder} holds "
            f"{heldout.num_documents} documents; ask for at most these, or hold out more"
        )


def _check_named_once(train: Sequence[TokenSource]) -> None:
    """Raise ConfigError if two sources hold the same shards, whatever their folders are called."""
    for (i, one), (j, other) in combinations(enumerate(train), 2):
        if one.shard_hashes == other.shard_hashes:
            raise ConfigError(
                f'data.train[{j}].path = "{other.folder}" holds the same shards (sha256) as '
                f'data.train[{i}].path = "{one.folder}"; name them once, with the sum of the weights'
            )


def _check_held_out(train: Sequence[TokenSource], heldout: TokenSource) -> None:
    """Raise ConfigError if a held-out shard is trained on: its loss would say what the model remembers."""
    for i, source in enumerate(train):
        if shared := source.shard_hashes & heldout.shard_hashes:
            name = next(entry["name"] for entry in heldout.manifest["shards"] if entry["sha256"] in shared)
            raise ConfigError(
                f'data.heldout = "{heldout.folder}" holds {len(shared)} shards of data.train[{i}].path = '
                f'"{source.folder}" (sha256; the first is {name}): the held-out loss would be one of '
                f"training data; name another folder, or take data.heldout out"
            )


def _check_vectors(config: RunConfig, where: str, vocabulary: Vocabulary) -> None:
    """Raise ConfigError unless the same modalities are vectors in data and model, of the same features."""
    for modality in vocabulary.modalities:
        form, own = vocabulary.vectors.get(modality), config.model.vectors.get(modality)
        if form is None and own is not None:
            raise ConfigError(
                f"{where} holds ids of {modality}, but model.vectors.{modality} is set; take that table out, "
                "or name data of vectors"
            )
        if form is not None and (own is None or own.features != form.features):
            stands = "is not set" if own is None else f"has features = {own.features}"
            raise ConfigError(
                f"{where} holds vectors of {form.features} features for {modality}, but model.vectors."
                f"{modality} {stands}; set model.vectors.{modality}.features={form.features}"
            )


def open_tokens(
    config: RunConfig, field: str, folder: str, remote: RemoteSettings | None = None
) -> TokenSource:
    """The token shards of `folder`, whose ids the model knows. `remote`: None stands for config.data.remote.
    Raises ConfigError, which names `field`."""
    location = typed_location(folder)
    where = f'{field} = "{location if isinstance(location, Path) else shown(location)}"'
    if isinstance(location, Path) and not location.is_dir():
        raise ConfigError(
            f"{where}: no such folder (paths are relative to {Path.cwd()}); "
            f"`motley tokenize` writes folders of token shards"
        )
    try:
        source = TokenSource.open(folder, remote or config.data.remote)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    vocabulary = source.vocabulary
    if vocabulary.modalities != config.model.modalities:
        raise ConfigError(
            f"{where} holds the modalities {', '.join(vocabulary.modalities)}, but model.towers names "
            f"{', '.join(config.model.modalities)}; model.towers must name a tower for each of the data's "
            "modalities, in their order, and for no other"
        )
    _check_vectors(config, where, vocabulary)
    if vocabulary.size > config.model.vocab_tokens:
        sizes = " + ".join(f"{size} {name}" for name, size in vocabulary.sizes.items())
        raise ConfigError(
            f"{where} has a vocabulary of {vocabulary.size} ids ({sizes}), but model.vocab_tokens = "
            f"{config.model.vocab_tokens}; set model.vocab_tokens={vocabulary.size} or more"
        )
    return source
