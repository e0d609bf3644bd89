"""What is packed per modality is unpacked under its name, also after sums."""

import torch

from pretrain.models.modality_sums import TargetSums, pack, unpack


def test_sums_of_vectors_are_sums_of_each_modality() -> None:
    one = pack(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]))
    other = pack(torch.tensor([0.5, 0.0, 0.25]), torch.tensor([1.0, 0.0, 2.0]))
    assert unpack((one + other).tolist(), ("text", "image", "speech")) == {
        "text": TargetSums(1.5, 11.0),
        "image": TargetSums(2.0, 20.0),
        "speech": TargetSums(3.25, 32.0),
    }
