"""What must fit together before a run starts: config, layout, data and initial weights. Imports no torch."""

from pathlib import Path

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.stream import Stream
from pretrain.config import RunConfig, check_run_layout
from pretrain.models.accounting import module_costs
from pretrain.weights.warm_start import check_initial_weights


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError, one message that says what to change, for a run that could not start.

    Opens every source once, which makes the index of one that has none: ranks then find it made.
    """
    check_run_layout(config, world_size)
    shards = {name for cost in module_costs(config.model).values() for name in cost.parameters}
    if all(name in config.optimizer.towers and config.optimizer.towers[name].frozen for name in shards):
        raise ConfigError(
            "optimizer.towers freezes every tower that has weights: nothing is left to train; "
            "set frozen = false for one of " + ", ".join(sorted(shards))
        )
    sources = [
        (_open(config, f"data.train[{i}].path", s.path), s.weight) for i, s in enumerate(config.data.train)
    ]
    if config.data.heldout is not None:
        sources.append((_open(config, "data.heldout", config.data.heldout), 1.0))
    # Beside each other: held-out ids must mean what training ids mean.
    Stream(
        sources,
        seed=config.seed,
        context_tokens=config.model.context_tokens,
        sequences_per_step=config.sequences_per_step,
    )
    check_initial_weights(config, sources[0][0].vocabulary.sizes)


def _open(config: RunConfig, field: str, folder: str) -> TokenSource:
    where = f'{field} = "{folder}"'
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{where}: no such folder (paths are relative to {Path.cwd()}); "
            f"`motley tokenize` writes folders of token shards"
        )
    try:
        source = TokenSource.open(folder)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    vocabulary = source.vocabulary
    if vocabulary.modalities != config.model.modalities:
        raise ConfigError(
            f"{where} holds the modalities {', '.join(vocabulary.modalities)}, but model.towers names "
            f"{', '.join(config.model.modalities)}; model.towers must name a tower for each of the data's "
            "modalities, in their order, and for no other"
        )
    if vocabulary.size > config.model.vocab_tokens:
        sizes = " + ".join(f"{size} {name}" for name, size in vocabulary.sizes.items())
        raise ConfigError(
            f"{where} has a vocabulary of {vocabulary.size} ids ({sizes}), but model.vocab_tokens = "
            f"{config.model.vocab_tokens}; set model.vocab_tokens={vocabulary.size} or more"
        )
    return source
