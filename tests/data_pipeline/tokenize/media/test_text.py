import pytest

from data_pipeline.tokenize.media.text import read_text
from data_pipeline.tokenize.raw import SampleError


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert read_text("\U0001f600") == "\U0001f600"
    with pytest.raises(SampleError, match="not valid Unicode"):
        read_text("\ud800")
