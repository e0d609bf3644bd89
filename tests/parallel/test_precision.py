"""The dtype in which sums over a row are made."""

import torch

from parallel.precision import at_least_fp32


def test_narrow_is_widened_and_wide_is_itself() -> None:
    narrow = torch.tensor([1.5, 2.0], dtype=torch.bfloat16)
    assert at_least_fp32(narrow).dtype == torch.float32
    for wide in (narrow.float(), narrow.double()):
        assert at_least_fp32(wide) is wide
