"""The published routing, run on the decoder's weights, is a second opinion on what the decoder computes."""

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.pretrain.models.random_batch import MOT, TWO_TOWERS, random_batch, tiny_config
from tools.bench.published_mot import PublishedDecoder


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("towers", [TWO_TOWERS, MOT])
def test_boolean_masks_compute_what_the_sorted_stream_computes(towers: dict[str, str], qk_norm: bool) -> None:
    config = tiny_config(towers, qk_norm=qk_norm)
    batch = random_batch(config, sequences=3, padding_tokens=0, document_tokens=(12, 12))
    decoder = Decoder(config)
    with torch.no_grad():
        for index, parameter in enumerate(decoder.parameters()):
            parameter.mul_(1 + 0.01 * index)
    published = PublishedDecoder(config)
    published.copy_weights(decoder)
    ours, *_ = Pretraining(decoder)(build_inputs(batch, config))
    ids, targets, tower, positions = (
        torch.from_numpy(values.reshape(-1)).long()
        for values in (batch.input_ids, batch.target_ids, batch.input_modality, batch.positions)
    )
    theirs = published(ids, targets, tower, positions, sequences=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # fp32, in another order: 2e-7 measured

    ours.backward()
    theirs.backward()
    for index, name in enumerate(config.tower_names):
        for block, other in zip(decoder.blocks, published.blocks, strict=True):
            layers = other.get_submodule(f"modalities.{index}")
            expected = torch.cat(
                [layers.get_parameter(f"{part}.weight").grad for part in ("query", "key", "value")]
            )
            got = block.get_parameter(f"attention.qkv.weight.{name}").grad
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
