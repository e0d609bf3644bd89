"""Which tower starts as which, where rows of the vocabulary go, and what is refused."""

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.files.toml_config import ConfigError
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.logical_weights import logical_shapes
from pretrain.models.pretraining import Pretraining
from pretrain.weights.folder import MODEL, LazyTensor, WeightSource, about_model, open_weights, write_folder
from pretrain.weights.warm_start import adapt_weights, load_weights
from tests.pretrain.models.precision import assert_close
from tests.pretrain.models.random_batch import (
    DENSE,
    IMAGE_SPEECH_SHARED,
    MOT,
    TWO_TOWERS,
    random_batch,
    tiny_config,
)

TEXT, IMAGE = {"text": "text"}, {"text": "text", "image": "image"}
VOCABULARY = {"text": 30, "image": 6, "speech": 4}


def numbered(
    towers: dict[str, str], vocabulary: Mapping[str, int] | None = None, **changes: object
) -> WeightSource:
    """Weights in which every tensor is different from every other."""
    config = tiny_config(towers, **changes)
    tensors = {
        name: LazyTensor(shape, lambda shape=shape, number=number: number + torch.rand(shape))
        for number, (name, shape) in enumerate(logical_shapes(config).items())
    }
    kept = {name: each.read() for name, each in tensors.items()}
    same = {name: LazyTensor(each.shape, lambda name=name: kept[name]) for name, each in tensors.items()}
    return WeightSource(Path("src"), config, same, "src", 5, vocabulary)


def fitted(
    source: WeightSource, towers: dict[str, str], changes: Mapping[str, Any] = {}, **how: Any
) -> WeightSource:
    settings = {"seed": 1, "new_towers": {}, "vocabulary": None} | how
    own = {key: getattr(source.model, key) for key in ("untied", "vocab_tokens")}
    return adapt_weights(source, tiny_config(towers, **(own | dict(changes))), **settings)


def check_origins(source: WeightSource, made: WeightSource, shard_of: Mapping[str, str]) -> None:
    """Every tensor of `made` is the source's of the layer and of the shard that `shard_of` says."""
    assert {name: t.shape for name, t in made.tensors.items()} == logical_shapes(made.model)
    for name, tensor in made.tensors.items():
        stem, _, shard = name.rpartition(".")
        assert torch.equal(tensor.read(), source.tensors[f"{stem}.{shard_of.get(shard, shard)}"].read()), name


KEPT = {
    "the same model": (MOT, MOT, {}, {}),
    "towers of other names": (DENSE, {m: "one" for m in DENSE}, {"one": "all"}, {}),
    "dense to MoT": (DENSE, MOT, dict.fromkeys(MOT, "all"), {}),
    "dense to two towers": (DENSE, IMAGE_SPEECH_SHARED, {"text": "all", "other": "all"}, {}),
    "text to MoT": (TEXT, MOT, dict.fromkeys(MOT, "text"), {}),
    "text to dense": (TEXT, DENSE, {"all": "text"}, {}),
    "a tower split": (IMAGE_SPEECH_SHARED, MOT, {"image": "other", "speech": "other"}, {}),
    "a tower added": (IMAGE, MOT, {"speech": "image"}, {"new_towers": {"speech": "image"}}),
    "a modality joins a tower": (TWO_TOWERS, {"text": "text", "image": "vision", "speech": "vision"},
                                 {"vision": "image"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_each_tower_starts_as_the_one_that_served_it(case: str) -> None:
    before, after, shard_of, how = KEPT[case]
    source = numbered(before)
    check_origins(source, fitted(source, after, **how), shard_of)


def test_parts_that_were_tied_are_copied_to_each_tower() -> None:
    source = numbered(MOT, untied=["feed_forward"])
    made = fitted(source, MOT, {"untied": ("attention", "feed_forward", "norm")})
    for name, tensor in made.tensors.items():
        stem, _, shard = name.rpartition(".")
        origin = shard if "feed_forward." in name else "shared"
        assert torch.equal(tensor.read(), source.tensors[f"{stem}.{origin}"].read()), name


FINER: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "tied parts to parts of towers": (
        {"untied": ["feed_forward", "qkv"]},
        {"untied": ("feed_forward", "attention", "final_norm", "embedding", "head")},
        {"attention.out": "shared", "attention.qk": "shared", "final_norm": "shared", "embedding": "shared",
         "head": "shared"},
    ),
    "one weight for embedding and head to two": (
        {"tied_embeddings": True}, {"untied": ("head", "attention", "feed_forward", "norm")},
        {"head": "embedding.weight.shared"},
    ),
    "a weight for embedding and head of every tower": (
        {"tied_embeddings": True},
        {"tied_embeddings": True, "untied": ("embedding", "head", "attention", "feed_forward", "norm")},
        {"embedding": "shared"},
    ),
}  # fmt: skip
"""Source, target, and by end of a layer's name the shard, or the tensor, that it starts as if not its own."""


@pytest.mark.parametrize("case", FINER)
def test_finer_untying_copies_what_was_coarser(case: str) -> None:
    before, after, origins = FINER[case]
    source = numbered(MOT, **before)
    made = fitted(source, MOT, {"tied_embeddings": False, **after})
    assert {name: t.shape for name, t in made.tensors.items()} == logical_shapes(made.model)
    for name, tensor in made.tensors.items():
        layer = name.rpartition(".weight.")[0]
        origin = next((origin for end, origin in origins.items() if layer.endswith(end)), None)
        theirs = name if origin is None else origin if "." in origin else f"{layer}.weight.{origin}"
        assert torch.equal(tensor.read(), source.tensors[theirs].read()), name


def test_new_ids_of_one_weight_for_embedding_and_head_are_means() -> None:
    source = numbered(MOT, tied_embeddings=True)
    made = fitted(source, MOT, {"tied_embeddings": True, "vocab_tokens": 44})
    old, new = (s.tensors["embedding.weight.shared"].read() for s in (source, made))
    assert torch.equal(new[:40], old)
    torch.testing.assert_close(new[40:], old.mean(0).expand(4, -1), rtol=1e-6, atol=0)  # sum of 40 in fp32


def test_a_dense_model_may_share_what_it_had_once() -> None:
    source = numbered(DENSE)
    made = fitted(source, MOT, {"untied": ("feed_forward",)})
    attention = "blocks.0.attention.qkv.weight"
    assert torch.equal(made.tensors[f"{attention}.shared"].read(), source.tensors[f"{attention}.all"].read())


LINEAR = {"kind": "linear", "factor": 2.0}
REFUSED: dict[str, tuple[WeightSource, dict[str, str], dict[str, Any], dict[str, Any], str]] = {
    "towers merged": (numbered(MOT), DENSE, {}, {}, r"text, image, speech, the target one .*be merged"),
    "two merged": (numbered(MOT), IMAGE_SPEECH_SHARED, {}, {}, r'\("other"\); towers cannot be merged'),
    "a part tied": (numbered(MOT), MOT, {"untied": ("norm",)}, {}, "qkv weights for each of text"),
    "an embedding of towers joined": (
        numbered(MOT, untied=["norm", "embedding"]), MOT, {"untied": ("norm",)}, {}, "has embedding weights"
    ),
    "a head of its own lost": (
        numbered(MOT), MOT, {"tied_embeddings": True}, {},
        "tied_embeddings = True, there False. For its weights set model.tied_embeddings=false",
    ),
    "a new tower of many": (
        numbered(IMAGE), MOT, {}, {}, r"--new-tower speech=\.\.\.: .*\(speech\) .*starts as: text, image",
    ),
    "from no tower of it": (
        numbered(IMAGE), MOT, {}, {"new_towers": {"speech": "audio"}},
        r"--new-tower speech=audio: .*\(speech\) .*starts as: text, image",
    ),
    "a tower that is not new": (
        numbered(IMAGE), MOT, {}, {"new_towers": {"speech": "text", "image": "text"}},
        "--new-tower image=text",
    ),
    "a tower that is nowhere": (
        numbered(TEXT), IMAGE, {}, {"new_towers": {"speech": "text"}},
        r"--new-tower speech=text: .*\(image\)",
    ),
    "a modality dropped": (numbered(MOT), IMAGE, {}, {}, "leaves out speech; modalities are never dropped"),
    "other shapes": (
        numbered(DENSE), MOT, {"ffn_hidden": 32, "qk_norm": False}, {},
        r"ffn_hidden = 32, there 24; model.qk_norm = False, there True. For its weights set "
        r"model.ffn_hidden=24 model.qk_norm=true",
    ),
    "another angle": (numbered(DENSE), MOT, {"rope_theta": 7.0}, {}, "set model.rope_theta=10000.0"),
    "angles scaled": (
        numbered(DENSE), MOT, {"qk_norm_eps": 0.1, "rope_scaling": LINEAR},
        {}, "qk_norm_eps = 0.1, there 1e-05; "
        r'model.rope_scaling = {kind = "linear", factor = 2.0}, there none. '
        "For its weights set model.qk_norm_eps=1e-05 and leave out model.rope_scaling",
    ),
    "angles not scaled": (
        numbered(DENSE, rope_scaling=LINEAR), MOT, {"rope_scaling": None}, {},
        r'For its weights set model.rope_scaling={kind = "linear", factor = 2.0}',
    ),
    "fewer ids": (numbered(DENSE), MOT, {"vocab_tokens": 39}, {}, "set model.vocab_tokens=40 or more"),
    "ids that moved to nobody knows where": (
        numbered({"text": "text", "speech": "speech"}), MOT, {}, {"new_towers": {"image": "text"}},
        "some have moved",
    ),
    "data with more ids than rows": (
        numbered(DENSE, VOCABULARY), MOT, {}, {"vocabulary": VOCABULARY | {"image": 7}},
        "model.vocab_tokens = 40, data has 41 ids: set model.vocab_tokens=41",
    ),
    "another tokenizer": (
        numbered(DENSE, VOCABULARY), MOT, {}, {"vocabulary": VOCABULARY | {"text": 29}},
        r"ids \{'text': 30, .*\{'text': 29, .*fewer of text; ids are never dropped",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused(case: str) -> None:
    source, towers, changes, how, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected):
        fitted(source, towers, changes, **how)


def test_ids_keep_their_rows_where_ranges_move() -> None:
    source = numbered(IMAGE, {"text": 30, "image": 6})  # and 4 rows of padding
    made = fitted(
        source, MOT, {"vocab_tokens": 64}, new_towers={"speech": "text"},
        vocabulary={"text": 33, "image": 8, "speech": 20},
    )  # fmt: skip
    old = source.tensors["embedding.weight.shared"].read()
    new = made.tensors["embedding.weight.shared"].read()
    fresh = Decoder(made.model, seed=1).embedding.weight["shared"]
    assert torch.equal(new[:30], old[:30]) and torch.equal(new[33:39], old[30:36])
    for rows in (slice(30, 33), slice(39, 64)):
        assert torch.equal(new[rows], fresh[rows])
    head, old_head = (s.tensors["head.weight.shared"].read() for s in (made, source))
    assert torch.equal(head[:30], old_head[:30]) and torch.equal(head[33:39], old_head[30:36])
    mean = old_head[:36].mean(0)
    torch.testing.assert_close(head[39:], mean.expand(25, -1), rtol=1e-6, atol=0)  # sum of 36 in fp32
    assert made.vocabulary == {"text": 33, "image": 8, "speech": 20}


def test_an_equal_vocabulary_keeps_its_padding() -> None:
    source = numbered(DENSE, VOCABULARY, vocab_tokens=48)
    check_origins(source, fitted(source, MOT, vocabulary=VOCABULARY), dict.fromkeys(MOT, "all"))


def test_new_ids_cost_no_more_than_their_share() -> None:
    """The bound that pretrain/weights/warm_start.py promises, and that rows of a fresh start break it."""
    config = tiny_config(TEXT, norm_placement="pre")
    decoder = Decoder(config, seed=2)
    with torch.no_grad():  # a trained head: likely ids have large logits, the others far below zero
        decoder.head.weight["shared"].mul_(5).sub_(3 * torch.ones(16))
        decoder.final_norm.weight["text"].copy_(torch.ones(16))
    tensors = {name: LazyTensor(tuple(p.shape), p.detach) for name, p in decoder.named_parameters()}
    source = WeightSource(Path("src"), config, tensors, "src")
    grown = adapt_weights(
        source, config.model_copy(update={"vocab_tokens": 120}), seed=1, new_towers={}, vocabulary=None
    )
    larger = Decoder(grown.model, seed=1)
    batch = random_batch(config, sequences=4)

    def losses(model: Decoder) -> torch.Tensor:
        return Pretraining(model)(build_inputs(batch, model.config))[0] / batch.loss_weights.sum()

    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            parameter.copy_(grown.tensors[name].read())
        rise = float(losses(larger) - losses(decoder))
        larger.head.weight["shared"][40:] = Decoder(grown.model, seed=1).head.weight["shared"][40:]
        rise_fresh = float(losses(larger) - losses(decoder))
    assert 0 < rise <= log(1 + 80 / 40) + 1e-5  # rounding of two means of 46 fp32 losses
    assert rise_fresh > log(1 + 80 / 40) + 1


def _load(folder: Path, layout: dict[str, int], stages: list[range]) -> tuple[list[str], list[str]]:
    """(names this rank holds, those that differ from what the rank of a run with seed 4 would have drawn)."""
    w = world.start(ParallelConfig.model_validate(layout))
    config = open_weights(folder).model
    loaded, drawn = (
        dict(Decoder(config, seed=seed, tp=w.tensor_parallel, sublayers=stages[w.pp_rank]).named_parameters())
        for seed in (9, 4)
    )
    load_weights(folder, loaded.items(), w)
    return list(loaded), [name for name in loaded if not torch.equal(loaded[name], drawn[name])]


@pytest.mark.parametrize(
    ("layout", "ranks", "stages"),
    [
        ({}, 1, [range(6)]),
        ({"tp": 2}, 2, [range(6)]),
        ({"tp": 2, "pp": 2}, 4, [range(2), range(2, 6)]),
    ],
    ids=["alone", "tp2", "tp2_pp2"],
)
def test_each_rank_reads_its_own_parts(tmp_path: Path, layout: dict, ranks: int, stages: list[range]) -> None:
    source = drawn_weights(tmp_path / "w")
    found = run_on_ranks(_load, ranks, tmp_path / "w", layout, stages)
    assert all(wrong == [] for _, wrong in found)
    assert {name for names, _ in found for name in names} == source.tensors.keys()


def drawn_weights(out: Path) -> WeightSource:
    """A folder of what a run with seed 4 starts from."""
    config = tiny_config(MOT)
    tensors = {
        name: LazyTensor(tuple(p.shape), p.detach) for name, p in Decoder(config, seed=4).named_parameters()
    }
    source = WeightSource(out.with_name("drawn"), config, tensors, "drawn")
    write_folder(out, source, {MODEL: about_model(source)}, dtype="fp32", file_bytes=9_000)
    return source


def _load_damaged(folder: Path) -> str:
    w = world.start(ParallelConfig())
    try:
        load_weights(folder, Decoder(open_weights(folder).model).named_parameters(), w)
    except ConfigError as error:
        return str(error)
    return "nothing was noticed"


def test_all_ranks_hear_of_a_file_that_has_changed(tmp_path: Path) -> None:
    drawn_weights(tmp_path / "w")
    last = sorted((tmp_path / "w").glob("*.safetensors"))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    for told in run_on_ranks(_load_damaged, 2, tmp_path / "w"):
        assert last.name in told and "SHA-256 differs" in told


def depth_table(**changes: Any) -> dict[str, Any]:
    return {"schedule": "alternating", "mean_ratio": 0.75, "rule": "top_k", "zero_init": True, **changes}


def _with_routers(folder: Path, changes: dict[str, Any]) -> list[torch.Tensor]:
    """(logits of the source, logits with new routers, which tokens ran), in sequence order."""
    w = world.start(ParallelConfig())
    plain = open_weights(folder).model
    config = tiny_config(MOT, depth={"image": depth_table(**changes)})
    batch = random_batch(config, seed=2, document_tokens=(12, 12), padding_tokens=0)
    found = []
    for model in (plain, config):
        decoder = Decoder(model, seed=9)
        load_weights(folder, decoder.named_parameters(), w)
        inputs = build_inputs(batch, model)
        with torch.no_grad():
            found.append(decoder.double()(inputs)[inputs.routing.to_sequence])
    ran = torch.zeros(batch.input_ids.size, dtype=torch.bool)
    depth = decoder.blocks[1].depth  # type: ignore[union-attr]
    with torch.no_grad():
        chosen, _ = depth(torch.randn(ran.shape[0], config.d_model).double(), inputs)  # all scores are 0
    rows = chosen.tokens.rows
    ran[inputs.routing.to_sorted[rows]] = True
    return [*found, ran]


def test_a_model_that_gains_routers_starts_as_it_was_for_tokens_that_run(tmp_path: Path) -> None:
    drawn_weights(tmp_path / "w")
    ((before, after, ran),) = run_on_ranks(_with_routers, 1, tmp_path / "w", {})
    assert 0 < (~ran).sum() < ran.sum()
    assert_close(after[ran], before[ran], "logits")
    assert all((after[token] - before[token]).abs().max() > 1e-3 for token in (~ran).nonzero().flatten())


def test_routers_are_copied_drawn_or_left_behind() -> None:
    table = {"image": depth_table(zero_init=False)}
    name = "blocks.1.depth.image.weight"
    source = numbered(DENSE)
    gained = fitted(source, MOT, {"depth": table})
    drawn = dict(Decoder(gained.model, seed=1).named_parameters())[f"{name}.image"]
    assert torch.equal(gained.tensors[f"{name}.image"].read(), drawn)
    assert {n: t.shape for n, t in gained.tensors.items()} == logical_shapes(gained.model)
    source = numbered(DENSE, depth=table)
    kept = fitted(source, MOT, {"depth": table})
    assert torch.equal(kept.tensors[f"{name}.image"].read(), source.tensors[f"{name}.all"].read())
    left = fitted(source, MOT)
    assert {n: t.shape for n, t in left.tensors.items()} == logical_shapes(tiny_config(MOT))


EXPERTS = {"text": {"num_experts": 2}}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, {"experts": EXPERTS}, "its model.experts are none; experts are neither made of other weights"),
        ({"experts": EXPERTS}, {}, "its model.experts are text: 2; .* nor dropped"),
        ({"experts": EXPERTS}, {"experts": EXPERTS}, "by the same model; name them in initial_weights"),
    ],
)
def test_weights_of_experts_are_not_refitted(source: dict, target: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(numbered(MOT, **source), MOT, target)


VECTORS = {"image": {"features": 3}}


def test_adapters_of_vectors_are_drawn_copied_or_refused() -> None:
    """Ids alone become a model that denoises images; its own weights are kept, whatever tower they count
    to."""
    plain = numbered(TEXT)
    made = fitted(plain, IMAGE, {"vectors": VECTORS})
    fresh = Decoder(made.model, seed=1).state_dict()
    adapters = [name for name in made.tensors if name.startswith("vectors.")]
    assert made.tensors.keys() == fresh.keys() and len(adapters) == 8
    assert all(torch.equal(made.tensors[name].read(), fresh[name]) for name in adapters)

    source = numbered(IMAGE, vectors=VECTORS)
    untied = ("attention", "feed_forward", "norm", "vectors")
    kept = fitted(source, IMAGE, {"vectors": VECTORS, "untied": untied})
    for name in adapters:
        tensor = kept.tensors[name.replace(".shared", ".image")].read()
        assert torch.equal(tensor, source.tensors[name].read())

    with pytest.raises(ConfigError, match=r"image.enter.weight.shared has the shape \[16, 3\]"):
        fitted(source, IMAGE, {"vectors": {"image": {"features": 4}}})
    for vectors in ({}, {"image": {"features": 3, "prediction": "v"}}):
        with pytest.raises(
            ConfigError, match=r"model.vectors.image learned diffusion \(epsilon\); set the same"
        ):
            fitted(source, IMAGE, {"vectors": vectors})
