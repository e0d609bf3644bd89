"""Warm starts: a model begins with the weights of an equal model, or of one with fewer towers or ids.

A tower of the new model starts as a copy of the tower that served its modality before, so a model that gains
towers computes at its first step what its source computed. Towers are never merged, and nothing shrinks.

The embedding rows of new ids are drawn at random, because equal rows could not be told apart. Their head rows
are the mean of the copied rows. By Jensen's inequality a token of mean logit is no likelier than the average
token, so n new ids beside m raise a loss by at most log(1 + n / m) nats, whereas rows near zero could take
almost all of the probability (Hewitt 2021, "Initializing New Word Embeddings"). A head that has the
embedding's weights gets such rows too: the loss tells them apart in the first step, since each is the target
of its own id.

A model whose head has the embedding's weights may become one whose head has its own, which starts as a copy.
The other way round one of the two would be dropped, so it is refused.

Depth routers that the source lacks are drawn at random. Their gates are 1 (zero_init) or within some 2 % of
it, so the tokens that run are computed as in the source. Routers that the target lacks are dropped.

Importing this module imports no torch.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import Vocabulary
from pretrain.config import RunConfig
from pretrain.data_manifest import data_name
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import Layer, layers, logical_shapes
from pretrain.models.rope_config import RopeScalingConfig
from pretrain.models.vectors_config import VectorsConfig
from pretrain.run_files import CHECKPOINTS
from pretrain.weights.folder import LazyTensor, WeightSource, check_tensors, find_corruption, open_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from parallel.world import World

_SAME = {
    "num_layers": "num_layers", "d_model": "d_model", "num_heads": "num_heads", "num_kv_heads": "kv_heads",
    "head_size": "head_dim", "ffn_hidden": "ffn_width", "norm_placement": "norm_placement",
    "qk_norm": "qk_norm", "norm_eps": "norm_eps", "rope_theta": "rope_theta", "mup_base_width": "base_width",
    "norm": "norm", "qk_norm_eps": "query_key_eps", "qkv_bias": "qkv_bias", "rope_scaling": "rope_scaling",
}  # fmt: skip
"""Key of [model] -> attribute that must be equal in source and target, since it decides what weights mean."""

Rows = list[tuple[int, int, int]]
"""List of (first row in the source, first row in the target, number of rows)."""


def adapt_weights(
    source: WeightSource,
    target: ModelConfig,
    *,
    seed: int,
    new_towers: Mapping[str, str],
    vocabulary: Mapping[str, int] | None,
) -> WeightSource:
    """The weights of `source`, adapted to the model `target` and read when they are needed.

    `new_towers`: by tower of the target, the tower of the source that it starts as, if the modalities do not
    decide that. `vocabulary`: number of ids per modality of the target's data, if known. Raises ConfigError
    if the weights cannot be adapted.
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
            if layer.part == "vectors":
                tensors[name] = _adapter(source, layer, target, seed)
                continue
            tensor = source.tensors[_shard(source, layer, origins, shard)]
            if layer.of_vocabulary:
                tensor = _grown(tensor, layer, shard, rows, target, seed)
            tensors[name] = tensor
    adapted = replace(source, model=target, tensors=tensors, vocabulary=vocabulary or source.vocabulary)
    # Thresholds are of scores of the same routers in the same layers.
    same = (source.model.depth, source.model.depth_block) == (target.depth, target.depth_block)
    return adapted if same else replace(adapted, routing_state=None)


def initial_weights(config: RunConfig) -> Path | None:
    """The folder of weights that the run will begin with; None if it begins otherwise or has begun."""
    if config.initial_weights is None or any((config.run_dir / CHECKPOINTS).glob("step_*")):
        return None
    return Path(config.initial_weights)


def check_initial_weights(
    config: RunConfig, vocabulary: Mapping[str, int], tokenizers: Mapping[str, str]
) -> None:
    """Raise ConfigError unless `initial_weights` fit the run's model, the `vocabulary` of its data, and the
    fingerprints of its tokenizers.

    Only headers are read. Nothing is checked if the run will not read the weights.
    """
    if (folder := initial_weights(config)) is None:
        return
    try:
        source = open_weights(folder)
        _check_model(source, config.model)
        new = _new_weights(source.tensors, config.model)
        expected = {name: shape for name, shape in logical_shapes(config.model).items() if name not in new}
        check_tensors(folder, source.tensors, expected, "this run's model")
        of_source = [list((source.vocabulary or vocabulary).items()), list(source.model.towers.items())]
        if of_source != (of_run := [list(vocabulary.items()), list(config.model.towers.items())]):
            raise ConfigError(f"made for ids and towers {of_source}, the run has {of_run}")
        check_fingerprints(source, tokenizers, data_name(config))
    except ConfigError as error:
        raise ConfigError(
            f'initial_weights = "{folder}": {error}. '
            "`motley import RUN.toml SRC OUT` makes weights for exactly a run's model from others"
        ) from None


def check_fingerprints(source: WeightSource, of_data: Mapping[str, str], data: str) -> None:
    """Raise ConfigError if weights were trained on ids of other tokenizers than those of the data."""
    for modality, fingerprint in (source.tokenizers or {}).items():
        if of_data.get(modality, fingerprint) != fingerprint:
            raise ConfigError(
                f"{source.path}: trained on ids of the {modality} tokenizer {fingerprint}, but those of "
                f"{data} are of {of_data[modality]}: the same ids mean other things. Tokenize the data with "
                "the tokenizers of that run (tokenizers_from)"
            )


def load_weights(folder: Path, parameters: Iterable[tuple[str, "nn.Parameter"]], world: "World") -> None:
    """Fill this rank's parameters, named as in the whole decoder, from a folder of weights.

    Depth routers and adapters of vectors that the folder lacks keep their values. All ranks call it. They
    share the check of the files' content; then a rank maps the files and reads its own slices. Raises
    ConfigError.
    """
    import torch

    from parallel.logical import logical_of

    tensors = open_weights(folder).tensors
    shares = world.gather(find_corruption(folder, slice(world.rank, None, world.world_size)))
    if problems := [problem for share in shares for problem in share]:
        raise ConfigError("\n".join(problems))
    with torch.no_grad():
        for name, parameter in parameters:
            if name not in tensors:  # check_initial_weights allows only new ones to be missing
                continue
            parameter.copy_(logical_of(parameter).cut(tensors[name].read(), world.tp_rank, world.tp_size))


def _check_model(source: WeightSource, target: ModelConfig) -> None:
    """Raise ConfigError if the weights mean something else in the target, or if the target has fewer ids."""
    pairs = {key: (getattr(target, name), getattr(source.model, name)) for key, name in _SAME.items()}
    if target.experts != source.model.experts:
        of_towers = [f"{tower}: {e.num_experts}" for tower, e in source.model.experts.items()]
        raise ConfigError(
            f"{source.path} is another model: its model.experts are {', '.join(of_towers) or 'none'}; "
            "experts are neither made of other weights nor dropped: make model.experts equal, or start "
            "without them"
        )
    for modality, theirs in source.model.vectors.items():
        ours = target.vectors.get(modality)
        if ours is None or (theirs.learns and _goal(ours) != _goal(theirs)):
            raise ConfigError(
                f"{source.path} is another model: its model.vectors.{modality} learned {theirs.objective} "
                f"({theirs.predicted}); set the same objective and prediction"
            )
    changed = {key: (new, old) for key, (new, old) in pairs.items() if new != old}
    if target.tied_embeddings and not source.model.tied_embeddings:
        changed["tied_embeddings"] = (True, False)
    if changed:
        listed = "; ".join(
            f"model.{key} = {_toml(new)}, there {_toml(old)}" for key, (new, old) in changed.items()
        )
        fix = " ".join(
            f"model.{key}={_toml(old).lower()}" for key, (_, old) in changed.items() if old is not None
        )
        left_out = [f"model.{key}" for key, (_, old) in changed.items() if old is None]
        told = [f"set {fix}"] * bool(fix) + [f"leave out {', '.join(left_out)}"] * bool(left_out)
        raise ConfigError(f"{source.path} is another model: {listed}. For its weights {' and '.join(told)}")
    if target.vocab_tokens < (rows := source.model.vocab_tokens):
        raise ConfigError(
            f"model.vocab_tokens = {target.vocab_tokens}, but {source.path} has rows for {rows} ids, and "
            f"ids are never dropped: set model.vocab_tokens={rows} or more"
        )


def _goal(vectors: VectorsConfig) -> tuple[str, str]:
    """What the adapters of a modality were trained to predict."""
    return vectors.objective, vectors.predicted


def _toml(value: object) -> str:
    """The value of a key of [model] for a message; a table as TOML has it inline."""
    if not isinstance(value, RopeScalingConfig):
        return "none" if value is None else str(value)
    keys = value.model_dump(exclude_none=True).items()
    return "{" + ", ".join(f"{key} = {json.dumps(each)}" for key, each in keys) + "}"


def _origins(source: WeightSource, target: ModelConfig, new_towers: Mapping[str, str]) -> dict[str, set[str]]:
    """By tower of the target, the towers of the source that it starts as; several must share weights."""
    source_towers, names = source.model.towers, source.model.tower_names
    if lost := [modality for modality in source_towers if modality not in target.towers]:
        raise ConfigError(
            f"{source.path} serves {', '.join(source_towers)}, but model.towers leaves out "
            f"{', '.join(lost)}; "
            "modalities are never dropped"
        )
    served = {
        tower: {source_towers[m] for m, name in target.towers.items() if name == tower and m in source_towers}
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
    """The name of the source's tensor that a shard of the target's layer starts as."""
    if layer.part == "head" and source.model.tied_embeddings:
        layer = replace(layer, stem="embedding.weight", part="embedding")
    source_names = layer.names(source.model)
    possible = set(source_names) if len(source_names) == 1 else origins.get(shard, set(source_names))
    if len(possible) > 1:
        raise ConfigError(
            f"{source.path} has {layer.part} weights for each of {', '.join(source_names)}, the target one "
            f'for several of them ("{shard}"); towers cannot be merged: keep them apart in model.towers '
            "and model.untied"
        )
    return source_names[next(iter(possible))]


def _router(source: WeightSource, layer: Layer, target: ModelConfig, seed: int) -> LazyTensor:
    """The router of the source, of any tower, or a new one if the source has none."""
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


def _adapter(source: WeightSource, layer: Layer, target: ModelConfig, seed: int) -> LazyTensor:
    """The weight or bias of an adapter of vectors: the source's, whatever tower it counts to, or a new
    one."""
    for name, tensor in source.tensors.items():
        if name.startswith(f"{layer.stem}."):
            if tensor.shape != layer.shape:
                raise ConfigError(
                    f"{source.path}: {name} has the shape {list(tensor.shape)}, model.vectors asks for "
                    f"{list(layer.shape)}; set the features of its vectors"
                )
            return tensor

    def read() -> "Tensor":
        import torch

        from pretrain.models.initial_weights import InitialWeights

        weight, (adapter, _, kind) = torch.zeros(layer.shape), layer.stem.rpartition(".")
        if kind == "weight":
            InitialWeights.of(target, seed).adapter(adapter)(weight, "")
        return weight

    return LazyTensor(layer.shape, read)


def _new_weights(tensors: Mapping[str, LazyTensor], target: ModelConfig) -> set[str]:
    """The names of the target's depth routers and adapters of vectors that are not among `tensors`."""
    new = (layer for layer in layers(target) if layer.part in ("depth", "vectors"))
    return {name for layer in new for name in layer.names(target).values()} - tensors.keys()


def _rows(source: WeightSource, target: ModelConfig, vocabulary: Mapping[str, int] | None) -> Rows:
    """The rows of the target's embedding and head that the source's rows go to; ids keep their meaning."""
    old, modalities = source.vocabulary, source.model.modalities
    in_place = [(0, 0, source.model.vocab_tokens)]
    if old is None or vocabulary is None:
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
    if list(old.items()) == list(vocabulary.items()):
        return in_place
    if fewer := [name for name, size in old.items() if size > vocabulary.get(name, 0)]:
        raise ConfigError(
            f"{source.path} was trained on ids {dict(old)}, the data of this run has {dict(vocabulary)}: "
            f"fewer of {', '.join(fewer)}; ids are never dropped: tokenize with the tokenizers of that run"
        )
    before, after = Vocabulary(sizes=dict(old)), Vocabulary(sizes=dict(vocabulary))
    return [(before.start(name), after.start(name), size) for name, size in old.items()]


def _grown(
    tensor: LazyTensor, layer: Layer, shard: str, rows: Rows, target: ModelConfig, seed: int
) -> LazyTensor:
    """A shard of the target's embedding or head: copied rows, and rows of new ids."""
    if rows == [(0, 0, target.vocab_tokens)]:
        return tensor

    def read() -> "Tensor":
        import torch

        from pretrain.models.initial_weights import InitialWeights

        old_rows = tensor.read()
        copied = [old_rows[start : start + count].float() for start, _, count in rows]
        if layer.part == "embedding" and not target.tied_embeddings:
            whole = torch.empty(layer.shape)
            InitialWeights.of(target, seed).normal("embedding")(whole, shard)
        else:
            whole = torch.cat(copied).mean(0).expand(layer.shape).clone()
        for (_, start, count), piece in zip(rows, copied, strict=True):
            whole[start : start + count] = piece
        return whole

    return LazyTensor(layer.shape, read)
