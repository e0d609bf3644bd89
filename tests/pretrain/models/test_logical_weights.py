"""The torch-free list of weights is what the decoder holds."""

from pretrain.models.decoder import Decoder
from pretrain.models.logical_weights import logical_shapes
from tests.pretrain.models.random_batch import tiny_config
from tests.pretrain.models.test_accounting import configs


@configs
def test_names_and_shapes_are_those_of_the_decoder(towers: dict[str, str], changes: dict) -> None:
    config = tiny_config(towers, **changes)
    held = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    assert logical_shapes(config) == held
    assert list(logical_shapes(config)) == list(held)
