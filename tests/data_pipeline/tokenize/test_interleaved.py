import base64
import json
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import tokenize_config
from data_pipeline.tokenize.layout import SourceSettings, parts_of
from data_pipeline.tokenize.raw import Part, SampleError

OBELICS, MMC4 = "json:texts+images", "json:text_list+image_info"


def parts(where: str, key: str = "a/0001", loss: bool = True, **values: Any) -> list[Part]:
    """Of a sample with two pictures."""
    sample = {"0.jpg": b"P", "1.png": b"Q", "json": json.dumps(values).encode()}
    return parts_of(key, sample, SourceSettings(parts=({"interleaved": where, "loss": loss},)))


def image(name: str, index: Any, **more: Any) -> dict[str, Any]:
    return {"image_name": name, "matched_text_index": index, **more}


def test_aligned_lists_are_read_in_their_order() -> None:
    found = parts(OBELICS, texts=["a", None, "", "b", "c"], images=[None, "0.jpg", "0001.1.png", None, None])
    assert found == [Part("text", "a"), Part("image", b"P"), Part("image", b"Q"), Part("text", "b c")]
    assert parts(OBELICS, texts=["a"], images=[None], loss=False) == [Part("text", "a", False)]


def test_pictures_stand_before_the_text_that_they_match() -> None:
    inside = image("x", 1, image_base64=base64.b64encode(b"B").decode())
    found = parts(MMC4, text_list=["a", "b", "c"], image_info=[image("1.png", 2), inside, image("0.jpg", 2)])
    pictures = [Part("image", content) for content in (b"B", b"Q", b"P")]
    assert found == [Part("text", "a"), pictures[0], Part("text", "b"), *pictures[1:], Part("text", "c")]
    assert parts(MMC4, text_list=["a", "b"], image_info=[]) == [Part("text", "a b")]
    both = f"{OBELICS}|{MMC4}"
    assert parts(both, text_list=["a"], image_info=[]) == parts(both, texts=["a"], images=[None])


def test_a_picture_that_is_not_there_is_said_or_left_out() -> None:
    lists = {"texts": ["a", None], "images": [None, "http://host/x.jpg"]}
    with pytest.raises(SampleError, match=r"its picture 'http://host/x\.jpg' is no member .* value with \?"):
        parts(OBELICS, **lists)
    assert parts(f"{OBELICS}?", **lists) == [Part("text", "a")]
    with pytest.raises(SampleError, match=r"'0002\.0\.jpg' is no member"):  # of another sample
        parts(OBELICS, texts=[None], images=["0002.0.jpg"])


@pytest.mark.parametrize(
    ("where", "values", "message"),
    [
        (OBELICS, {"texts": ["a"], "images": [None] * 2}, '"texts" has 1 elements, "images" has 2'),
        (OBELICS, {"texts": ["a"], "images": ["0.jpg"]}, "element 0 is a text and a picture"),
        (OBELICS, {"texts": "a", "images": []}, "are not both lists"),
        (OBELICS, {"texts": [3], "images": [None]}, "neither text nor null"),
        (OBELICS, {"texts": [None], "images": [3]}, "a picture is null, a name or a table"),
        (OBELICS, {"text": "a"}, 'has no interleaved at "json:texts'),
        (MMC4, {"text_list": ["a"], "image_info": [image("0.jpg", 1)]}, r"legal: 0 \.\.\. 0"),
        (MMC4, {"text_list": ["a"], "image_info": [image("0.jpg", "0")]}, "matched_text_index = '0'"),
        (MMC4, {"text_list": ["a"], "image_info": [image("x", 0, image_base64="?")]}, "no base64"),
    ],
)
def test_lists_that_are_none_are_said(where: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        parts(where, **values)


def test_two_lists_are_named() -> None:
    for where in ("json:texts", "texts+images", "json:texts+"):
        source = {"parts": [{"interleaved": where}]}
        with pytest.raises(ConfigError, match="names no two lists"):
            tokenize_config({"text": {}, "source": source}, "data.toml")
