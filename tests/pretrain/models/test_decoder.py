from itertools import pairwise

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from tests.pretrain.models.precision import PRECISIONS, assert_close
from tests.pretrain.models.random_batch import DENSE, IMAGE_SPEECH_SHARED, MOT, random_batch, tiny_config


def test_every_parameter_ends_with_its_shard() -> None:
    config = tiny_config(IMAGE_SPEECH_SHARED, untied=["attention", "norm"])
    names = [name for name, _ in Decoder(config).named_parameters()]
    shards = {name.rpartition(".")[2] for name in names}
    assert shards == {"text", "other", "shared"}
    assert "blocks.1.attention.qkv.weight.other" in names
    assert "blocks.0.attention.qk.weight.text" in names
    assert "blocks.0.feed_forward.gate_up.weight.shared" in names
    assert "final_norm.weight.other" in names
    assert {"embedding.weight.shared", "head.weight.shared"} <= set(names)


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    config = tiny_config(MOT)
    first, again, other = (Decoder(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)


def test_state_holds_parameters_only() -> None:
    """No buffer: casting the module to bf16 must not touch a table of positions, say."""
    decoder = Decoder(tiny_config(MOT))
    assert list(decoder.state_dict()) == [name for name, _ in decoder.named_parameters()]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_logits_are_sorted_like_the_inputs(dtype: torch.dtype) -> None:
    config = tiny_config(MOT)
    batch = random_batch(config)
    inputs = build_inputs(batch, config)
    dense = tiny_config(DENSE)
    logits = Decoder(config).to(dtype)(inputs)
    assert logits.shape == (inputs.num_tokens, config.vocab_tokens)
    # At the start all towers are copies, so the dense model computes the same in sequence order.
    in_sequence = Decoder(dense).to(dtype)(build_inputs(batch, dense))
    assert_close(logits[inputs.routing.to_sequence], in_sequence, "logits")


def test_bf16_weights_compute_in_bf16_with_fp32_positions() -> None:
    config = tiny_config(MOT)
    inputs = build_inputs(random_batch(config), config)
    decoder = Decoder(config)
    exact = decoder(inputs)
    rounded = decoder.bfloat16()(inputs)
    assert rounded.dtype == torch.bfloat16
    # 8 bits through two layers: 0.06 measured on logits with a standard deviation of 0.8.
    assert float((rounded.detach().float() - exact.detach()).abs().max()) < 0.2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cuts", [(3,), (2,), (1, 4), (2, 3, 4)], ids=str)
def test_ranges_of_sublayers_are_the_decoder_in_parts(cuts: tuple[int, ...], checkpointing: bool) -> None:
    """Also where a cut falls between the attention and the feed-forward of a block; names stay the same."""
    config = tiny_config(MOT)
    inputs = build_inputs(random_batch(config), config)
    whole = Decoder(config)
    parts = [
        Decoder(config, sublayers=range(start, stop), activation_checkpointing=checkpointing)
        for start, stop in pairwise((0, *cuts, 2 * config.num_layers + 2))
    ]
    hidden = None
    for part in parts:
        hidden, _ = part.hidden(inputs, hidden)
    expected, _ = whole.hidden(inputs)
    assert hidden is not None and torch.equal(hidden, expected)
    hidden.square().sum().backward()
    expected.square().sum().backward()
    found = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    assert sum(len(list(part.parameters())) for part in parts) == len(found)
    assert found.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, found[name])
        assert name.startswith("head") or torch.equal(parameter.grad, found[name].grad), name
