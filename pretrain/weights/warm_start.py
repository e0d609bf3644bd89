"""Weights of one model as the start of another: the same, or with more towers or a larger vocabulary.

Each tower of the new model starts as a copy of the tower that served its modality before, so a model that
gains towers computes at its first step what its source computed. Nothing is merged and nothing shrinks.

New ids: their rows of the embedding are those of a fresh start, for with one row for all they could not be
told apart; their rows of the head are the mean of the copied ones. By Jensen's inequality a token of mean
logit is no likelier than the average one, so n new ids beside m raise a loss by at most log(1 + n / m) nats,
where rows near zero could take almost all of the probability (Hewitt 2021, "Initializing New Word
Embeddings").

Depth routers that the source has not are those of a fresh start: a model that gains them computes for
tokens that run, with gates of 1 (zero_init) or within some 2 % of it, what its source computed. Routers that
the target has not are left behind.

Importing this file imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import Vocabulary
from pretrain.config import RunConfig
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import Layer, layers, logical_shapes
from pretrain.run_files import CHECKPOINTS
from pretrain.weights.folder import LazyTensor, WeightSource, check_tensors, find_corruption, open_weights

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
    source: WeightSource,
    target: ModelConfig,
    *,
    seed: int,
    new_towers: Mapping[str, str],
    vocabulary: Mapping[str, int] | None,
) -> WeightSource:
    """`source`'s weights for exactly the model `target`, read when they are needed.

    `new_towers`: tower of the target -> tower of the source that it starts as, where that does not follow
    from the modalities. `vocabulary`: ids per modality of the data that the target will read, if known.
    Raises ConfigError where the target cannot be had.
    """
    _check_model(source, target)
    if target.experts:
        raise ConfigError(
            f"{source.path}: model.experts.{next(iter(target.experts))}: weights of experts are read as they "
            "are, by the same model; name them in initial_weights, or leave experts out"
        )
    origins = _origins(source, target, new_towers)
    rows = _rows(source, target, vocabulary)
    tensors = {}
    for layer in layers(target):
        for shard, name in layer.names(target).items():
            if layer.part == "depth":
                tensors[name] = _router(source, layer, target, seed)
                continue
            tensor = source.tensors[_shard(source, layer, origins, shard)]
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
        _check_model(source, config.model)
        new = _new_routers(source.tensors, config.model)
        wanted = {name: shape for name, shape in logical_shapes(config.model).items() if name not in new}
        check_tensors(folder, source.tensors, wanted, "this run's model")
        theirs = [list((source.vocabulary or vocabulary).items()), list(source.model.towers.items())]
        if theirs != (ours := [list(vocabulary.items()), list(config.model.towers.items())]):
            raise ConfigError(f"made for ids and towers {theirs}, the run has {ours}")
    except ConfigError as error:
        raise ConfigError(
            f'initial_weights = "{folder}": {error}. '
            "`motley import RUN.toml SRC OUT` makes weights for exactly a run's model from others"
        ) from None


def load_weights(folder: Path, parameters: Iterable[tuple[str, "nn.Parameter"]], world: "World") -> None:
    """Fill this rank's parameters, named as in the whole decoder, from a folder of weights. Depth routers
    that it has not stay as they are.

    Each rank maps the files and reads its own slices. All ranks call it: first they check the content of the
    files together, each its share. Raises ConfigError.
    """
    import torch

    from parallel.logical import logical_of

    tensors = open_weights(folder).tensors
    shares = world.gather(find_corruption(folder, slice(world.rank, None, world.world_size)))
    if problems := [problem for share in shares for problem in share]:
        raise ConfigError("\n".join(problems))
    with torch.no_grad():
        for name, parameter in parameters:
            if name not in tensors:  # check_initial_weights lets nothing but new routers be missing
                continue
            parameter.copy_(logical_of(parameter).cut(tensors[name].read(), world.tp_rank, world.tp_size))


def _check_model(source: WeightSource, target: ModelConfig) -> None:
    pairs = {key: (getattr(target, name), getattr(source.model, name)) for key, name in _SAME.items()}
    if target.experts != source.model.experts:
        of_towers = [f"{tower}: {e.num_experts}" for tower, e in source.model.experts.items()]
        raise ConfigError(
            f"{source.path} is another model: its model.experts are {', '.join(of_towers) or 'none'}; "
            "experts are neither made of other weights nor dropped: make model.experts equal, or start "
            "without them"
        )
    changed = {key: (ours, theirs) for key, (ours, theirs) in pairs.items() if ours != theirs}
    if changed:
        told = "; ".join(f"model.{key} = {ours}, there {theirs}" for key, (ours, theirs) in changed.items())
        fix = " ".join(f"model.{key}={str(theirs).lower()}" for key, (_, theirs) in changed.items())
        raise ConfigError(f"{source.path} is another model: {told}. For its weights set {fix}")
    if target.vocab_tokens < (rows := source.model.vocab_tokens):
        raise ConfigError(
            f"model.vocab_tokens = {target.vocab_tokens}, but {source.path} has rows for {rows} ids; none is "
            f"ever dropped: set model.vocab_tokens={rows} or more"
        )


def _origins(source: WeightSource, target: ModelConfig, new_towers: Mapping[str, str]) -> dict[str, set[str]]:
    """Tower of the target -> towers of the source that it starts as: several only if they share weights."""
    theirs, names = source.model.towers, source.model.tower_names
    if lost := [modality for modality in theirs if modality not in target.towers]:
        raise ConfigError(
            f"{source.path} serves {', '.join(theirs)}, but model.towers leaves out {', '.join(lost)}; "
            "modalities are never dropped"
        )
    served = {
        tower: {theirs[m] for m, name in target.towers.items() if name == tower and m in theirs}
        for tower in target.tower_names
    }
    new = [tower for tower, by in served.items() if not by]
    wrong = {tower: name for tower, name in new_towers.items() if tower not in new or name not in names}
    if wrong or (len(names) > 1 and (wrong := {tower: "..." for tower in new if tower not in new_towers})):
        tower, name = next(iter(wrong.items()))
        raise ConfigError(
            f"--new-tower {tower}={name}: say for each tower of model.towers that serves no modality of "
            f"{source.path} ({', '.join(new) or 'there is none'}) which of its towers it starts as: "
            f"{', '.join(names)}"
        )
    return served | {tower: {new_towers.get(tower, next(iter(names)))} for tower in new}


def _shard(source: WeightSource, layer: Layer, origins: Mapping[str, set[str]], shard: str) -> str:
    """The source's name of what a shard of the target's layer starts as."""
    theirs = layer.names(source.model)
    possible = set(theirs) if len(theirs) == 1 else origins.get(shard, set(theirs))
    if len(possible) > 1:
        raise ConfigError(
            f"{source.path} has {layer.part} weights for each of {', '.join(theirs)}, the target one "
            f'for several of them ("{shard}"); towers cannot be merged: keep them apart in model.towers '
            "and model.untied"
        )
    return theirs[next(iter(possible))]


def _router(source: WeightSource, layer: Layer, target: ModelConfig, seed: int) -> LazyTensor:
    """The source's own, of whichever tower it was, or a new one."""
    for name, tensor in source.tensors.items():
        if name.startswith(f"{layer.stem}."):
            return tensor
    modality = layer.stem.split(".")[3]

    def read() -> "Tensor":
        import torch

        from pretrain.models.initial_weights import InitialWeights

        weight = torch.empty(layer.shape)
        zero = target.depth[modality].zero_init
        InitialWeights.of(target, seed).depth_router(layer.stem, zero=zero)(weight)
        return weight

    return LazyTensor(layer.shape, read)


def _new_routers(tensors: Mapping[str, LazyTensor], target: ModelConfig) -> set[str]:
    """Depth routers of the target that are not among `tensors`."""
    routers = {n for layer in layers(target) if layer.part == "depth" for n in layer.names(target).values()}
    return routers - tensors.keys()


def _rows(source: WeightSource, target: ModelConfig, vocabulary: Mapping[str, int] | None) -> Rows:
    """Where the source's rows of embedding and head go: an id keeps its meaning."""
    theirs, modalities = source.vocabulary, source.model.modalities
    in_place = [(0, 0, source.model.vocab_tokens)]
    if theirs is None or vocabulary is None:
        if target.modalities[: len(modalities)] != modalities:
            raise ConfigError(
                f"{source.path} holds ids of {', '.join(modalities)}, model.towers of "
                f"{', '.join(target.modalities)}: some have moved, and where to is known only with the "
                "tokenized data of both, where data.train says: at `motley export` and at `motley import`"
            )
        return in_place
    if (ids := sum(vocabulary.values())) > target.vocab_tokens:
        raise ConfigError(
            f"model.vocab_tokens = {target.vocab_tokens}, data has {ids} ids: set model.vocab_tokens={ids}"
        )
    if list(theirs.items()) == list(vocabulary.items()):
        return in_place
    if fewer := [name for name, size in theirs.items() if size > vocabulary.get(name, 0)]:
        raise ConfigError(
            f"{source.path} was trained on ids {dict(theirs)}, the data of this run has {dict(vocabulary)}: "
            f"fewer of {', '.join(fewer)}; ids are never dropped: tokenize with the tokenizers of that run"
        )
    before, after = Vocabulary(sizes=dict(theirs)), Vocabulary(sizes=dict(vocabulary))
    return [(before.start(name), after.start(name), size) for name, size in theirs.items()]


def _grown(tensor: LazyTensor, layer: Layer, rows: Rows, target: ModelConfig, seed: int) -> LazyTensor:
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

    return LazyTensor(layer.shape, read)
