"""The ledger counts adapters and pairs of images as torch does."""

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.accounting import (
    active_parameters,
    describe,
    forward_flops,
    module_costs,
    total_parameters,
    train_flops,
)
from pretrain.models.decoder import Decoder
from pretrain.models.logical_weights import layers, logical_shapes
from pretrain.models.pretraining import Pretraining
from pretrain.models.vectors_accounting import adapter_parameters
from tests.pretrain.models.random_batch import DENSE, MOT
from tests.pretrain.models.vector_batch import vector_batch, vector_config, vector_inputs_of

CONFIGS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "mot": (MOT, {}),
    "untied": (MOT, {"untied": ["feed_forward", "vectors"]}),
    "dense_none": (DENSE, {"image": {"objective": "none", "bidirectional": False}}),
}
configs = pytest.mark.parametrize(("towers", "changes"), CONFIGS.values(), ids=CONFIGS.keys())


@configs
def test_parameters_equal_those_of_the_decoder(towers: dict[str, str], changes: dict) -> None:
    config = vector_config(towers, **changes)
    named = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    assert logical_shapes(config) == named
    own = {name: p for name, p in Decoder(config).named_parameters() if name.startswith("vectors.")}
    assert list(own) == [
        n for of in layers(config) if of.part == "vectors" for n in of.names(config).values()
    ]
    shard = config.vectors_shard("image")
    assert module_costs(config)["vectors"].parameters == {shard: sum(p.numel() for p in own.values())}
    assert total_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())
    plain = config.model_copy(update={"vectors": {}})
    assert active_parameters(config, "text") == active_parameters(plain, "text")
    met = active_parameters(config, "image") - active_parameters(plain, "image")
    assert met == adapter_parameters(config, "image") == sum(p.numel() for p in own.values())


@configs
def test_flops_equal_torchs_counter(towers: dict[str, str], changes: dict) -> None:
    config = vector_config(towers, **changes)
    # Without padding, which takes part in every product.
    inputs = vector_inputs_of(vector_batch(((("i3", 2, "i4"), (4, "i1", "s1")),), context_tokens=25), config)
    tokens = dict(zip(config.modalities, inputs.input_tokens, strict=True))
    assert sum(tokens.values()) == 25
    # As plain products, causal attention has every pair of a document; an image's call is one more.
    pairs = sum(n * n for n in inputs.mask.segments)
    pairs += sum((end - first) * (end - document) for document, first, end in inputs.mask.spans)
    decoder, images = Decoder(config), 3 * len(config.learned_vectors)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            decoder(inputs)
        with FlopCounterMode(display=False) as training:
            objective, *_ = Pretraining(decoder)(inputs)
            objective.backward()
    leaving = sum(2 * 16 * 3 * tokens[m] for m in config.learned_vectors)  # logits need no prediction
    assert forward.get_total_flops() == forward_flops(config, tokens, pairs, num_images=images) - leaving
    assert training.get_total_flops() == train_flops(config, tokens, pairs, num_images=images)


def test_pairs_within_images_are_counted() -> None:
    inputs = vector_inputs_of(vector_batch(), vector_config(MOT))
    causal = vector_inputs_of(vector_batch(), vector_config(MOT, image={"bidirectional": False}))
    assert inputs.visible_pairs - causal.visible_pairs == 1 + 3 + 0 + 1 + 3 + 0 + 1


def test_a_person_reads_what_vectors_are() -> None:
    told = describe(vector_config(MOT, image={"prediction": "v"}))
    assert "vectors of image: 3 features, linear adapters, diffusion (v), an image sees itself whole" in told
