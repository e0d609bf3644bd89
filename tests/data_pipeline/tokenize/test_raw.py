import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenize.raw import Part, SampleError, document_sample, parse_document

PARTS = st.one_of(
    st.builds(Part, st.just("text"), st.text(), st.booleans()),
    st.builds(Part, st.sampled_from(["image", "speech"]), st.binary(max_size=8), st.booleans()),
)


@given(st.lists(PARTS, min_size=1, max_size=8))
def test_a_written_document_is_read_back(parts: list[Part]) -> None:
    assert parse_document(document_sample(parts, {"image": "png", "speech": "wav"})) == parts


def test_what_else_a_sample_carries_is_ignored() -> None:
    sample = {"json": b'{"parts": [{"text": "a"}], "licence": "free"}', "cls": b"3", "1.png": b""}
    assert parse_document(sample) == [Part("text", "a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", 'needs a list "parts"'),
        (b'{"parts": []}', 'needs a list "parts"'),
        (b'{"parts": ["a"]}', "a table with one key, its modality"),
        (b'{"parts": [{"text": "a", "image": "0.png"}]}', "a table with one key, its modality"),
        (b'{"parts": [{"text": "a", "loss": 0}]}', '"loss": false where it is context; got'),
        (b'{"parts": [{"loss": false}]}', "a table with one key, its modality"),
        (b'{"parts": [{"video": "0.mp4"}]}', 'the video part "0.mp4" is missing; files here: '),
        (b'{"parts": [{"text": 3}]}', "a part is {modality: text or name of a file}"),
        (b'{"parts": [{"image": "1.png"}]}', 'the image part "1.png" is missing; files here: '),
    ],
)
def test_what_the_format_does_not_allow_is_said(content: bytes, message: str) -> None:
    with pytest.raises(SampleError, match=re.escape(message)):
        parse_document({"json": content, "0.png": b""})


def test_a_sample_without_json_names_what_it_has() -> None:
    with pytest.raises(SampleError, match=r"no \.json member, only \['jpg', 'txt'\]"):
        parse_document({"txt": b"a caption", "jpg": b""})


def test_the_format_is_plain_json() -> None:
    sample = document_sample(
        [Part("text", "drei"), Part("image", b"i"), Part("image", b"j")], {"image": "png"}
    )
    assert json.loads(sample["json"]) == {"parts": [{"text": "drei"}, {"image": "0.png"}, {"image": "1.png"}]}
    assert (sample["0.png"], sample["1.png"]) == (b"i", b"j")
