import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import tokenize_config
from data_pipeline.tokenize.layout import SourceSettings, is_inside, parts_of, value_at
from data_pipeline.tokenize.raw import Part, SampleError

CAPTIONED = SourceSettings(parts=({"image": "jpg|png"}, {"text": "json:caption|txt"}))
CHAT = SourceSettings(parts=({"image": "file:image?"}, {"conversation": "json:conversations"}))


def sample(members: dict[str, bytes] | None = None, **values: Any) -> dict[str, bytes]:
    return {**(members or {}), **({"json": json.dumps(values).encode()} if values else {})}


def refusal(source: SourceSettings, given: dict[str, bytes]) -> str:
    with pytest.raises(SampleError) as error:
        parts_of("k", given, source)
    return str(error.value)


def test_parts_are_members_and_values_in_the_order_of_the_table() -> None:
    expected = [Part("image", b"i"), Part("text", "a cat")]
    assert parts_of("k", sample({"jpg": b"i"}, caption="a cat"), CAPTIONED) == expected
    assert parts_of("k", sample({"PNG": b"i", "TXT": b"\xef\xbb\xbfa cat"}), CAPTIONED) == expected
    assert parts_of("k", sample({"jpg": b"i", "txt": b"a cat"}, caption=None), CAPTIONED) == expected
    nested = SourceSettings(parts=({"text": "json:a.b"},))
    assert parts_of("k", sample(a={"b": "in"}), nested) == [Part("text", "in")]
    assert value_at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1 and value_at({"a": 3}, "a.b") is None
    images = SourceSettings(parts=({"image": "images"}, {"text": "json:text"}))
    assert parts_of("k", sample({"images.0": b"0", "images.1": b"1"}, text="t"), images) == [
        Part("image", b"0"), Part("image", b"1"), Part("text", "t"),
    ]  # fmt: skip


@given(st.integers())
def test_shuffled_parts_are_the_same_parts_by_a_hash_of_the_key(first: int) -> None:
    keys = [f"{first}-{number}" for number in range(40)]
    shuffled = CAPTIONED.model_copy(update={"order": "shuffled"})
    given = sample({"jpg": b"i", "txt": b"t"})
    orders = [tuple(part.modality for part in parts_of(key, given, shuffled)) for key in keys]
    assert set(orders) == {("image", "text"), ("text", "image")}, "2 ** -39 by chance"
    assert orders == [tuple(part.modality for part in parts_of(key, given, shuffled)) for key in keys]


def test_what_a_sample_lacks_is_one_sentence() -> None:
    message = refusal(CAPTIONED, sample({"jpg": b"i"}, title="x"))
    assert (
        "has no text at \"json:caption|txt\"; members here: ['jpg', 'json'], keys of its .json: " in message
    )
    assert "must follow each other in the tar" in message and "keys_with_dots" in message
    assert "is list, ['a'], and no text" in refusal(CAPTIONED, sample({"jpg": b"i"}, caption=["a"]))
    assert "is not UTF-8" in refusal(CAPTIONED, sample({"jpg": b"i", "txt": b"\xff\xfe"}))
    value = SourceSettings(parts=({"image": "json:url"},))
    assert "is a value of the .json and no file" in refusal(value, sample(url="http://x"))
    assert "not valid JSON" in refusal(CAPTIONED, {"json": b"{", "jpg": b""})
    assert "nested deeper" in refusal(CAPTIONED, {"json": b'{"caption":' + b"[" * 200 + b"]" * 200 + b"}"})
    assert "holds no table" in refusal(CAPTIONED, {"json": b"[]"})
    assert "none of its parts" in refusal(SourceSettings(parts=({"text": "txt?"},)), {"jpg": b""})


def turns(*texts: str, keys: tuple[str, str] = ("from", "value")) -> list[dict[str, str]]:
    return [{keys[0]: ("human", "gpt")[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def test_pictures_of_a_conversation_stand_at_their_placeholders() -> None:
    given = sample({"file:a.jpg": b"A", "file:b.jpg": b"B"}, image=["a.jpg", "b.jpg"], conversations=turns(
        "<image>\nWhat?", "A cat.", "And <image>?", "A dog."))  # fmt: skip
    assert parts_of("k", given, CHAT) == [
        Part("text", "USER: "), Part("image", b"A"),
        Part("text", "\nWhat?\nASSISTANT: A cat.\nUSER: And "), Part("image", b"B"),
        Part("text", "?\nASSISTANT: A dog.\n"),
    ]  # fmt: skip
    alone = sample(conversations=turns("Hi", "Ho", keys=("role", "content")))
    assert parts_of("k", alone, CHAT) == [Part("text", "USER: Hi\nASSISTANT: Ho\n")]
    unplaced = sample({"file:a.jpg": b"A"}, image="a.jpg", conversations=turns("What?"))
    assert parts_of("k", unplaced, CHAT) == [Part("image", b"A"), Part("text", "USER: What?\n")]


def test_parts_without_loss_are_context() -> None:
    prompt = SourceSettings(parts=({"image": "jpg", "loss": False}, {"text": "json:caption"}))
    assert parts_of("k", sample({"jpg": b"A"}, caption="c"), prompt) == [
        Part("image", b"A", False), Part("text", "c"),
    ]  # fmt: skip
    assert prompt.as_toml() == ('[source]\nparts = [{image = "jpg", loss = false}, {text = "json:caption"}]')
    given = sample(
        {"file:a.jpg": b"A"}, image="a.jpg", conversations=turns("<image> What?", "A cat.", "And?")
    )
    table = ({"image": "file:image?"}, {"conversation": "json:conversations", "loss": "answers"})
    found = parts_of("k", given, SourceSettings(parts=table))
    assert found == [
        Part("text", "USER: ", False), Part("image", b"A"), Part("text", " What?\n", False),
        Part("text", "ASSISTANT: ", False), Part("text", "A cat.\n"), Part("text", "USER: ", False),
        Part("text", "And?\n", False),
    ]  # fmt: skip
    plain = parts_of("k", given, CHAT)
    assert "".join(p.data for p in found if p.modality == "text") == "".join(
        p.data for p in plain if p.modality == "text"
    )


def test_conversations_that_are_none_are_said() -> None:
    assert "more <image> than" in refusal(CHAT, sample(conversations=turns("<image>")))
    assert "list of turns" in refusal(CHAT, sample(conversations={"a": 1}))
    assert "a turn is {from, value}" in refusal(CHAT, sample(conversations=[{"from": "human", "value": 3}]))
    assert 'names the file "../../etc/passwd", which is not a regular file below' in refusal(
        CHAT, sample(image="../../etc/passwd", conversations=turns("a"))
    )


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "", "a\nb", "a\0b", "a\x1b[2J"])
def test_names_that_lead_out_of_the_folder_are_none(name: str) -> None:
    assert not is_inside(name) and is_inside("a/b.jpg")


def test_the_table_of_the_data_config() -> None:
    values = {"text": {}, "source": {"parts": [{"image": "jpg"}], "order": "shuffled"}}
    config = tokenize_config(values, "data.toml")
    assert config.source.parts == ({"image": "jpg"},) and list(config.tables) == ["text"]
    assert config.values()["source"] == {"parts": [{"image": "jpg"}], "order": "shuffled"}
    assert config.source.as_toml() == '[source]\nparts = [{image = "jpg"}]\norder = "shuffled"'
    assert "source" not in tokenize_config({"text": {}}, "data.toml").values()
    for source, why in (
        ({"parts": [{"image": "jpg", "text": "txt"}]}, "is no part; a part is"),
        ({"parts": [{"image": "jpg||png"}]}, "is no part"),
        ({"parts": [{"text": "json:"}]}, "is no part"),
        ({"parts": [{"text": "txt", "loss": "answers"}]}, "loss is one of true, false"),
        ({"parts": [{"loss": False}]}, "is no part"),
        ({"folder": "/etc"}, "a folder below that of the shards"),
        ({"folder": "../x"}, "a folder below that of the shards"),
        ({"ordre": "listed"}, "source.ordre: unknown key"),
        (3, "source"),
    ):
        with pytest.raises(ConfigError, match=why):
            tokenize_config({"text": {}, "source": source}, "data.toml")
