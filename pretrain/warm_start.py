"""Weights of one model as the start of another: the same, or with more towers or a larger vocabulary.

Each tower of the new model starts as a copy of the tower that served its modality before, so a model that
gains towers computes at its first step what its source computed. Nothing is merged and nothing shrinks.

New ids: their rows of the embedding are those of a fresh start, for with one row for all they could not be
told apart; their rows of the head are the mean of the copied ones. By Jensen's inequality a token of mean
logit is no likelier than the average one, so n new ids beside m raise a loss by at most log(1 + n / m) nats,
where rows near zero could take almost all of the probability (Hewitt 2021, "Initializing New Word
Embeddings").

Importing this file imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.toml_config import ConfigError
from pretrain.config import RunConfig
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import Layer, layers, logical_shapes
from pretrain.run_dir import CHECKPOINTS
from pretrain.weights import Lazy, Source, check_tensors, damage, open_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from parallel.world import World

_SAME = {
    "num_layers": "num_layers", "d_model": "d_model", "num_heads": "num_heads", "num_kv_heads": "kv_heads",
    "head_size": "head_dim", "ffn_hidden": "ffn_width", "norm_placement": "norm_placement",
    "qk_norm": "qk_norm", "norm_eps": "norm_eps", "rope_theta": "rope_theta",
}  # fmt: skip
"""Key of [model] -> attribute that decides what weights mean, and that no mapping changes."""

Rows = list[tuple[int, int, int]]
"""(first row in the source, first row in the target, how many)."""


def fit(
    source: Source,
    target: ModelConfig,
    *,
    seed: int,
    new_towers: Mapping[str, str],
    vocabulary: Mapping[str, int] | None,
) -> Source:
    """`source`'s weights for exactly the model `target`, read when they are needed.

    `new_towers`: tower of the target -> tower of the source that it starts as, where that does not follow
    from the modalities. `vocabulary`: ids per modality of the data that the target will read, if known.
    Raises ConfigError where the target cannot be had.
    """
    _check_shape(source, target)
    origin = _origins(source, target, new_towers)
    rows = _rows(source, target, vocabulary)
    stems = {layer.stem: layer.names(source.model) for layer in layers(source.model)}
    tensors = {}
    for layer in layers(target):
        for shard, name in layer.names(target).items():
            tensor = source.tensors[stems[layer.stem][_shard(source, layer, target, origin, shard)]]
            tensors[name] = tensor if layer.part else _grown(tensor, layer, rows, target, seed)
    return replace(source, model=target, tensors=tensors, vocabulary=vocabulary or source.vocabulary)


def initial_weights(config: RunConfig) -> Path | None:
    """The folder that the run will read its weights from: none once it has a checkpoint."""
    if config.initial_weights is None or any((config.run_dir / CHECKPOINTS).glob("step_*")):
        return None
    return Path(config.initial_weights)


def check_initial_weights(config: RunConfig, vocabulary: Mapping[str, int]) -> None:
    """Raise ConfigError unless `initial_weights`, if they will be read, are those of the run's model and of
    its data's `vocabulary`. Looks at headers only."""
    if (folder := initial_weights(config)) is None:
        return
    try:
        source = open_weights(folder)
        _check_shape(source, config.model)
        check_tensors(folder, source.tensors, logical_shapes(config.model), "this run's model")
        if source.model.towers != config.model.towers:
            raise ConfigError(
                f"{folder} has towers {source.model.towers}, model.towers = {config.model.towers}"
            )
        if source.vocabulary is not None and list(source.vocabulary.items()) != list(vocabulary.items()):
            raise ConfigError(
                f"{folder} was made for a vocabulary of {_sizes(source.vocabulary)} ids, the data has "
                f"{_sizes(vocabulary)}"
            )
    except ConfigError as error:
        raise ConfigError(
            f'initial_weights = "{folder}": {error}. '
            "`motley import RUN.toml SRC OUT` makes weights for exactly a run's model from others"
        ) from None


def load_weights(folder: Path, parameters: Iterable[tuple[str, "nn.Parameter"]], world: "World") -> None:
    """Fill this rank's parameters, named as in the whole decoder, from a folder of weights.

    Each rank maps the files and reads its own slices. All ranks call it: first they check the content of the
    files together, each its share. Raises ConfigError.
    """
    import torch

    from parallel.logical import logical_of

    tensors = open_weights(folder).tensors
    shares = world.gather(damage(folder, slice(world.rank, None, world.world_size)))
    if problems := [problem for share in shares for problem in share]:
        raise ConfigError("\n".join(problems))
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(logical_of(parameter).cut(tensors[name].read(), world.tp_rank, world.tp_size))


def _check_shape(source: Source, target: ModelConfig) -> None:
    changed = [
        (key, getattr(target, attribute), getattr(source.model, attribute))
        for key, attribute in _SAME.items()
        if getattr(target, attribute) != getattr(source.model, attribute)
    ]
    if changed:
        told = "; ".join(f"model.{key} = {ours}, there {theirs}" for key, ours, theirs in changed)
        fix = " ".join(f"model.{key}={str(theirs).lower()}" for key, _, theirs in changed)
        raise ConfigError(f"{source.path} is another model: {told}. For its weights set {fix}")
    if target.vocab_tokens < source.model.vocab_tokens:
        raise ConfigError(
            f"model.vocab_tokens = {target.vocab_tokens}, but {source.path} has rows for "
            f"{source.model.vocab_tokens} ids; rows are never dropped: "
            f"set model.vocab_tokens={source.model.vocab_tokens} or more"
        )


def _origins(source: Source, target: ModelConfig, new_towers: Mapping[str, str]) -> dict[str, str]:
    """Tower of the target -> tower of the source that it starts as."""
    theirs = source.model.towers
    if lost := [modality for modality in theirs if modality not in target.towers]:
        raise ConfigError(
            f"{source.path} serves {', '.join(theirs)}, but model.towers leaves out {', '.join(lost)}; "
            "modalities are never dropped"
        )
    origins = {}
    for tower in target.tower_names:
        served = {theirs[m] for m, name in target.towers.items() if name == tower and m in theirs}
        if len(served) > 1:
            origins[tower] = ""  # legal where the source has one shard for all of them: see _shard
        elif served:
            origins[tower] = served.pop()
        elif tower in new_towers:
            origins[tower] = new_towers[tower]
        elif len(source.model.tower_names) == 1:
            origins[tower] = source.model.tower_names[0]
        else:
            raise ConfigError(
                f'model.towers: "{tower}" is new and {source.path} has several towers; say which one it '
                f"starts as: --new-tower {tower}=TOWER, TOWER one of {', '.join(source.model.tower_names)}"
            )
    for tower, name in new_towers.items():
        if origins.get(tower) != name or name not in source.model.tower_names:
            new = [
                t
                for t in target.tower_names
                if not any(m in theirs for m, o in target.towers.items() if o == t)
            ]
            raise ConfigError(
                f"--new-tower {tower}={name}: NEW must be a tower that serves no modality of {source.path} "
                f"({', '.join(new) or 'there is none'}), and be given one of its towers "
                f"({', '.join(source.model.tower_names)})"
            )
    return origins


def _shard(source: Source, layer: Layer, target: ModelConfig, origin: Mapping[str, str], shard: str) -> str:
    """The source's shard that a shard of the target's layer starts as."""
    theirs = list(layer.names(source.model))
    if len(theirs) == 1:
        return theirs[0]
    if origin.get(shard):
        return origin[shard]
    raise ConfigError(
        f"{source.path} has its {layer.part} weights once for each of {', '.join(theirs)}, the target "
        f'one for several of them ("{shard}"); towers cannot be merged: keep them apart in model.towers and '
        "model.untied"
    )


def _rows(source: Source, target: ModelConfig, vocabulary: Mapping[str, int] | None) -> Rows:
    """Where the source's rows of embedding and head go: an id keeps its meaning."""
    theirs = source.vocabulary
    in_place = [(0, 0, source.model.vocab_tokens)]
    if theirs is None or vocabulary is None:
        if target.modalities[: len(source.model.modalities)] != source.model.modalities:
            raise ConfigError(
                f"{source.path} holds ids of {', '.join(source.model.modalities)}, model.towers of "
                f"{', '.join(target.modalities)}: some have moved, and where to is known only if both "
                "vocabularies are; let data.train name the tokenized data, and import what "
                "`motley export` wrote beside its data"
            )
        return in_place
    if list(theirs.items()) == list(vocabulary.items()):
        return in_place
    rows, ours = [], _starts(vocabulary)
    for modality, start in _starts(theirs).items():
        if theirs[modality] > vocabulary.get(modality, 0):
            raise ConfigError(
                f"{source.path} has {theirs[modality]} {modality} ids, the data of this run "
                f"{vocabulary.get(modality, 0)}; ids are never dropped: tokenize with the tokenizers that "
                "it was trained with"
            )
        rows.append((start, ours[modality], theirs[modality]))
    return rows


def _starts(vocabulary: Mapping[str, int]) -> dict[str, int]:
    starts, end = {}, 0
    for modality, size in vocabulary.items():
        starts[modality] = end
        end += size
    return starts


def _grown(tensor: Lazy, layer: Layer, rows: Rows, target: ModelConfig, seed: int) -> Lazy:
    if rows == [(0, 0, target.vocab_tokens)]:
        return tensor

    def read() -> "Tensor":
        import torch

        from pretrain.models.initial_weights import InitialWeights

        theirs = tensor.read()
        copied = [theirs[start : start + count].float() for start, _, count in rows]
        if layer.stem == "embedding.weight":
            whole = torch.empty(layer.shape)
            InitialWeights.of(target, seed).normal("embedding")(whole)
        else:
            whole = torch.cat(copied).mean(0).expand(layer.shape).clone()
        for (_, start, count), piece in zip(rows, copied, strict=True):
            whole[start : start + count] = piece
        return whole

    return Lazy(layer.shape, read)


def _sizes(vocabulary: Mapping[str, int]) -> str:
    return " + ".join(f"{size} {name}" for name, size in vocabulary.items())
