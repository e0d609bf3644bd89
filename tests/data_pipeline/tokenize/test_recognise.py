import json
from typing import Any

import pytest

from data_pipeline.tokenize.layout import parts_of
from data_pipeline.tokenize.recognise import recognise, shape_of

TURNS = [{"from": "human", "value": "a"}]


def sample(*names: str, **values: Any) -> dict[str, bytes]:
    members = {name: b"x" for name in names}
    return {**members, **({"json": json.dumps(values).encode()} if values else {})}


@pytest.mark.parametrize(
    ("given", "name", "parts"),
    [
        (sample("jpg", "txt", url="u", caption="c"), "img2dataset", [{"image": "jpg"}, {"text": "txt"}]),
        (sample("WEBP", caption="c"), "img2dataset", [{"image": "webp"}, {"text": "json:caption"}]),
        (sample("flac", "txt"), "LibriSpeech", [{"speech": "flac"}, {"text": "txt"}]),
        (sample("opus", text="t", sid="1"), "GigaSpeech", [{"speech": "opus"}, {"text": "json:text"}]),
        (
            sample("file:a.jpg", image="a.jpg", conversations=TURNS),
            "LLaVA",
            [{"image": "file:image"}, {"conversation": "json:conversations"}],
        ),
        (sample(conversations=TURNS, id=1), "ShareGPT", [{"conversation": "json:conversations"}]),
        (sample(text="t", meta={}), "rows of text", [{"text": "json:text"}]),
        (sample("txt"), "plain text", [{"text": "txt"}]),
        (
            sample("0.jpg", texts=["a", None], images=[None, "0.jpg"]),
            "OBELICS",
            [{"interleaved": "json:texts+images"}],
        ),
        (sample("images.0", "images.1", text="t"), "pictures", [{"image": "images"}, {"text": "json:text"}]),
    ],
)
def test_public_layouts_have_names_and_a_table_that_reads_them(
    given: dict[str, bytes], name: str, parts: list[dict[str, str]]
) -> None:
    layout = recognise([shape_of(given)] * 5)
    assert name in layout.name and layout.source is not None
    assert list(layout.source.parts) == parts
    assert parts_of("k", given, layout.source)


def test_what_only_some_samples_have_is_optional() -> None:
    mixed = [sample(image="a.jpg", conversations=TURNS), sample(conversations=TURNS)]
    layout = recognise([shape_of(one) for one in mixed])
    assert layout.source is not None and layout.source.parts[0] == {"image": "file:image?"}


def test_members_that_are_not_read_are_said() -> None:
    layout = recognise([shape_of(sample("jpg", "txt", "cls", "npy"))])
    assert "Not read: members cls, npy." in layout.note and 'order = "shuffled"' in layout.note


def test_the_raw_form_needs_no_table_and_dots_in_keys_do() -> None:
    raw = recognise([shape_of(sample("0.png", parts=[{"image": "0.png"}]))])
    assert raw.source is not None and raw.source.as_toml() == "" and "needs no table" in raw.note
    dotted = sample(*(f"5_sample_{n:04}.{ending}" for n in range(60) for ending in ("jpg", "json")))
    found = recognise([shape_of(dotted)])
    assert found.source is not None and found.source.keys_with_dots


def test_what_cannot_be_declared_is_one_sentence() -> None:
    layout = recognise([shape_of(sample("npy"))])
    assert layout.source is None and "raw form" in layout.note


def test_a_json_that_is_none_and_members_that_were_not_read_have_a_shape() -> None:
    assert shape_of({"json": b"{", "jpg": None}).names == ("json", "jpg")
